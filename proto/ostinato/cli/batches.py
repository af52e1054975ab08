"""Prompts as requests, a bounded number of them at once, answers in the prompts' order."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

from ostinato import errors
from ostinato.cli.prompts import Prompt
from ostinato.client import Client
from ostinato.v1 import generation_pb2

Outcome = generation_pb2.GenerateResponse | errors.OstinatoError


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked, and how."""

    prompts: Callable[[], Iterator[Prompt]]
    """From the beginning each time."""
    common: generation_pb2.GenerateRequest
    """All but the prompts."""
    batch: int
    concurrency: int
    progress: bool | None
    max_response_bytes: int

    async def size(self, client: Client, timeout: float | None) -> int:
        """Of a batch: `batch`, or the model's limit."""
        return min(self.batch, (await client.model(timeout=timeout)).limits.batch_items_max or self.batch)


class Batch(NamedTuple):
    """A part of the prompts, and what asks for it."""

    number: int
    """From 1."""
    part: Sequence[Prompt]
    request: generation_pb2.GenerateRequest


def batches(
    wanted: Iterable[Prompt],
    common: generation_pb2.GenerateRequest,
    size: int,
    key: Callable[[int, generation_pb2.GenerateRequest], str],
) -> Iterator[Batch]:
    """Requests like `common`, each with its part of the prompts, taken as they are wanted. `key` names each by its number and
    itself, for a key stands for one request."""
    source = iter(wanted)
    for number in count(1):
        part = list(islice(source, size))
        if not part:
            return
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(common)
        del request.items[:]
        request.items.extend(each.item for each in part)
        request.idempotency_key = key(number, request)
        yield Batch(number, part, request)


async def outcomes(
    client: Client, timeout: float | None, wanted: Iterable[Batch], concurrency: int
) -> AsyncGenerator[tuple[Batch, generation_pb2.GenerateResponse], None]:
    """The answer to each batch, in order; then raises the first failure. After it nothing more begins, but what runs ends."""
    waiting = iter(wanted)
    running: deque[tuple[Batch, asyncio.Task[Outcome]]] = deque()
    failure: errors.OstinatoError | None = None
    try:
        while True:
            if failure is None:
                for each in islice(waiting, concurrency - len(running)):
                    running.append((each, asyncio.create_task(_send(client, timeout, each))))
            if not running:
                break
            batch, task = running[0]
            outcome = await task
            running.popleft()
            if isinstance(outcome, errors.OstinatoError):
                failure = failure or outcome
            else:
                yield batch, outcome
    finally:
        for _, task in running:
            task.cancel()
    if failure is not None:
        raise failure


async def _send(client: Client, timeout: float | None, batch: Batch) -> Outcome:
    try:
        return await client.generate(batch.request, timeout=timeout)
    except errors.InvalidRequest as error:
        return errors.InvalidRequest(error.message, violations=[_placed(each, batch.part) for each in error.violations])
    except errors.OstinatoError as error:
        return error


def _placed(violation: errors.Violation, part: Sequence[Prompt]) -> errors.Violation:
    """`items[3].parameters.top_p` as `questions.jsonl:7: parameters.top_p`."""
    found = re.fullmatch(r"items\[(\d+)\]\.?(.*)", violation.field)
    if found is None or int(found[1]) >= len(part):
        return violation
    place = part[int(found[1])].place
    return errors.Violation(f"{place}: {found[2]}" if found[2] else place, violation.description)
