"""What waits to be written to the sidecar, joined into as few messages as possible."""

from __future__ import annotations

import asyncio
from collections import deque

from ostinato.errors import SlowReader
from ostinato.v1 import engine_pb2
from serving.handlers import Coalescer


class Outbox:
    """What waits to be written to the sidecar, joined into as few messages as possible.

    1. Events of one run leave in order, and no timer delays any.
    2. A run's tokens that wait are one event, however often the engine reported.
    3. Bounded in bytes: a sidecar that does not read loses its stream. The engine never waits for it.
    """

    def __init__(self, bytes_max: int, frame_bytes_max: int) -> None:
        self._bytes_max, self._frame_bytes_max = bytes_max, frame_bytes_max
        self._waiting: deque[engine_pb2.RunEvent | engine_pb2.PrepareResponse] = deque()
        self._bytes = 0
        self._tokens: dict[int, tuple[engine_pb2.RunTokens, list[str]]] = {}
        """Tokens that wait, by run, and their texts. Texts are joined once, on leaving: a message keeps the memory of every
        text that was ever assigned to it."""
        self._welcome: engine_pb2.Welcome | None = None
        self._wake = asyncio.Event()
        self._coalescer = Coalescer()
        self._closed = False
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def put(self, message: engine_pb2.RunEvent | engine_pb2.PrepareResponse) -> None:
        """Adds a message, which the outbox then owns. Without effect once failed."""
        if self._error is not None:
            return
        self._bytes += message.ByteSize()
        if self._bytes > self._bytes_max:
            self.fail(SlowReader(f"more than {self._bytes_max} bytes wait to be read"))
            return
        if isinstance(message, engine_pb2.RunEvent) and message.HasField("tokens"):
            self._put_tokens(message)
        else:
            self._waiting.append(message)
        self._wake.set()

    def welcome(self, welcome: engine_pb2.Welcome) -> None:
        """To be part of the next message. Replaces one that waits."""
        self._welcome = welcome
        self._wake.set()

    def close(self) -> None:
        """Nothing more comes: `next` returns None once everything is taken."""
        self._closed = True
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Ends at once: `next` raises this, whatever waits. The first error counts."""
        self._error = self._error or error
        self._wake.set()

    async def next(self) -> engine_pb2.ExecuteResponse | None:
        """What waits, as far as it fits one message, as soon as there is anything. None: closed, and everything is taken."""
        while self._error is None:
            if self._waiting or self._welcome is not None:
                await self._coalescer.wait(lambda: self._bytes)
                if self._error is None:
                    return self._frame()
            elif self._closed:
                return None
            else:
                self._wake.clear()
                await self._wake.wait()
        raise self._error

    def _put_tokens(self, event: engine_pb2.RunEvent) -> None:
        found = self._tokens.get(event.run_id)
        if found is None:
            self._tokens[event.run_id] = (event.tokens, [event.tokens.text])
            self._waiting.append(event)
        else:
            tokens, texts = found
            tokens.token_ids.extend(event.tokens.token_ids)
            tokens.logprobs.extend(event.tokens.logprobs)
            texts.append(event.tokens.text)

    def _frame(self) -> engine_pb2.ExecuteResponse:
        frame = engine_pb2.ExecuteResponse(welcome=self._welcome)
        self._welcome = None
        taken = 0
        while self._waiting:
            message = self._waiting[0]
            run_id = message.run_id if isinstance(message, engine_pb2.RunEvent) and message.HasField("tokens") else None
            if run_id is not None:
                self._join_texts(run_id)
            size = message.ByteSize()
            if taken and taken + size > self._frame_bytes_max:
                break
            taken += size
            self._waiting.popleft()
            if isinstance(message, engine_pb2.PrepareResponse):
                frame.prepared.append(message)
                continue
            if run_id is not None:
                del self._tokens[run_id]
            frame.events.append(message)
        self._bytes = max(0, self._bytes - taken) if self._waiting else 0
        return frame

    def _join_texts(self, run_id: int) -> None:
        tokens, texts = self._tokens[run_id]
        if len(texts) > 1:
            tokens.text = "".join(texts)
            texts[:] = [tokens.text]
