"""Requests to prepare on the engine stream: a call of their own would cost more than the preparing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator

from ostinato import errors
from ostinato.v1 import engine_pb2

Answer = asyncio.Future[engine_pb2.PrepareResponse | errors.OstinatoError]


def check_prepared(prepared: engine_pb2.PrepareResponse | None, count: int) -> engine_pb2.PrepareResponse:
    """Raises ProtocolViolation for what could be numbered but not run. None: gRPC could not parse the message."""
    if prepared is None or len(prepared.items) != count:
        raise errors.ProtocolViolation("the service did not prepare what it was given")
    if not all(item.token_ids and item.parameters.max_new_tokens for item in prepared.items):
        raise errors.ProtocolViolation("the service prepared an item without tokens or parameters")
    return prepared


class Preparing:
    """Requests to prepare on their way out, and the futures of their answers. Closed while there is no stream."""

    def __init__(self) -> None:
        self._open = False
        self._last_id = 0
        self.unsent: deque[engine_pb2.PrepareRequest] = deque()
        """Some of them may have been given up."""
        self._answers: dict[int, Answer] = {}
        """By prepare id: those still awaited."""

    def open(self) -> None:
        self._open = True

    async def ask(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> engine_pb2.PrepareResponse:
        """Takes the request over. Raises what refused it, DeadlineExceeded, or EngineUnavailable if the stream is lost."""
        if not self._open:
            raise unreachable()
        self._last_id += 1
        request.prepare_id = self._last_id
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        self._answers[request.prepare_id] = answer
        self.unsent.append(request)
        late = (
            None
            if timeout is None
            else loop.call_later(timeout, _settle, answer, errors.DeadlineExceeded("the deadline passed while it was prepared"))
        )
        try:
            answered = await answer
        finally:
            self._answers.pop(request.prepare_id, None)
            if late is not None:
                late.cancel()
        if isinstance(answered, errors.OstinatoError):
            raise answered
        return answered

    def take(self, bytes_max: int) -> Iterator[engine_pb2.PrepareRequest]:
        """The next requests that are still awaited, up to about this many bytes."""
        size = 0
        while self.unsent and size < bytes_max:
            request = self.unsent.popleft()
            if request.prepare_id in self._answers:
                size += request.ByteSize()
                yield request

    def settle(self, responses: Iterable[engine_pb2.PrepareResponse]) -> None:
        """Set the answers. Those that were given up are dropped."""
        for response in responses:
            answer = self._answers.pop(response.prepare_id, None)
            if answer is not None:
                _settle(answer, errors.from_status(response.refused) if response.HasField("refused") else response)

    def lose(self) -> None:
        """The stream is closed: every answer is EngineUnavailable."""
        self._open = False
        self.unsent.clear()
        for answer in self._answers.values():
            _settle(answer, unreachable())
        self._answers.clear()


def _settle(answer: Answer, value: engine_pb2.PrepareResponse | errors.OstinatoError) -> None:
    if not answer.done():
        answer.set_result(value)


def unreachable() -> errors.EngineUnavailable:
    return errors.EngineUnavailable("the service cannot be reached", retry_after=1.0)
