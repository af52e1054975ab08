"""Those who wait for a batch: one answer at the end, or a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2


class Call(Protocol):
    """Told what happens to its items, on the event loop; never blocks it."""

    wants_tokens: bool
    sequences: range
    """The items that it waits for; empty until they are known."""

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None: ...

    def lost(self, error: errors.OstinatoError) -> None:
        """The call is over without an outcome of its items. The first error counts."""
        ...


class Unary:
    """Collects the results of a whole batch."""

    wants_tokens = False

    def __init__(self, count: int) -> None:
        self.sequences = range(0)
        self._count = count
        self._results: dict[int, types_pb2.Result] = {}
        self._lost: errors.OstinatoError | None = None
        self._over = asyncio.Event()

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None:
        self._results[result.sequence] = result
        if len(self._results) == self._count:
            self._over.set()

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._over.set()

    async def results(self) -> list[types_pb2.Result]:
        """When all have ended; ascending. Raises what the call was lost for."""
        await self._over.wait()
        if self._lost is not None:
            raise self._lost
        return [self._results[sequence] for sequence in sorted(self._results)]


class Streamed:
    """Events that wait for a reader. One that falls tokens_max behind has lost its call."""

    wants_tokens = True

    def __init__(self, count: int, tokens_max: int) -> None:
        self.sequences = range(0)
        self._open = count
        self._tokens_max = tokens_max
        self._events: list[generation_pb2.GenerateEvent] = []
        self._tokens = 0
        self._runs: dict[int, generation_pb2.TokenRun] = {}
        """Of the last message, by sequence."""
        self._lost: errors.OstinatoError | None = None
        self._something = asyncio.Event()
        self.overrun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when too much waits."""

    def tokens(self, run: generation_pb2.TokenRun) -> None:
        self._tokens += len(run.token_ids)
        if self._tokens > self._tokens_max and not self.overrun.done():
            self.overrun.set_result(None)
        if self.overrun.done():
            return
        if not (self._events and self._events[-1].HasField("tokens")):
            self._put(generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens()))
            self._runs = {}
        self._merge(self._events[-1].tokens, run)

    def _merge(self, tokens: generation_pb2.Tokens, run: generation_pb2.TokenRun) -> None:
        """Adds a run to a message, into the run that it continues if there is one of the same attempt."""
        earlier = self._runs.get(run.sequence)
        if earlier is None or earlier.attempt != run.attempt:
            tokens.runs.append(run)
            self._runs[run.sequence] = tokens.runs[-1]
            return
        earlier.token_ids.extend(run.token_ids)
        earlier.logprobs.extend(run.logprobs)
        earlier.text += run.text

    def restarted(self, event: generation_pb2.Restarted) -> None:
        self._put(generation_pb2.GenerateEvent(restarted=event))

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        completed = result.HasField("output")
        self._put(generation_pb2.GenerateEvent(finished=result) if completed else generation_pb2.GenerateEvent(failed=result))

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._something.set()

    def _put(self, event: generation_pb2.GenerateEvent) -> None:
        self._events.append(event)
        self._something.set()

    async def take(self) -> Iterable[generation_pb2.GenerateEvent]:
        """All that came since the last take; nothing: every item has ended and was told. Raises SlowReader; and what the call
        was lost for, behind what had come before."""
        while not self._events and self._open and self._lost is None:
            self._something.clear()
            await self._something.wait()
        if self.overrun.done():
            raise slow(self._tokens_max)
        if not self._events and self._lost is not None:
            raise self._lost
        events, self._events, self._tokens = self._events, [], 0
        return events


def slow(tokens_max: int) -> errors.SlowReader:
    """The reader fell too far behind."""
    return errors.SlowReader(f"more than {tokens_max} tokens waited to be read")
