"""`ostinato generate`: prompts in batches, a bounded number of them at once, answers in the prompts' order."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato import errors, requests
from ostinato.cli import options, prompts, show
from ostinato.cli.prompts import Prompt
from ostinato.cli.session import Session, usage
from ostinato.cli.stream import stream_one
from ostinato.client import DEFAULT_RESPONSE_BYTES, Client
from ostinato.v1 import generation_pb2, types_pb2

Batch = tuple[Sequence[Prompt], generation_pb2.GenerateRequest]


def generate(
    session: Session,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; - is a prompt a line of stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="JSON lines: strings, or objects with text, token_ids or messages, and any parameters. - is stdin."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Copies of each prompt; --seed is the same for all.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="A text is a user's message, not a text to go on with.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in a request, capped by the model's limit.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once. With 1, numbers ascend with the prompts.")] = 1,
    key: options.Key = "",
    request_id: Annotated[str, typer.Option(help="Label for logs and traces.", show_default=False)] = "",
    require_grade: Annotated[
        str | None, typer.Option(metavar="exact|serial|best-effort", help="Refuse to answer below this grade.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Make each answer twice, and fail if one differs.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the tokens of one prompt as they come.")] = False,
    progress: Annotated[bool | None, typer.Option(help="Progress on stderr. Default: if it is a terminal.")] = None,
    max_response_bytes: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Largest answer to a request.")
    ] = DEFAULT_RESPONSE_BYTES,
    seed: options.Seed = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    stop_token_ids: options.StopTokenIds = None,
    bad_words: options.BadWords = None,
    ignore_eos: options.IgnoreEos = None,
    logprobs: options.Logprobs = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
) -> Coroutine[Any, Any, bool]:
    """Answers prompts: a table, or with --json a line for each result.

    Without --seed every answer gets a seed of its own, which is shown and gives the same answer when asked for.
    With --key, the same command again returns the recorded answers; of several requests, the second has KEY/2, and so on.
    """
    wanted = list(_copies(_read(texts or [], file), n, chat))
    if not wanted:
        raise typer.BadParameter("no prompt: give some as arguments, with --file, or with - on stdin")
    sampling: requests.Sampling = {
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "stop": stop or None,
        "stop_token_ids": stop_token_ids or None,
        "bad_words": bad_words or None,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
        "response_format": options.response_format(json_schema, regex),
    }
    with usage():
        common = requests.batch([wanted[0].item], key, request_id, require_grade, sampling, verify=verify)
    if stream:
        if len(wanted) > 1:
            raise typer.BadParameter(f"--stream: shows one prompt, not {len(wanted)}")
        return stream_one(session, common, max_response_bytes)
    return _generate(session, wanted, common, batch, concurrency, progress, max_response_bytes)


async def _generate(
    session: Session,
    wanted: Sequence[Prompt],
    common: generation_pb2.GenerateRequest,
    batch: int,
    concurrency: int,
    progress: bool | None,
    max_response_bytes: int,
) -> bool:
    """Sends the prompts and prints their results, in order. Whether every item has an output."""
    results: list[types_pb2.Result] = []
    async with session.client(max_response_bytes) as client:
        if len(wanted) > 1:
            batch = min(batch, (await client.model(timeout=session.timeout)).limits.batch_items_max or batch)
        batches = list(_batches(wanted, common, batch))
        outcomes = _outcomes(client, session, batches, concurrency)
        try:
            with show.progress("generate", len(wanted), False if len(batches) == 1 and progress is None else progress) as done:
                async with aclosing(outcomes):
                    async for outcome in outcomes:
                        results.extend(outcome)
                        done(len(results))
                        if session.json:
                            for result in outcome:
                                show.as_json(result)
        finally:
            if results and not session.json:
                show.table(show.RESULT_COLUMNS, map(show.result, results))
                if common.verify:
                    show.note(f"verified: {show.verdicts(results)}")
    return all(result.HasField("output") and result.comparison.verdict != types_pb2.VERDICT_DIVERGED for result in results)


def _read(texts: Sequence[str], file: Path | None) -> Iterator[Prompt]:
    yield from prompts.from_arguments(texts)
    if file is not None:
        yield from prompts.from_file(file)


def _copies(given: Iterable[Prompt], n: int, chat: bool) -> Iterator[Prompt]:
    for each in given:
        for _ in range(n):
            yield prompts.as_chat(each) if chat else each


def _batches(wanted: Sequence[Prompt], common: generation_pb2.GenerateRequest, size: int) -> Iterator[Batch]:
    """Requests like `common`, each with its part of the prompts; a key names one request, so each has its own."""
    for number, start in enumerate(range(0, len(wanted), size), 1):
        part = wanted[start : start + size]
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(common)
        del request.items[:]
        request.items.extend(each.item for each in part)
        if common.idempotency_key and number > 1:
            request.idempotency_key = f"{common.idempotency_key}/{number}"
        yield part, request


async def _outcomes(
    client: Client, session: Session, batches: Iterable[Batch], concurrency: int
) -> AsyncGenerator[Sequence[types_pb2.Result], None]:
    """The results of each batch, in order; then raises the first failure. After it nothing more begins, but what runs ends."""
    waiting = iter(batches)
    running: deque[asyncio.Task[generation_pb2.GenerateResponse | errors.OstinatoError]] = deque()
    failure: errors.OstinatoError | None = None
    try:
        while True:
            if failure is None:
                for each in islice(waiting, concurrency - len(running)):
                    running.append(asyncio.create_task(_send(client, session, each)))
            if not running:
                break
            outcome = await running.popleft()
            if isinstance(outcome, errors.OstinatoError):
                failure = failure or outcome
            else:
                yield outcome.results
    finally:
        for task in running:
            task.cancel()
    if failure is not None:
        raise failure


async def _send(client: Client, session: Session, batch: Batch) -> generation_pb2.GenerateResponse | errors.OstinatoError:
    part, request = batch
    try:
        return await client.generate(request, timeout=session.timeout)
    except errors.InvalidRequest as error:
        return errors.InvalidRequest(error.message, violations=[_placed(each, part) for each in error.violations])
    except errors.OstinatoError as error:
        return error


def _placed(violation: errors.Violation, part: Sequence[Prompt]) -> errors.Violation:
    """`items[3].parameters.top_p` as `questions.jsonl:7: parameters.top_p`."""
    found = re.fullmatch(r"items\[(\d+)\]\.?(.*)", violation.field)
    if found is None or int(found[1]) >= len(part):
        return violation
    place = part[int(found[1])].place
    return errors.Violation(f"{place}: {found[2]}" if found[2] else place, violation.description)
