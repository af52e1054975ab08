"""`ostinato generate --output`: a file of prompts of any length, answered into a file, and gone on with after any interruption.

Every batch has a key, `RUN/FIRST-LAST/DIGEST`: the run's name (--key, else the name of the prompts' file), the numbers of its
prompts in the file, from 1, and the first half of the request's digest. What is in the output is not asked again; what the
sidecar was at work on, or had answered, is found by its key. So nothing is done twice, whichever end was lost, for as long as
the sidecar keeps keys. Of file and answers nothing but the batches under way is in memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from itertools import chain
from pathlib import Path
from typing import Any

from ostinato import digest, errors
from ostinato.cli import show
from ostinato.cli.answers import Answers
from ostinato.cli.batches import Asked, Batch, batches, outcomes
from ostinato.cli.session import Session
from ostinato.client import Client
from ostinato.v1 import generation_pb2

NAME_BYTES_MAX = 128


def run_name(key: str, file: Path) -> str:
    """Of a run that asks for this file."""
    return key or file.name.encode()[:NAME_BYTES_MAX].decode(errors="ignore")


async def bulk(session: Session, wanted: Asked, total: int, output: Path) -> bool:
    """Answers what is not answered, and sums it up. Whether every prompt has an output, and no second run differed. The key is
    the run's name."""
    tally = Tally()
    with closing(Answers(output)) as answers:
        try:
            async with session.client(wanted.max_response_bytes) as client:
                with show.progress("generate", total, wanted.progress) as done:
                    await _run(client, session, wanted, answers, tally, done)
        except OSError as error:
            show.note(f"error: {output}: {error.strerror}")
        except (asyncio.CancelledError, errors.OstinatoError):
            _interrupted(output, tally, total)
            raise
    if tally.items < total:
        _interrupted(output, tally, total)
        return False
    if session.json:
        show.as_json(tally.summary())
    else:
        show.card((name.replace("_", " "), _said(value)) for name, value in tally.summary().items())
    return tally.well


async def _run(
    client: Client, session: Session, wanted: Asked, answers: Answers, tally: Tally, done: Callable[[int], None]
) -> None:
    size = await wanted.size(client, session.timeout)

    def key(number: int, request: generation_pb2.GenerateRequest) -> str:
        first = (number - 1) * size + 1
        asked = digest.request_digest(request).hex()[:32]
        return f"{wanted.common.idempotency_key}/{first}-{first + len(request.items) - 1}/{asked}"

    source = batches(wanted.prompts(), wanted.common, size, key)
    first = await _skip(source, answers, tally, done)
    if first is None:
        answers.end()
        return
    newest, written = await _newest(client, session), first.number - 1
    async with aclosing(outcomes(client, session.timeout, chain([first], source), wanted.concurrency)) as answered:
        async for batch, response in answered:
            if batch.number != written + 1:
                continue  # one before it failed: it waits in the record
            for answer in answers.write(batch, response.results):
                tally.take(answer)
            written += 1
            tally.repeated(len(batch.part), None if newest is None else response.stamp.first_sequence <= newest)
            done(tally.items)


async def _skip(source: Iterator[Batch], answers: Answers, tally: Tally, done: Callable[[int], None]) -> Batch | None:
    """The first batch whose answers are not there."""
    for batch in source:
        kept = answers.kept(batch)
        if kept is None:
            return batch
        for answer in kept:
            tally.take(answer)
        tally.kept += len(kept)
        done(tally.items)
        await asyncio.sleep(0)  # a moment for an interrupt
    return None


async def _newest(client: Client, session: Session) -> int | None:
    """The newest sequence before this run: a batch with an older one was answered from the record. None: one may not know."""
    try:
        return (await client.head(timeout=session.timeout)).last_sequence
    except errors.PermissionDenied:
        return None


def _interrupted(output: Path, tally: Tally, total: int) -> None:
    show.note(f"interrupted: {tally.items} of {total} answers are in {output}; the same command goes on")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return str(value)


class Tally:
    """What came of a run, from all answers in the output."""

    def __init__(self) -> None:
        self.items = self.kept = self._tokens = self._prompt_tokens = 0
        self._ended: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._first = self._last = 0
        self._from_record: int | None = 0

    @property
    def well(self) -> bool:
        return self._ended["completed"] == self.items and not self._verdicts["diverged"]

    def take(self, answer: dict[str, Any]) -> None:
        """One answer, as it is written."""
        sequence, output = int(answer["sequence"]), answer.get("output", {})
        self.items += 1
        self._first, self._last = min(self._first or sequence, sequence), max(self._last, sequence)
        self._ended["completed" if "output" in answer else _reason(answer)] += 1
        self._tokens += len(output.get("token_ids", ()))
        self._prompt_tokens += output.get("prompt_tokens", 0)
        if "comparison" in answer:
            verdict = answer["comparison"].get("verdict", "not compared")
            self._verdicts[verdict.removeprefix("VERDICT_").lower()] += 1

    def repeated(self, items: int, from_record: bool | None) -> None:
        """Whether so many items had their numbers before this run; None: one may not know."""
        if from_record is None or self._from_record is None:
            self._from_record = None
        else:
            self._from_record += items * from_record

    def summary(self) -> dict[str, Any]:
        made: dict[str, Any] = {"items": self.items, "outcomes": dict(self._ended), "kept": self.kept}
        if self._from_record is not None:
            made["from_record"] = self._from_record
        made |= {"sequences": f"{self._first}..{self._last}", "prompt_tokens": self._prompt_tokens, "tokens": self._tokens}
        return made | ({"verified": dict(self._verdicts)} if self._verdicts else {})


def _reason(answer: dict[str, Any]) -> str:
    status = answer.get("status", {})
    return next((str(each["reason"]) for each in status.get("details", ()) if "reason" in each), f"code {status.get('code')}")
