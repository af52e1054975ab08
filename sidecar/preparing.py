"""Requests to prepare on the engine stream: a call of their own would cost more than the preparing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from ostinato import errors
from ostinato.v1 import engine_pb2

Answer = asyncio.Future[engine_pb2.PrepareResponse]


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
        self.open = False
        self._last_id = 0
        self.unsent: deque[engine_pb2.PrepareRequest] = deque()
        """Some of them may have been given up."""
        self._answers: dict[int, tuple[Answer, int]] = {}
        """By prepare id: those not answered yet, each with the number of its items."""

    def ask(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> Answer:
        """Takes the request over. To give it up, cancel its answer.

        The answer fails with what refused the request, DeadlineExceeded, ProtocolViolation for a useless response, or
        EngineUnavailable if there is no stream or it is lost.
        """
        self._last_id += 1
        request.prepare_id = self._last_id
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        if not self.open:
            answer.set_exception(unreachable())
            return answer
        self._answers[request.prepare_id] = answer, len(request.items)
        self.unsent.append(request)
        if timeout is not None:
            late = loop.call_later(timeout, _fail, answer, errors.DeadlineExceeded("the deadline passed while it was prepared"))
            answer.add_done_callback(lambda _: late.cancel())
        return answer

    def take(self, bytes_max: int) -> list[engine_pb2.PrepareRequest]:
        """The next requests that are still awaited, up to about this many bytes."""
        taken, size = list[engine_pb2.PrepareRequest](), 0
        while self.unsent and size < bytes_max:
            request = self.unsent.popleft()
            if self._answers[request.prepare_id][0].done():
                del self._answers[request.prepare_id]
            else:
                size += request.ByteSize()
                taken.append(request)
        return taken

    def settle(self, responses: Iterable[engine_pb2.PrepareResponse]) -> None:
        """Set the answers. Those that were given up are dropped."""
        for response in responses:
            answer, count = self._answers.pop(response.prepare_id, (None, 0))
            if answer is None or answer.done():
                continue
            try:
                if response.HasField("refused"):
                    raise errors.from_status(response.refused)
                answer.set_result(check_prepared(response, count))
            except errors.OstinatoError as error:
                answer.set_exception(error)

    def lose(self) -> None:
        """The stream is closed: every answer is EngineUnavailable."""
        self.open = False
        self.unsent.clear()
        for answer, _ in self._answers.values():
            _fail(answer, unreachable())
        self._answers.clear()


def _fail(answer: Answer, error: errors.OstinatoError) -> None:
    if not answer.done():
        answer.set_exception(error)


def unreachable() -> errors.EngineUnavailable:
    return errors.EngineUnavailable("the service cannot be reached", retry_after=1.0)
