"""What waits to be written to the sidecar, joined into as few messages as possible."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ostinato.errors import SlowReader
from ostinato.v1 import engine_pb2
from serving.handlers import Coalescer


class Outbox:
    """What waits to be written to the sidecar, joined into as few messages as possible.

    1. Events of one run leave in order, and no timer delays any.
    2. A run's tokens that wait are one event, however often the engine reported.
    3. Bounded in bytes: a sidecar that does not read loses its stream. The engine never waits for it.
    """

    def __init__(self, bytes_max: int, frame_bytes_max: int, alone: Callable[[], bool] = lambda: False) -> None:
        """`alone`: whether nothing else is under way."""
        self._bytes_max, self._frame_bytes_max = bytes_max, frame_bytes_max
        self._waiting: deque[engine_pb2.RunEvent | engine_pb2.PrepareResponse] = deque()
        self._bytes = 0
        self._tokens: dict[int, tuple[engine_pb2.RunTokens, list[str]]] = {}
        """Tokens that wait, by run, and their texts. Texts are joined once, on leaving: a message keeps the memory of every
        text that was ever assigned to it."""
        self._welcome: engine_pb2.Welcome | None = None
        self._coalescer = Coalescer(alone)
        self._closed = False
        self.error: Exception | None = None
        """Why it has failed; None: it has not."""

    def put(self, message: engine_pb2.RunEvent | engine_pb2.PrepareResponse) -> None:
        """Adds a message, which the outbox then owns. Without effect once failed."""
        if self.error is not None:
            return
        self._bytes += message.ByteSize()
        if self._bytes > self._bytes_max:
            self.fail(SlowReader(f"more than {self._bytes_max} bytes wait to be read"))
            return
        if isinstance(message, engine_pb2.RunEvent) and message.HasField("tokens"):
            self._put_tokens(message)
        else:
            self._waiting.append(message)
        self._coalescer.add()

    def welcome(self, welcome: engine_pb2.Welcome) -> None:
        """To be part of the next message. Replaces one that waits."""
        self._welcome = welcome
        self._coalescer.add()

    def close(self) -> None:
        """Nothing more comes: `next` returns None once everything is taken."""
        self._closed = True
        self._coalescer.add()

    def fail(self, error: Exception) -> None:
        """Ends at once: `next` raises this, whatever waits. The first error counts."""
        self.error = self.error or error
        self._coalescer.add()

    def ready(self) -> asyncio.Future[None]:
        """Done when `next` should be called."""
        urgent = self._welcome is not None or self._closed or self.error is not None
        return self._coalescer.ready(len(self._waiting) + urgent)

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

    def next(self) -> engine_pb2.ExecuteResponse | None:
        """What waits, as far as it fits one message. None: closed, and everything is taken. Raises what it failed with."""
        if self.error is not None:
            raise self.error
        if self._closed and not self._waiting and self._welcome is None:
            return None
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
