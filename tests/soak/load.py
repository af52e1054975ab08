"""A load: jobs that many clients send to real programs. What each client saw goes into a history, which `checks` judges.

A job is a batch to be answered. A client sends it until it is: again after a refusal, which burns no number, and
again after a lost connection if it has a key.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import generation_pb2, types_pb2

from tests.simulation.history import Call, History
from tests.simulation.plan import SEEDS, Job

PAUSE_SECONDS = 0.05
"""Before a job is sent again."""
CALL_SECONDS = 60.0


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
        job = Job(number, 0.0, request, streamed=rng.random() < 0.5)
        yield job
        if job.key and rng.random() < repeated_share:
            yield job


def _item(rng: random.Random) -> types_pb2.Item:
    item = types_pb2.Item(text=f"Prompt {rng.randrange(40)}: Shanghai is")
    item.parameters.temperature = rng.choice((0.0, 0.7, 1.0))
    if rng.random() < 0.1:
        item.parameters.logprobs = 2
    if rng.random() < 0.1:
        item.parameters.stop.append("e ")
    return item


class Load:
    """Clients at one target, and all their calls."""

    def __init__(self, target: Callable[[], str], source: Iterator[Job], name: str = "load") -> None:
        self.history = History()
        self.calls = self.history.calls
        self._target, self._source, self._name = target, source, name
        self._over = False

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
            call = await self._call(client(), job)
            if call.error is None or (isinstance(call.error, errors.Disconnected) and not job.key):
                return  # without a key only the journal knows the outcome of a lost call
            if self._over and not isinstance(call.error, errors.Disconnected):
                return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _call(self, client: Client, job: Job) -> Call:
        call = self.history.call(job, f"{self._name}/{job.number}", time.monotonic())
        try:
            if job.streamed:
                async with aclosing(client.stream(call.request, timeout=CALL_SECONDS)) as events:
                    async for event in events:
                        call.hear(event, self._note(call))
            else:
                call.answer(await client.generate(call.request, timeout=CALL_SECONDS), self._note(call))
            call.ended_well = True
        except (errors.Refused, errors.Disconnected) as error:
            call.error = error
        finally:
            call.closed = self._note(call)
        return call

    def _note(self, call: Call) -> int:
        return self.history.note(time.monotonic(), call.number)
