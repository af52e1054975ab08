"""A load: what many clients ask for, and what each of them saw. Checks nothing; `checks` does.

A job is a batch to be answered. A client sends it until it is: again after a refusal, which burns no number, and
again after a lost connection if it has a key. Every call has a request_id of its own, so that the journal tells them apart.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import generation_pb2, types_pb2

PAUSE_SECONDS = 0.05
"""Before a job is sent again."""
CALL_SECONDS = 60.0
SEEDS = (0, 1, 42, 2**63, 2**64 - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A batch, without a request_id."""

    number: int
    request: generation_pb2.GenerateRequest
    streamed: bool

    @property
    def keyed(self) -> bool:
        return bool(self.request.idempotency_key)


def jobs(rng: random.Random, name: str, *, keyed_share: float = 0.5, repeated_share: float = 0.0) -> Iterator[Job]:
    """Without end: 1 to 4 items, keyed or not, seeded or not, streamed or not. Prompts repeat, so there are twins; a share of
    the keyed jobs is given to two clients."""
    for number in itertools.count():
        request = generation_pb2.GenerateRequest(items=[_item(rng) for _ in range(rng.randint(1, 4))])
        request.parameters.max_new_tokens = rng.randint(1, 24)
        if rng.random() < 0.5:
            request.parameters.seed = rng.choice(SEEDS)
        if rng.random() < keyed_share:
            request.idempotency_key = f"{name}-{number}"
        job = Job(number, request, streamed=rng.random() < 0.5)
        yield job
        if job.keyed and rng.random() < repeated_share:
            yield job


def _item(rng: random.Random) -> types_pb2.Item:
    item = types_pb2.Item(text=f"Prompt {rng.randrange(40)}: Shanghai is")
    item.parameters.temperature = rng.choice((0.0, 0.7, 1.0))
    if rng.random() < 0.1:
        item.parameters.logprobs = 2
    if rng.random() < 0.1:
        item.parameters.stop.append("e ")
    return item


@dataclass(slots=True, eq=False)
class Call:
    """One call, as its client saw it. Times are seconds of one monotonic clock."""

    job: Job
    request_id: str
    sent_at: float
    stamp: types_pb2.Stamp | None = None
    acknowledged_at: float = math.inf
    """When the client first knew that it had numbers."""
    repeated: bool = False
    results: list[types_pb2.Result] = field(default_factory=list)
    """Of a streamed batch in the order of arrival."""
    streamed: dict[int, list[int]] = field(default_factory=dict)
    """Token ids by sequence, those of a lost attempt discarded."""
    texts: dict[int, str] = field(default_factory=dict)
    restarts: int = 0
    faults: list[str] = field(default_factory=list)
    """What a stream must not do."""
    error: errors.OstinatoError | None = None

    @property
    def complete(self) -> bool:
        return self.stamp is not None and len(self.results) == self.stamp.count

    @property
    def refused(self) -> bool:
        """Whether it burned no number. A drain also ends the calls of what has a key and numbers."""
        return isinstance(self.error, errors.Refused) and not (self.job.keyed and isinstance(self.error, errors.Draining))


class Load:
    """Clients at one target, and all their calls."""

    def __init__(self, target: Callable[[], str], source: Iterator[Job], name: str = "load") -> None:
        self.calls: list[Call] = []
        self.given_up: list[Job] = []
        """Unkeyed jobs whose connection was lost: only the journal knows their outcome."""
        self._target, self._source, self._name = target, source, name
        self._over = False
        self._call_ids = itertools.count(1)

    def stop(self) -> None:
        """No new job is begun."""
        self._over = True

    async def run(self, clients: int) -> None:
        """Until the source is empty or `stop` was called, and every job is done."""
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client())

    async def _client(self) -> None:
        async with Client(self._target()) as client:
            for job in self._source:
                await self._answer(lambda: client, job)
                if self._over:
                    return

    async def _answer(self, client: Callable[[], Client], job: Job) -> None:
        while True:
            call = Call(job, f"{self._name}/{job.number}/{next(self._call_ids)}", time.monotonic())
            self.calls.append(call)
            request = generation_pb2.GenerateRequest()
            request.CopyFrom(job.request)
            request.request_id = call.request_id
            try:
                await (_stream if job.streamed else _ask)(client(), request, call)
                return
            except (errors.QueueFull, errors.EngineUnavailable, errors.JournalUnavailable, errors.Draining) as error:
                call.error = error
                if self._over:
                    return
            except errors.Disconnected as error:
                call.error = error
                if not job.keyed:
                    self.given_up.append(job)
                    return
            await asyncio.sleep(PAUSE_SECONDS)


async def _ask(client: Client, request: generation_pb2.GenerateRequest, call: Call) -> None:
    response = await client.generate(request, timeout=CALL_SECONDS)
    call.acknowledged_at = time.monotonic()
    call.stamp, call.results = response.stamp, list(response.results)


async def _stream(client: Client, request: generation_pb2.GenerateRequest, call: Call) -> None:
    async with aclosing(client.stream(request, timeout=CALL_SECONDS)) as events:
        async for event in events:
            match event.WhichOneof("event"):
                case "admitted":
                    call.acknowledged_at = time.monotonic()
                    call.stamp, call.repeated = event.admitted.stamp, event.admitted.repeated_key
                case "tokens":
                    for run in event.tokens.runs:
                        _take(call, run)
                case "restarted":
                    call.restarts += 1
                    call.streamed[event.restarted.sequence], call.texts[event.restarted.sequence] = [], ""
                case "finished":
                    call.results.append(event.finished)
                case "failed":
                    call.results.append(event.failed)
    if not call.complete:
        call.faults.append(f"the stream ended after {len(call.results)} results")


def _take(call: Call, run: generation_pb2.TokenRun) -> None:
    ids = call.streamed.setdefault(run.sequence, [])
    if run.first_token != len(ids):
        call.faults.append(f"sequence {run.sequence}: tokens from {run.first_token} after {len(ids)}")
    ids.extend(run.token_ids)
    call.texts[run.sequence] = call.texts.get(run.sequence, "") + run.text
