"""Two ways to ask: the service's own stream, as a sidecar would use it, and a client through a sidecar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from ostinato.client import Client
from ostinato.errors import EngineFailed, OstinatoError, from_status
from ostinato.v1 import engine_pb2, types_pb2

from tests.gpu.traffic import Ask

ASK_SECONDS = 100.0
"""For one ask of any size, so that a hanging device does not use up the time of the other parts."""
MESSAGE_SUBMITS = 32
THROUGH_STARTS_SECONDS = 300.0
"""The same if the service may restart meanwhile."""

Answers = dict[str, types_pb2.Output | OstinatoError]


class Front(Protocol):
    """A service or a sidecar that answers requests."""

    seconds: float
    """Duration of the last ask, without the preparation if that is a separate call."""

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        """The answers by name; cancelled asks have none."""

    async def describe(self) -> types_pb2.Model: ...


@dataclass
class ServiceFront:
    """The service's own Execute stream, as a sidecar would use it."""

    stub: Any
    epoch: int = 1
    seconds: float = 0.0
    arrivals: dict[str, list[float]] = field(default_factory=dict)
    """Of the last ask, seconds from its begin to each report of new tokens, by name of those that stream."""

    async def describe(self) -> types_pb2.Model:
        model: types_pb2.Model = (await self.stub.Describe(engine_pb2.DescribeRequest())).model
        return model

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        async with asyncio.timeout(ASK_SECONDS):
            return await self._ask(asks, stream)

    async def _ask(self, asks: Sequence[Ask], stream: bool) -> Answers:
        submits = self._submits(asks, await self._prepare([ask.item for ask in asks]), stream)
        began = time.monotonic()
        call = self.stub.Execute()
        self.epoch += 1
        hello = engine_pb2.Hello(log_id="0" * 32, writer="gpu", epoch=self.epoch)
        await call.write(engine_pb2.ExecuteRequest(hello=hello))
        sending = asyncio.create_task(self._send(call, asks, submits))
        answers: Answers = {}
        self.arrivals = {}
        wanted = {index for index, ask in enumerate(asks, start=1) if not ask.leaves}
        while wanted:
            frame = await call.read()
            if frame is grpc.aio.EOF:
                raise AssertionError("the service ended the stream")
            for event in frame.events:
                if event.HasField("finished"):
                    answers[asks[event.run_id - 1].name] = event.finished.output
                elif event.HasField("failed"):
                    answers[asks[event.run_id - 1].name] = from_status(event.failed)
                elif event.HasField("tokens"):
                    self.arrivals.setdefault(asks[event.run_id - 1].name, []).append(time.monotonic() - began)
                    continue
                else:
                    continue
                wanted.discard(event.run_id)
        self.seconds = time.monotonic() - began
        await sending
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
        return answers

    async def _prepare(self, items: Sequence[types_pb2.Item]) -> list[engine_pb2.PreparedItem]:
        found: list[engine_pb2.PreparedItem] = []
        for start in range(0, len(items), 128):
            request = engine_pb2.PrepareRequest(items=items[start : start + 128])
            found += (await self.stub.Prepare(request)).items
        return found

    def _submits(
        self, asks: Sequence[Ask], prepared: Sequence[engine_pb2.PreparedItem], stream: bool
    ) -> list[engine_pb2.Submit]:
        return [
            engine_pb2.Submit(
                run_id=number, purpose=engine_pb2.PURPOSE_REPLAY, sequence=0, attempt=1, token_ids=item.token_ids,
                parameters=item.parameters, seed=item.seed, stream=stream or ask.streams or ask.leaves,
            )
            for number, (ask, item) in enumerate(zip(asks, prepared, strict=True), start=1)
        ]  # fmt: skip

    async def _send(self, call: Any, asks: Sequence[Ask], submits: Sequence[engine_pb2.Submit]) -> None:
        """Sends submissions and cancellations in order of time; those due at once in few messages."""
        began = time.monotonic()
        due = [(ask.after, 0, index) for index, ask in enumerate(asks)]
        due += [(ask.after + ask.leaves_after, 1, index) for index, ask in enumerate(asks) if ask.leaves]
        request = engine_pb2.ExecuteRequest()
        for moment, cancels, index in sorted(due):
            pause = moment - (time.monotonic() - began)
            if (pause > 0.001 and (request.submits or request.cancels)) or len(request.submits) == MESSAGE_SUBMITS:
                await call.write(request)
                request = engine_pb2.ExecuteRequest()
            if pause > 0.001:
                await asyncio.sleep(pause)
            if cancels:
                request.cancels.append(index + 1)
                continue
            request.submits.append(submits[index])
        await call.write(request)


@dataclass
class SidecarFront:
    """A client of a sidecar. Each ask is a batch of its own, by Generate or GenerateStream."""

    client: Client
    seconds: float = 0.0
    round: str = ""
    """If not empty, the asks have idempotency keys with this prefix, and none is cancelled."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Attempts of each ask, the last time."""

    async def describe(self) -> types_pb2.Model:
        return await self.client.model()

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        answers: Answers = {}
        began = time.monotonic()

        async def one(ask: Ask) -> None:
            await asyncio.sleep(ask.after)
            key = f"{self.round} {ask.name}" if self.round else ""
            timeout = THROUGH_STARTS_SECONDS if key else 0.2 if ask.leaves else ASK_SECONDS
            try:
                answers[ask.name] = await self._answer(ask, key, timeout, stream or ask.streams)
            except OstinatoError as error:
                answers[ask.name] = error

        await asyncio.gather(*map(one, asks))
        self.seconds = time.monotonic() - began
        return {ask.name: answers[ask.name] for ask in asks if not ask.leaves}

    async def _answer(self, ask: Ask, key: str, timeout: float, stream: bool) -> types_pb2.Output:
        """Raises OstinatoError, also if a stream's tokens are not those of its end."""
        told: list[int] = []
        result: types_pb2.Result | None = None
        if stream:
            async with aclosing(self.client.stream([ask.item], timeout=timeout, key=key)) as events:
                async for event in events:
                    if event.HasField("restarted"):
                        told.clear()
                    told += (token for run in event.tokens.runs for token in run.token_ids)
                    if event.HasField("finished") or event.HasField("failed"):
                        result = event.finished if event.HasField("finished") else event.failed
        else:
            (result,) = (await self.client.generate([ask.item], timeout=timeout, key=key)).results
        assert result is not None, "a stream ended without its item's end"
        self.attempts[ask.name] = result.attempt
        if not result.HasField("output"):
            raise from_status(result.status)
        if stream and told != list(result.output.token_ids):
            raise EngineFailed(f"the stream told {len(told)} tokens, which are not those that it ended with")
        return result.output
