"""What a streamed call is told. What waits for a slow reader is merged and counted in the call's account."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2
from serving.handlers import written

from sidecar.answers import Waiter
from sidecar.held import COPIES, Account

MESSAGE_BYTES = 1 << 16
"""A message of tokens is closed at this size. Clients read 4 MiB; gRPC keeps one message of a lost call in memory."""
PIECE_BYTES = 160
"""Memory of a waiting piece beside its bytes: Python objects."""
RUN_BYTES, RUN_FACTOR = 1024, 7
"""Memory of a run that is not serialised, at worst: constant, and for each of its bytes."""


class StreamWaiter(Waiter):
    """Writes events as its reader takes them. Tokens that wait are merged."""

    wants_tokens = True

    def __init__(self, count: int, account: Account, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._open = count
        self._events: deque[_Tokens | bytes] = deque()
        self._lost: errors.OstinatoError | None = None
        self._changed = asyncio.Event()
        self._account, self._write = account, write
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None:
        if self._account.error is not None:
            return
        last = self._events[-1] if self._events else None
        if not isinstance(last, _Tokens) or last.bytes > MESSAGE_BYTES:
            last = _Tokens()
            self._put(last)
        before = last.held
        last.add(run)
        self._account.add(last.held - before)

    def restarted(self, event: generation_pb2.Restarted) -> None:
        self._put_event(generation_pb2.GenerateEvent(restarted=event))

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        completed = result.HasField("output")
        event = generation_pb2.GenerateEvent(finished=result) if completed else generation_pb2.GenerateEvent(failed=result)
        self._put_event(event)

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._changed.set()

    def _put_event(self, event: generation_pb2.GenerateEvent) -> None:
        if self._account.error is None:
            data = event.SerializeToString()
            self._put(data)
            self._account.add(_held(data))

    def _put(self, event: _Tokens | bytes) -> None:
        self._events.append(event)
        self._changed.set()

    def _forget(self) -> None:
        self._events.clear()
        self._changed.set()

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> None:
        """Writes serialised events until each item has ended. Raises SlowReader, too."""
        admitted = generation_pb2.Admitted(stamp=stamp, repeated_key=repeated)
        event: bytes | None = generation_pb2.GenerateEvent(admitted=admitted).SerializeToString()
        while event is not None:
            await written(self._write(event), lost=self._account.lost)
            event = await self.next()

    async def next(self) -> bytes | None:
        """The next serialised GenerateEvent; None: every item has ended. An error comes after the events before it."""
        while not self._events and self._open and self._lost is None and self._account.error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._account.error is not None:
            raise self._account.error
        if self._events:
            event = self._events.popleft()
            self._account.add(-(event.held if isinstance(event, _Tokens) else _held(event)))
            return event.data() if isinstance(event, _Tokens) else event
        if self._lost is not None:
            raise self._lost
        return None


def _held(data: bytes) -> int:
    """Memory of a serialised event that waits."""
    return COPIES * len(data) + PIECE_BYTES


class _Run:
    """Tokens of one item and attempt. The first piece stays a message, which is mostly all; further pieces are kept as bytes,
    which are smaller. A message to whose text is appended would keep every earlier text."""

    def __init__(self, first: generation_pb2.TokenRun) -> None:
        self.attempt = first.attempt
        self._first: generation_pb2.TokenRun | None = first
        self._size = first.ByteSize()
        self._pieces: list[bytes] = []
        self.held = RUN_BYTES + RUN_FACTOR * self._size

    def add(self, run: generation_pb2.TokenRun) -> int:
        """Append the piece that continues the run. Its bytes."""
        self.pack()
        data = run.SerializeToString()
        self._pieces.append(data)
        self.held += PIECE_BYTES + len(data)
        return len(data)

    def pack(self) -> None:
        """Serialise the first piece: the run will wait for longer."""
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
        """About its serialised size, and the memory that it takes at worst."""

    def add(self, run: generation_pb2.TokenRun) -> None:
        """Merge it with the run that it continues, if that is of the same attempt."""
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
