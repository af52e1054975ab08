"""The service as the world looks at it: what reaches its engine, and what passes on Execute."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ostinato.errors import EpochStale
from ostinato.v1 import engine_pb2

from service.engines.base import Run
from service.engines.scripted import ScriptedEngine
from tests.simulation.edges import SimulatedServer
from tests.simulation.history import Stream
from tests.simulation.loop import Node
from tests.simulation.network import Handler, Incoming

if TYPE_CHECKING:
    from tests.simulation.world import World

BLOCK_TOKENS = 8
WINDOW = 2
"""Runs that a sidecar thread over for each that the engine runs."""

_stream: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("stream", default=None)


class RecordingEngine(ScriptedEngine):
    """Notes what reaches it, and from whom."""

    note: Callable[[Stream, Run], None]

    def submit(self, run: Run) -> None:
        stream = _stream.get()
        if stream is not None:
            self.note(stream, run)
        super().submit(run)


class RecordingServer(SimulatedServer):
    """Notes what passes on Execute."""

    world: World
    number: int

    def find(self, path: str) -> tuple[Node, Handler] | None:
        found = super().find(path)
        if found is None or not path.endswith("/Execute"):
            return found
        rpc = self._methods[path]
        return self.node, lambda incoming: self._execute(rpc, incoming)

    async def _execute(self, rpc: Any, incoming: Incoming) -> None:
        history = self.world.history
        stream = Stream(len(history.streams) + 1, self.number, engine_pb2.Hello(), 0, self.world.plan.kv_blocks, 0)
        stream.runs = WINDOW * self.world.plan.engine_runs
        history.streams.append(stream)
        _stream.set(stream)
        answers = rpc.stream_stream(self._requests(stream, incoming), incoming)
        try:
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    self._heard(stream, answer)
                    await incoming.write(answer)
        except EpochStale:
            history.coverage.add("a service that was fenced off")
            raise

    def _heard(self, stream: Stream, answer: engine_pb2.ExecuteResponse) -> None:
        history = self.world.history
        if answer.HasField("welcome"):
            epoch = stream.hello.epoch
            step = history.note(self.node.loop.time(), "welcome", stream.number, epoch)
            history.welcomed.append((step, stream.number, epoch))
        for event in answer.events:
            if event.WhichOneof("event") in ("finished", "failed"):
                stream.live.pop(event.run_id, None)

    async def _requests(self, stream: Stream, incoming: Incoming) -> AsyncIterator[engine_pb2.ExecuteRequest]:
        async for request in incoming.requests(engine_pb2.ExecuteRequest.FromString):
            if request.HasField("hello"):
                stream.hello, stream.step = request.hello, self.world.history.step
            self._load(stream, request)
            yield request

    def _load(self, stream: Stream, request: engine_pb2.ExecuteRequest) -> None:
        """What the engine then holds. Cancels stand behind the submits that take their room."""
        for run_id in request.cancels:
            stream.live.pop(run_id, None)
        for submit in request.submits:
            tokens = len(submit.token_ids) + submit.parameters.max_new_tokens
            if submit.run_id not in request.cancels:
                stream.live[submit.run_id] = math.ceil(tokens / BLOCK_TOKENS)
            if sum(stream.live.values()) > stream.blocks or len(stream.live) > stream.runs:
                held = f"{len(stream.live)} runs, {sum(stream.live.values())} KV blocks"
                stream.overfull.append(f"sequence {submit.sequence} made it {held}")
