"""The programs, started as a user would, and two ways to ask them."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from ostinato.client import Client
from ostinato.errors import EngineUnavailable, OstinatoError, from_status
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2

from tests.gpu.traffic import Ask
from tests.pair import ROOT, Program

START_SECONDS = 420.0
MESSAGE_BYTES = 256 << 20
OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]

Answers = dict[str, types_pb2.Output | OstinatoError]


class Front(Protocol):
    """Something that answers."""

    seconds: float
    """That the last ask took, without preparing it where that can be told apart."""

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        """Each by its name; those that left have no answer."""
        ...

    async def describe(self) -> types_pb2.Model: ...


@dataclass
class ServiceFront:
    """The service's own Execute stream, as a sidecar would use it."""

    stub: Any
    epoch: int = 1
    seconds: float = 0.0

    async def describe(self) -> types_pb2.Model:
        model: types_pb2.Model = (await self.stub.Describe(engine_pb2.DescribeRequest())).model
        return model

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        prepared = await self._prepare([ask.item for ask in asks])
        began = time.monotonic()
        call = self.stub.Execute()
        self.epoch += 1
        hello = engine_pb2.Hello(log_id="0" * 32, writer="gpu", epoch=self.epoch)
        await call.write(engine_pb2.ExecuteRequest(hello=hello))
        sending = asyncio.create_task(self._send(call, asks, prepared, stream))
        answers: Answers = {}
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

    async def _send(self, call: Any, asks: Sequence[Ask], prepared: Sequence[engine_pb2.PreparedItem], stream: bool) -> None:
        """In order of their arrival; all that arrive at once in one message."""
        began, order = time.monotonic(), sorted(range(len(asks)), key=lambda index: asks[index].after)
        submits: list[engine_pb2.Submit] = []
        leaving: list[tuple[float, int]] = []
        for place, index in enumerate(order):
            ask, item = asks[index], prepared[index]
            submits.append(
                engine_pb2.Submit(
                    run_id=index + 1, purpose=engine_pb2.PURPOSE_REPLAY, sequence=0, attempt=1, token_ids=item.token_ids,
                    parameters=item.parameters, seed=item.seed, stream=stream or ask.leaves,
                )
            )  # fmt: skip
            if ask.leaves:
                leaving.append((ask.after + 0.2, index + 1))
            pause = asks[order[place + 1]].after - (time.monotonic() - began) if place + 1 < len(order) else 0.0
            if pause > 0.001 or place + 1 == len(order):
                await call.write(engine_pb2.ExecuteRequest(submits=submits))
                submits = []
                await asyncio.sleep(max(0.0, pause))
        for due, run_id in leaving:
            await asyncio.sleep(max(0.0, due - (time.monotonic() - began)))
            await call.write(engine_pb2.ExecuteRequest(cancels=[run_id]))


@dataclass
class SidecarFront:
    """A client of a sidecar; each ask is a batch of its own, and none streams."""

    client: Client
    seconds: float = 0.0
    round: str = ""
    """Not empty: the asks have idempotency keys that begin so, and none leaves."""
    attempts: dict[str, int] = field(default_factory=dict)
    """That each ask took, the last time."""

    async def describe(self) -> types_pb2.Model:
        return await self.client.model()

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        answers: Answers = {}
        began = time.monotonic()

        async def one(ask: Ask) -> None:
            await asyncio.sleep(ask.after)
            key = f"{self.round} {ask.name}" if self.round else ""
            timeout = 0.2 if ask.leaves and not key else 300.0
            try:
                response = await self._generate(ask, key, timeout)
            except OstinatoError as error:
                answers[ask.name] = error
                return
            (result,) = response.results
            self.attempts[ask.name] = result.attempt
            answers[ask.name] = result.output if result.HasField("output") else from_status(result.status)

        await asyncio.gather(*map(one, asks))
        self.seconds = time.monotonic() - began
        return {ask.name: answers[ask.name] for ask in asks if not ask.leaves}

    async def _generate(self, ask: Ask, key: str, timeout: float) -> generation_pb2.GenerateResponse:
        """With a key, again and again while there is no engine."""
        while True:
            try:
                return await self.client.generate([ask.item], timeout=timeout, key=key)
            except EngineUnavailable as error:
                if not key:
                    raise
                await asyncio.sleep(error.retry_after or 1.0)


@dataclass
class Stack:
    """Running programs."""

    front: Front
    service: Program
    started_seconds: float
    """Until the service served."""
    metrics_port: int
    start_service: Callable[[], Program]
    """Another one like it, in its place."""
    sidecar: Program | None = None
    public: str = ""
    """The sidecar's address."""


@asynccontextmanager
async def running(
    model: Path,
    state: Path,
    *flags: str,
    sidecar: bool = False,
    env: Mapping[str, str] | None = None,
    engine: str = "turbomind",
) -> AsyncIterator[Stack]:
    """A service with this model, and a sidecar before it if wanted. State is kept from one call to the next."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    full_env = {"PYTHONPATH": path, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="ostinato-gpu-") as folder:
        address = f"unix:{folder}/engine.sock"
        began = time.monotonic()
        programs: list[Program] = []

        def start_service() -> Program:
            arguments = ["--engine", engine, "--listen", address, "--metrics", "127.0.0.1:0"]
            arguments += ["--model", str(model)] if engine != "scripted" else []
            arguments += ["--state-dir", str(state), "--message-bytes-max", str(MESSAGE_BYTES), "--log-format", "json"]
            programs[:1] = [Program("service", [*arguments, *flags], full_env)]
            return programs[0]

        start_service()
        try:
            await asyncio.to_thread(programs[0].wait_for, "serving", START_SECONDS)
            seconds = time.monotonic() - began
            port = int(str(programs[0].wait_for("metrics")["port"]))
            if sidecar:
                arguments = ["--engine", address, "--journal", f"{folder}/journal.sqlite", "--metrics", "127.0.0.1:0"]
                arguments += ["--listen", f"unix:{folder}/public.sock", "--log-format", "json"]
                programs.append(Program("sidecar", arguments, full_env))
                await asyncio.to_thread(programs[1].wait_for, "engine connected", 60.0)
                public = f"unix:{folder}/public.sock"
                async with Client(public, max_response_bytes=MESSAGE_BYTES) as client:
                    yield Stack(SidecarFront(client), programs[0], seconds, port, start_service, programs[1], public)
            else:
                async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                    stub: Any = engine_pb2_grpc.EngineStub(channel)
                    yield Stack(ServiceFront(stub), programs[0], seconds, port, start_service)
            code = await asyncio.to_thread(programs[-1].stop) if sidecar else 0
            code = code or await asyncio.to_thread(programs[0].stop)
            if code:
                _tell(programs, f"the programs ended with {code}")
        except BaseException:
            _tell(programs, "what the programs said")
            raise
        finally:
            for program in programs:
                if program.running:
                    program.kill()


def _tell(programs: Sequence[Program], title: str) -> None:
    """The ends of their logs, without the comings and goings of our own streams."""
    sys.stderr.write(f"---- {title}\n")
    for program in programs:
        lines = [line for line in program.lines if '"service.stream"' not in line]
        sys.stderr.write("\n".join([f"-- {program.name}", *lines[-60:]]) + "\n")
