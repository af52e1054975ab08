"""What waits to be written to the sidecar: everything that happened since the last message, made into as few as will do."""

from __future__ import annotations

import asyncio
from collections import deque

from ostinato.errors import SlowReader
from ostinato.v1 import engine_pb2
from serving.handlers import coalesce


class Outbox:
    """1. Events of one run leave in order, and no timer holds any back.
    2. A run's tokens that wait are one event, however often the engine reported.
    3. Bounded in bytes: a sidecar that does not read loses its stream; the engine never waits for it.
    """

    def __init__(self, bytes_max: int, frame_bytes_max: int) -> None:
        self._bytes_max, self._frame_bytes_max = bytes_max, frame_bytes_max
        self._events: deque[engine_pb2.RunEvent | engine_pb2.PrepareResponse] = deque()
        self._bytes = 0
        self._tokens: dict[int, engine_pb2.RunEvent] = {}
        """Tokens that wait, by run. The text of one in `_texts` is joined when it leaves."""
        self._texts: dict[int, list[str]] = {}
        self._welcome: engine_pb2.Welcome | None = None
        self._bell = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def answer(self, prepared: engine_pb2.PrepareResponse) -> None:
        """As `put`, the answer to a request."""
        if self._has_room(prepared.ByteSize()):
            self._events.append(prepared)
            self._bell.set()

    def put(self, event: engine_pb2.RunEvent) -> None:
        """Add an event, which is the outbox's from now on. Without effect once failed."""
        if not self._has_room(event.ByteSize()):
            return
        waiting = self._tokens.get(event.run_id)
        if waiting is not None and event.HasField("tokens"):
            self._append(event.run_id, waiting.tokens, event.tokens)
        else:
            self._events.append(event)
            if event.HasField("tokens"):
                self._tokens[event.run_id] = event
        self._bell.set()

    def _has_room(self, size: int) -> bool:
        """For so many bytes more; without room it has failed."""
        if self._error is None:
            self._bytes += size
            if self._bytes > self._bytes_max:
                self.fail(SlowReader(f"more than {self._bytes_max} bytes wait to be read"))
        return self._error is None

    def welcome(self, welcome: engine_pb2.Welcome) -> None:
        """To stand in the next message; a newer one replaces one that waits."""
        self._welcome = welcome
        self._bell.set()

    def close(self) -> None:
        """Nothing more comes: `next` returns None once all is written."""
        self._closed = True
        self._bell.set()

    def fail(self, error: Exception) -> None:
        """End at once: `next` raises this, whatever waits. The first error counts."""
        self._error = self._error or error
        self._bell.set()

    async def next(self) -> engine_pb2.ExecuteResponse | None:
        """Everything that waits, as far as it fits one message, as soon as anything does. None: closed, and all is written."""
        while self._error is None:
            if self._events or self._welcome is not None:
                await coalesce(lambda: self._bytes)
                if self._error is None:
                    return self._frame()
            elif self._closed:
                return None
            else:
                self._bell.clear()
                await self._bell.wait()
        raise self._error

    def _frame(self) -> engine_pb2.ExecuteResponse:
        frame = engine_pb2.ExecuteResponse(welcome=self._welcome)
        self._welcome = None
        taken = 0
        while self._events:
            event = self._events[0]
            if isinstance(event, engine_pb2.RunEvent) and event.HasField("tokens") and event.run_id in self._texts:
                event.tokens.text = "".join(self._texts.pop(event.run_id))
            size = event.ByteSize()
            if taken and taken + size > self._frame_bytes_max:
                break
            taken += size
            self._events.popleft()
            if isinstance(event, engine_pb2.PrepareResponse):
                frame.prepared.append(event)
                continue
            if event.HasField("tokens"):
                del self._tokens[event.run_id]
            frame.events.append(event)
        self._bytes = max(0, self._bytes - taken) if self._events else 0
        return frame

    def _append(self, run_id: int, tokens: engine_pb2.RunTokens, more: engine_pb2.RunTokens) -> None:
        tokens.token_ids.extend(more.token_ids)
        tokens.logprobs.extend(more.logprobs)
        # Joined once: a message keeps every text that it was ever given.
        self._texts.setdefault(run_id, [tokens.text]).append(more.text)
