"""A service in this process, with the scripted engine, behind a real unix socket; and a sidecar's end of its stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from serving.metrics import registry
from serving.server import Server

from service.__main__ import start_engine
from service.config import Settings
from service.engines.base import Run
from service.engines.scripted import Script, ScriptedEngine, parse
from service.fence import SequenceFile
from service.observe import Metrics
from service.prepare import Workers
from service.stream import NAME, EngineServicer, Streams

LOG = "0123456789abcdef0123456789abcdef"
PRIMARY, REPLAY = engine_pb2.PURPOSE_PRIMARY, engine_pb2.PURPOSE_REPLAY
SLOW: dict[str, Any] = {"delay_seconds": 0.005}
"""A script with a delay between two tokens."""
ENDLESS: dict[str, Any] = {"max_new_tokens": 4000}
"""Parameters of a run that does not end within a test."""


class RecordingEngine(ScriptedEngine):
    """Remembers the sequences in order of submission."""

    def __init__(self, script: Script, *, end_process: Callable[[int], object]) -> None:
        super().__init__(script, end_process=end_process)
        self.submitted: list[int] = []

    def submit(self, run: Run) -> None:
        self.submitted.append(run.sequence)
        super().submit(run)


@dataclass
class Service:
    """A running service and a stub to it."""

    server: Server
    servicer: EngineServicer
    engine: RecordingEngine
    registry: CollectorRegistry
    stub: engine_pb2_grpc.EngineAsyncStub
    address: str
    end_codes: list[int]

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value, 0 where it has none yet."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def idle(self) -> bool:
        """Whether the engine has no run."""
        return not self.engine._active and not self.engine._waiting

    @property
    def streams(self) -> Streams:
        assert self.servicer.streams is not None
        return self.servicer.streams

    @contextlib.asynccontextmanager
    async def stream(self, **hello: Any) -> AsyncIterator[Stream]:
        """A connected stream; cancelled at the end if it still runs."""
        stream = Stream(self.stub.Execute())
        await stream.send(hello=hello_of(**hello))
        try:
            yield stream
        finally:
            stream.call.cancel()


@contextlib.asynccontextmanager
async def served(script: Mapping[str, object] | None = None, **settings: Any) -> AsyncIterator[Service]:
    """A ready service; its self-test is off unless asked for."""
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        given: dict[str, Any] = {"self_test": "off", "state_dir": Path(folder), "listen": (f"unix:{folder}/e.sock",)} | settings
        chosen = Settings(engine="scripted", **given)
        own, end_codes = registry(), list[int]()
        engine = RecordingEngine(parse(json.dumps(script or {})), end_process=end_codes.append)
        workers = Workers(chosen.prepare_threads, chosen.prepare_queue_max)
        servicer = EngineServicer(workers)
        server = Server(chosen.addresses, registry=own, message_bytes_max=chosen.message_bytes_max)
        server.add(engine_pb2_grpc.add_EngineServicer_to_server, servicer, NAME)
        await server.start()
        try:
            servicer.streams = await start_engine(
                engine, chosen, Metrics(own), "0" * 32, SequenceFile(chosen.state_dir / "sequences.json")
            )
            server.set_health(NAME, serving=True)
            async with grpc.aio.insecure_channel(server.addresses[0]) as channel:
                stub: Any = engine_pb2_grpc.EngineStub(channel)
                yield Service(server, servicer, engine, own, stub, server.addresses[0], end_codes)
        finally:
            await server.stop(0)
            workers.close()
            await engine.close()
            if servicer.streams is not None and servicer.streams.file is not None:
                servicer.streams.file.close()


@dataclass
class Stream:
    """A sidecar's end of Execute."""

    call: Any
    welcomes: list[engine_pb2.DescribeResponse] = field(default_factory=list)
    events: list[engine_pb2.RunEvent] = field(default_factory=list)
    frames: int = 0

    async def send(
        self,
        *submits: engine_pb2.Submit,
        hello: engine_pb2.Hello | None = None,
        cancels: Iterable[int] = (),
        prepares: Iterable[engine_pb2.PrepareRequest] = (),
    ) -> None:
        await self.call.write(engine_pb2.ExecuteRequest(hello=hello, submits=submits, cancels=cancels, prepares=prepares))

    async def read(self) -> engine_pb2.ExecuteResponse | None:
        """The next message, recorded. None: the stream ended without an error. Raises the OstinatoError it ended with."""
        try:
            frame: engine_pb2.ExecuteResponse | Any = await asyncio.wait_for(self.call.read(), 30)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        if frame is grpc.aio.EOF:
            return None
        self.frames += 1
        if frame.HasField("welcome"):
            self.welcomes.append(frame.welcome.description)
        self.events.extend(frame.events)
        return frame

    async def until(self, run_id: int, *kinds: str) -> engine_pb2.RunEvent:
        """Reads until this run has an event of one of these kinds."""
        while True:
            for event in self.events:
                if event.run_id == run_id and event.WhichOneof("event") in kinds:
                    return event
            assert await self.read() is not None, f"the stream ended before {kinds} of run {run_id}"

    async def end(self, run_id: int) -> engine_pb2.RunEvent:
        """How the run ended."""
        return await self.until(run_id, "finished", "failed")

    async def output(self, run_id: int) -> types_pb2.Output:
        return (await self.end(run_id)).finished.output

    async def failure(self, run_id: int) -> errors.OstinatoError:
        return errors.from_status((await self.end(run_id)).failed)

    async def done(self) -> None:
        """Half-closes, and reads to the end."""
        await self.call.done_writing()
        while await self.read() is not None:
            pass

    async def broken(self) -> errors.OstinatoError:
        """Reads until the stream fails."""
        try:
            while await self.read() is not None:
                pass
        except errors.OstinatoError as error:
            return error
        raise AssertionError("the stream ended without an error")

    def of(self, run_id: int, kind: str) -> list[engine_pb2.RunEvent]:
        return [event for event in self.events if event.run_id == run_id and event.WhichOneof("event") == kind]


def hello_of(log: str = LOG, writer: str = "w", epoch: int = 1, last_sequence: int = 2**40) -> engine_pb2.Hello:
    return engine_pb2.Hello(log_id=log, writer=writer, epoch=epoch, last_sequence=last_sequence)


def submit_of(
    run_id: int,
    *,
    sequence: int | None = None,
    purpose: Any = PRIMARY,
    attempt: int = 1,
    prompt: Iterable[int] = b"hello",
    seed: int = 1,
    stream: bool = True,
    timeout_millis: int = 0,
    ahead: bool = False,
    **parameters: Any,
) -> engine_pb2.Submit:
    """A run of 8 tokens; its sequence is its run_id if not given."""
    return engine_pb2.Submit(
        run_id=run_id,
        purpose=purpose,
        sequence=run_id if sequence is None else sequence,
        attempt=attempt,
        token_ids=prompt,
        parameters=resolved(**parameters),
        seed=seed,
        stream=stream,
        timeout_millis=timeout_millis,
        ahead=ahead,
    )


def resolved(**changes: Any) -> types_pb2.ResolvedParameters:
    given = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 8, "ignore_eos": True}
    return types_pb2.ResolvedParameters(**(given | changes))


@contextlib.contextmanager
def refused(kind: type[errors.OstinatoError]) -> Iterator[list[errors.OstinatoError]]:
    """Expects an RPC to fail with this error, which is then in the list."""
    found: list[errors.OstinatoError] = []
    try:
        yield found
    except grpc.aio.AioRpcError as error:
        found.append(errors.from_rpc_error(error))
        assert type(found[0]) is kind, found[0]
    else:
        raise AssertionError(f"{kind.__name__} was expected")
