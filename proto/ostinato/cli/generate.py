"""`ostinato generate`: prompts from everywhere, answers as a table or as JSON; see `bulk` for files of any length."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato import requests
from ostinato.cli import files, options, prompts, show
from ostinato.cli.batches import Asked, batches, outcomes
from ostinato.cli.bulk import bulk, run_name
from ostinato.cli.prompts import Prompt
from ostinato.cli.session import Session, usage
from ostinato.cli.stream import stream_one
from ostinato.client import DEFAULT_RESPONSE_BYTES
from ostinato.v1 import generation_pb2, types_pb2

NO_PROMPT = "no prompt: give some as arguments, with --file, or with - on stdin"


def generate(
    session: Session,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; - is a prompt a line of stdin.")] = None,
    file: options.File = None,
    output: options.Output = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Copies of each prompt; --seed is the same for all.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="A text is a user's message, not a text to go on with.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in a request, capped by the model's limit.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once. With 1, numbers ascend with the prompts.")] = 1,
    key: options.Key = None,
    request_id: Annotated[str, typer.Option(help="Label for logs and traces.", show_default=False)] = "",
    require_grade: options.RequireGrade = None,
    verify: Annotated[bool, typer.Option("--verify", help="Make each answer twice, and fail if one differs.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the tokens of one prompt as they come.")] = False,
    progress: Annotated[bool | None, typer.Option(help="Progress on stderr. Default: if it is a terminal.")] = None,
    max_response_bytes: options.MaxResponseBytes = DEFAULT_RESPONSE_BYTES,
    **sampling: Annotated[Any, options.SAMPLING],
) -> Coroutine[Any, Any, bool]:
    """Answers prompts: a table, or with --json a line for each result.

    Without --seed every answer gets a seed of its own, which is shown and gives the same answer when asked for.
    With --key, the same command again returns the recorded answers; of several requests, the second has KEY/2, and so on.
    With --output, --file may have any length, and the same command goes on where it was interrupted.
    """
    if key == "":
        raise typer.BadParameter("--key: is empty")
    with usage():
        common = requests.batch(
            types_pb2.Item(), key or "", request_id, require_grade, options.sampling(sampling), verify=verify
        )
    asked = Asked(partial(_read, texts or [], file, n, chat), common, batch, concurrency, progress, max_response_bytes)
    if output is not None:
        return _bulk(session, asked, output, file, alone=not texts and not stream)
    wanted = list(asked.prompts())
    if not wanted:
        raise typer.BadParameter(NO_PROMPT)
    if stream:
        if len(wanted) > 1:
            raise typer.BadParameter(f"--stream: shows one prompt, not {len(wanted)}")
        common.items[0].CopyFrom(wanted[0].item)
        return stream_one(session, common, max_response_bytes)
    return _generate(session, wanted, asked)


def _bulk(session: Session, asked: Asked, output: Path, file: Path | None, *, alone: bool) -> Coroutine[Any, Any, bool]:
    """After a first look at every line: what is wrong with one is said before anything is sent."""
    if file is None or str(file) == files.STDIN or not alone:
        raise typer.BadParameter("--output: takes the prompts of --file, which is read twice, and of nothing else")
    asked.common.idempotency_key = run_name(asked.common.idempotency_key, file)
    total = sum(1 for _ in asked.prompts())
    if not total:
        raise typer.BadParameter(NO_PROMPT)
    return bulk(session, asked, total, output)


async def _generate(session: Session, wanted: Sequence[Prompt], asked: Asked) -> bool:
    """Sends the prompts and prints their results, in order. Whether every item has an output."""
    results: list[types_pb2.Result] = []
    common = asked.common
    async with session.client(asked.max_response_bytes) as client:
        size = await asked.size(client, session.timeout) if len(wanted) > 1 else 1
        source = batches(wanted, common, size, partial(_key, common.idempotency_key))
        answered = outcomes(client, session.timeout, source, asked.concurrency)
        try:
            one = len(wanted) <= size  # request: there is nothing between its beginning and its end
            with show.progress("generate", len(wanted), False if one and asked.progress is None else asked.progress) as done:
                async with aclosing(answered):
                    async for _, response in answered:
                        results.extend(response.results)
                        done(len(results))
                        if session.json:
                            for result in response.results:
                                show.as_json(result)
        finally:
            if results and not session.json:
                show.table(show.RESULT_COLUMNS, map(show.result, results))
                if common.verify:
                    show.note(f"verified: {show.verdicts(results)}")
    return all(result.HasField("output") and result.comparison.verdict != types_pb2.VERDICT_DIVERGED for result in results)


def _read(texts: Sequence[str], file: Path | None, n: int, chat: bool) -> Iterator[Prompt]:
    given: Iterable[Prompt] = prompts.from_arguments(texts)
    if file is not None:
        given = chain(given, prompts.from_file(file))
    for each in given:
        for _ in range(n):
            yield prompts.as_chat(each) if chat else each


def _key(key: str, number: int, _: generation_pb2.GenerateRequest) -> str:
    return f"{key}/{number}" if key and number > 1 else key
