"""What is prepared over the engine stream: requests on their way out, and those who wait for the answers.

A call of its own would cost more than the preparing. Requests that wait for a write leave in one message with whatever else
waits for it; each is answered, refused and given up by itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator

from ostinato import errors
from ostinato.v1 import engine_pb2

SHORT_BYTES = 4096
"""Of a request. What is longer may take a while and has a call, and in the service a thread, of its own."""

Answer = asyncio.Future[engine_pb2.PrepareResponse | errors.OstinatoError]


def is_short(request: engine_pb2.PrepareRequest) -> bool:
    """Whether it keeps nobody waiting: little text, and no grammar to compile."""
    formats = request.parameters.HasField("response_format") or any(
        item.parameters.HasField("response_format") for item in request.items
    )
    return request.ByteSize() <= SHORT_BYTES and not formats


def check_prepared(prepared: engine_pb2.PrepareResponse | None, count: int) -> engine_pb2.PrepareResponse:
    """The answer. Raises ProtocolViolation for what could be numbered, but never run. None: gRPC could not parse it."""
    if prepared is None or len(prepared.items) != count:
        raise errors.ProtocolViolation("the service did not prepare what it was given")
    if not all(item.token_ids and item.parameters.max_new_tokens for item in prepared.items):
        raise errors.ProtocolViolation("the service prepared an item without tokens or parameters")
    return prepared


class Preparing:
    """Of one link. Closed until there is a stream, and after it."""

    def __init__(self) -> None:
        self._open = False
        self._last_id = 0
        self._unsent: deque[engine_pb2.PrepareRequest] = deque()
        self._answers: dict[int, Answer] = {}
        """Of all that somebody waits for."""

    def open(self) -> None:
        self._open = True

    async def ask(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> engine_pb2.PrepareResponse:
        """The answer to this request, which is ours from now on. Raises what refused it, DeadlineExceeded, or EngineUnavailable
        where the stream is lost."""
        if not self._open:
            raise _lost()
        self._last_id += 1
        request.prepare_id = self._last_id
        answer: Answer = asyncio.get_running_loop().create_future()
        self._answers[request.prepare_id] = answer
        self._unsent.append(request)
        try:
            async with asyncio.timeout(timeout):
                answered = await answer
        except TimeoutError:
            raise errors.DeadlineExceeded("the deadline passed while it was prepared") from None
        finally:
            self._answers.pop(request.prepare_id, None)
        if isinstance(answered, errors.OstinatoError):
            raise answered
        return answered

    def __len__(self) -> int:
        """Those to be sent, with some that nobody waits for any more."""
        return len(self._unsent)

    def take(self, bytes_max: int) -> Iterator[engine_pb2.PrepareRequest]:
        """The next ones that somebody waits for, until there are so many bytes of them."""
        size = 0
        while self._unsent and size < bytes_max:
            request = self._unsent.popleft()
            if request.prepare_id in self._answers:
                size += request.ByteSize()
                yield request

    def settle(self, responses: Iterable[engine_pb2.PrepareResponse]) -> None:
        """Those that nobody waits for any more are dropped."""
        for response in responses:
            answer = self._answers.pop(response.prepare_id, None)
            if answer is not None and not answer.done():
                answer.set_result(errors.from_status(response.refused) if response.HasField("refused") else response)

    def lose(self) -> None:
        """The stream is gone, and every answer with it."""
        self._open = False
        self._unsent.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(_lost())
        self._answers.clear()


def _lost() -> errors.EngineUnavailable:
    return errors.EngineUnavailable("the service cannot be reached", retry_after=1.0)
