"""Those who wait for a batch: one answer at the end, or a stream of events. What waits for a reader is kept serialised, so that
its size is known and small, and is counted in the call's account."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.held import COPIES, Account

MESSAGE_BYTES = 1 << 16
"""A message of tokens that has so many is closed: a client reads 4 MiB, and of a lost call gRPC keeps the message at work."""
PIECE_BYTES = 160
"""Held beside the bytes of whatever waits: objects."""
RUN_BYTES, RUN_FACTOR = 1024, 7
"""Of a run that is not serialised: held at worst beside its bytes, and for each of them."""


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

    def __init__(self, count: int, account: Account) -> None:
        self.sequences = range(0)
        self._count = count
        self._results: dict[int, bytes] = {}
        """By sequence: a response with this result alone. Serialised messages one behind the other are one message."""
        self._lost: errors.OstinatoError | None = None
        self._over = asyncio.Event()
        self._account = account
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None:
        if self._account.lost.done():
            return
        data = self._results[result.sequence] = generation_pb2.GenerateResponse(results=[result]).SerializeToString()
        if len(self._results) == self._count:
            self._over.set()
        self._account.add(COPIES * len(data))

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._over.set()

    def _forget(self) -> None:
        self._results.clear()
        self.lost(self._account.error)

    async def answer(self, stamp: types_pb2.Stamp) -> bytes:
        """A serialised GenerateResponse with the results ascending, when all have ended. Raises what the call was lost for."""
        await self._over.wait()
        if self._lost is not None:
            raise self._lost
        results = [self._results[sequence] for sequence in sorted(self._results)]
        return b"".join([generation_pb2.GenerateResponse(stamp=stamp).SerializeToString(), *results])


class Streamed:
    """Events that wait for a reader, serialised when they are taken."""

    wants_tokens = True

    def __init__(self, count: int, account: Account) -> None:
        self.sequences = range(0)
        self._open = count
        self._events: deque[_Tokens | _Event] = deque()
        self._lost: errors.OstinatoError | None = None
        self._something = asyncio.Event()
        self._account = account
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None:
        if self._account.lost.done():
            return
        last = self._events[-1] if self._events else None
        if not isinstance(last, _Tokens) or last.bytes > MESSAGE_BYTES:
            last = _Tokens()
            self._put(last)
        before = last.held
        last.add(run)
        self._account.change(last.held - before)

    def restarted(self, event: generation_pb2.Restarted) -> None:
        self._happened(generation_pb2.GenerateEvent(restarted=event))

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        completed = result.HasField("output")
        event = generation_pb2.GenerateEvent(finished=result) if completed else generation_pb2.GenerateEvent(failed=result)
        self._happened(event)

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._something.set()

    def _happened(self, event: generation_pb2.GenerateEvent) -> None:
        if not self._account.lost.done():
            waiting = _Event(event.SerializeToString())
            self._put(waiting)
            self._account.add(waiting.held)

    def _put(self, event: _Tokens | _Event) -> None:
        self._events.append(event)
        self._something.set()

    def _forget(self) -> None:
        self._events.clear()
        self._something.set()

    async def next(self) -> bytes | None:
        """The next GenerateEvent, serialised; None: every item has ended and was told. Raises SlowReader; and what the call was
        lost for, behind what had come before."""
        while not self._events and self._open and self._lost is None and not self._account.lost.done():
            self._something.clear()
            await self._something.wait()
        if self._account.lost.done():
            raise self._account.error
        if self._events:
            event = self._events.popleft()
            self._account.drop(event.held)
            return event.data()
        if self._lost is not None:
            raise self._lost
        return None


class _Event:
    """An event that waits as it will be written."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.held = COPIES * len(data) + PIECE_BYTES

    def data(self) -> bytes:
        return self._data


class _Run:
    """Tokens of one item and attempt: the first run as it came, which is mostly all, or else bytes, which are smaller. To
    append to a message's text in place would keep every earlier text too."""

    def __init__(self, first: generation_pb2.TokenRun) -> None:
        self.attempt = first.attempt
        self._first: generation_pb2.TokenRun | None = first
        self._size = first.ByteSize()
        self._pieces: list[bytes] = []
        self.held = RUN_BYTES + RUN_FACTOR * self._size

    def add(self, run: generation_pb2.TokenRun) -> int:
        """What continues it. Bytes."""
        self.pack()
        data = run.SerializeToString()
        self._pieces.append(data)
        self.held += PIECE_BYTES + len(data)
        return len(data)

    def pack(self) -> None:
        """It waits: to bytes."""
        if self._first is not None:
            self._pieces.append(self._first.SerializeToString())
            self._first, self.held = None, PIECE_BYTES + self._size

    def put_into(self, tokens: generation_pb2.Tokens) -> None:
        if self._first is not None:
            tokens.runs.append(self._first)
            return
        whole, *others = map(generation_pb2.TokenRun.FromString, self._pieces)
        texts = [whole.text]
        for run in others:
            whole.token_ids.extend(run.token_ids)
            whole.logprobs.extend(run.logprobs)
            texts.append(run.text)
        whole.text = "".join(texts)
        tokens.runs.append(whole)


class _Tokens:
    """A message of tokens that grows while it waits."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._newest: dict[int, _Run] = {}
        """By sequence."""
        self.bytes = self.held = 0
        """About as large as it will be, and held for it at worst."""

    def add(self, run: generation_pb2.TokenRun) -> None:
        """Into the run that it continues, if there is one of the same attempt."""
        newest = self._newest.get(run.sequence)
        if newest is None or newest.attempt != run.attempt:
            newest = self._newest[run.sequence] = _Run(run)
            self._runs.append(newest)
            self.held += newest.held
            self.bytes += run.ByteSize()
        else:
            before = newest.held
            self.bytes += newest.add(run)
            self.held += newest.held - before
        if self.bytes > MESSAGE_BYTES:
            for each in self._runs:
                each.pack()
            self.held = sum(each.held for each in self._runs)

    def data(self) -> bytes:
        event = generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens())
        for run in self._runs:
            run.put_into(event.tokens)
        return event.SerializeToString()
