"""The Engine service: RPCs to what does the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from ostinato.errors import EngineUnavailable, NotBuilt, QueueFull
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2

from service.description import Describer
from service.engines.base import Vocabulary
from service.engines.huggingface import archive
from service.prepare import Preparer
from service.stream import Streams

NAME = "ostinato.v1.Engine"
RETRY_SECONDS = 1.0
HEAVY_BYTES = 4096
"""Of items: what is tokenised without a thread takes about a millisecond at most."""

Context = grpc.aio.ServicerContext[Any, Any]
CHUNK_BYTES = 1 << 20
"""Of the tokenizer's files."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ready:
    """All that exists once the engine is loaded and tested."""

    describer: Describer
    vocabulary: Vocabulary
    preparer: Preparer
    streams: Streams


class Workers:
    """Threads for what would hold the event loop up: a bounded number, with a bounded queue."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._max = threads + queue_max
        self._now = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done in a thread. Raises QueueFull."""
        if self._now >= self._max:
            raise QueueFull(f"{self._now} requests are being prepared", retry_after=RETRY_SECONDS)
        self._now += 1
        done = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # Not when the caller stops waiting: the thread does not.
        done.add_done_callback(self._count_down)
        return await asyncio.shield(done)

    def _count_down(self, done: asyncio.Future[T]) -> None:
        self._now -= 1
        if not done.cancelled():
            done.exception()  # somebody has to look at it, and the caller may have left

    def close(self) -> None:
        """Drop what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """UNAVAILABLE until `ready` is set."""

    def __init__(self, workers: Workers) -> None:
        self.ready: Ready | None = None
        self._workers = workers

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Context) -> engine_pb2.DescribeResponse:
        return self._ready().describer.response()

    async def Prepare(self, request: engine_pb2.PrepareRequest, context: Context) -> engine_pb2.PrepareResponse:
        preparer = self._ready().preparer
        return await self._do(_heavy(request.items, request.parameters), lambda: preparer.prepare(request))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        preparer = self._ready().preparer
        return await self._do(_heavy(request.items), lambda: preparer.tokenize(request))

    async def GetTokenizer(
        self, request: engine_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[engine_pb2.GetTokenizerResponse]:
        vocabulary = self._ready().vocabulary
        try:
            packed = await self._workers.run(lambda: archive(vocabulary.files()))
        except ValueError as error:
            raise NotBuilt(f"no tokenizer.json can be made for this model: {error}") from error
        for start in range(0, len(packed), CHUNK_BYTES):
            yield engine_pb2.GetTokenizerResponse(chunk=packed[start : start + CHUNK_BYTES])

    async def Execute(
        self, request_iterator: AsyncIterator[engine_pb2.ExecuteRequest], context: Context
    ) -> AsyncGenerator[engine_pb2.ExecuteResponse]:
        # Heard before anything is refused: a refusal that is quicker than hello makes the sidecar's write fail, and gRPC then
        # tells it of that instead.
        hello = await anext(request_iterator, None)
        async with aclosing(self._ready().streams.execute(hello, request_iterator)) as frames:
            async for frame in frames:
                yield frame

    def _ready(self) -> Ready:
        if self.ready is None:
            raise EngineUnavailable("the model is being loaded and tested", retry_after=RETRY_SECONDS)
        return self.ready

    async def _do(self, heavy: bool, work: Callable[[], T]) -> T:
        return await self._workers.run(work) if heavy else work()


def _heavy(items: Sequence[types_pb2.Item], parameters: types_pb2.Parameters | None = None) -> bool:
    """Whether this takes longer than the event loop should wait: much text, or a grammar to compile."""
    every = [item.parameters for item in items] + ([parameters] if parameters is not None else [])
    return any(each.HasField("response_format") for each in every) or sum(item.ByteSize() for item in items) > HEAVY_BYTES
