"""The engine stream against services that misbehave, and what is prepared over it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from serving.hop import Metadata, SidecarEnd
from serving.server import Server

from sidecar.link import SUBMIT_BYTES, EngineLink, check_description, unavailable
from tests.waiting import eventually

DESCRIPTION = engine_pb2.DescribeResponse(
    model=types_pb2.Model(grade=types_pb2.GRADE_EXACT),
    capacity=engine_pb2.Capacity(runs=1, kv_blocks=1, block_tokens=1),
)
WELCOME = engine_pb2.ExecuteResponse(welcome=engine_pb2.Welcome(description=DESCRIPTION))

Requests = AsyncIterator[engine_pb2.ExecuteRequest]
Execute = Callable[[Requests], AsyncIterator[engine_pb2.ExecuteResponse]]


class Service(engine_pb2_grpc.EngineServicer):
    """Serves streams as it is told, one behaviour for each, the last one for all that follow; and nothing else."""

    Describe: Any = None
    Prepare: Any = None
    Tokenize: Any = None
    GetTokenizer: Any = None

    def __init__(self, *streams: Execute) -> None:
        self.streams = list(streams)
        self.requests: list[engine_pb2.ExecuteRequest] = []

    async def Execute(self, request_iterator: Requests, context: Any) -> AsyncIterator[engine_pb2.ExecuteResponse]:
        serve = self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]
        async for response in serve(self._noted(request_iterator)):
            yield response

    async def _noted(self, requests: Requests) -> Requests:
        async for request in requests:
            self.requests.append(request)
            yield request


class Listener:
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.events: list[engine_pb2.RunEvent] = []
        self.news = asyncio.Event()

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        self._tell("up")

    def engine_events(self, events: Sequence[engine_pb2.RunEvent]) -> None:
        self.events += events
        self._tell(f"{len(events)} events")

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        self._tell("fault")

    def engine_down(self, error: errors.OstinatoError) -> None:
        self._tell(f"down: {error.reason}")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        self.news.set()

    async def hears(self, *what: str) -> None:
        """Wait until it was told exactly this, so far."""
        async with asyncio.timeout(30):
            while len(self.told) < len(what):
                self.news.clear()
                await self.news.wait()
        assert self.told[: len(what)] == list(what)


async def hello() -> engine_pb2.Hello:
    return engine_pb2.Hello(log_id="log", writer="writer", epoch=3)


@contextlib.asynccontextmanager
async def linked(folder: Path, service: Service) -> AsyncIterator[tuple[EngineLink, Listener, asyncio.Task[None]]]:
    """A link that runs, and its listener."""
    server = Server([f"unix:{folder}/engine.sock"], registry=CollectorRegistry())
    server.add(engine_pb2_grpc.add_EngineServicer_to_server, service, "ostinato.v1.Engine")
    await server.start()
    link, listener = EngineLink(server.addresses[0], pause_seconds=0.01), Listener()
    running = asyncio.create_task(link.run(listener, hello))
    try:
        yield link, listener, running
    finally:
        await link.close()
        running.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError, errors.EpochStale, errors.JournalBehind):
                await running
        finally:
            await server.stop(0)


async def endless(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
    """Welcome, and then nothing."""
    yield WELCOME
    async for _ in requests:
        pass


async def closing(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
    """Welcome, and the end."""
    yield WELCOME


def refusing(error: errors.OstinatoError, *, after_welcome: bool = False) -> Execute:
    async def refuse(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
        if after_welcome:
            yield WELCOME
        raise error

    return refuse


def submit(run_id: int, size: int = 1) -> engine_pb2.Submit:
    return engine_pb2.Submit(run_id=run_id, token_ids=[1] * size)


async def test_hello_comes_first(tmp_path: Path) -> None:
    """The first message says who comes, and has nothing else; only after Welcome is anything submitted."""
    service = Service(endless)
    async with linked(tmp_path, service) as (link, listener, _):
        await listener.hears("up")
        link.submit(submit(1))
        await eventually(lambda: len(service.requests) == 2)

        assert service.requests[0] == engine_pb2.ExecuteRequest(hello=await hello())
        assert service.requests[1] == engine_pb2.ExecuteRequest(submits=[submit(1)])


async def test_what_waits_leaves_together_and_in_order(tmp_path: Path) -> None:
    """Submits in their order, in messages of bounded size; a cancel never before a submit that came before it."""
    service = Service(endless)
    async with linked(tmp_path, service) as (link, listener, _):
        await listener.hears("up")
        size = SUBMIT_BYTES // 4
        for run_id in range(1, 11):
            link.submit(submit(run_id, size))
        link.cancel(10)
        link.cancel(3)
        await eventually(lambda: any(request.cancels for request in service.requests))

        sent = service.requests[1:]
        assert [each.run_id for request in sent for each in request.submits] == list(range(1, 11))
        assert 3 <= len(sent) <= 5, "about a MiB each"
        assert [list(request.cancels) for request in sent] == [[]] * (len(sent) - 1) + [[10, 3]]


def prepared(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    """A good answer; of a "bad" request, a refusal."""
    if request.items[0].text == "bad":
        status = errors.to_status(errors.invalid("items[0].text", "bad"))
        return engine_pb2.PrepareResponse(prepare_id=request.prepare_id, refused=status)
    item = engine_pb2.PreparedItem(token_ids=[1], parameters=types_pb2.ResolvedParameters(max_new_tokens=1))
    return engine_pb2.PrepareResponse(prepare_id=request.prepare_id, items=[item])


async def preparing(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
    """Answers what is to be prepared, the last one first."""
    yield WELCOME
    async for request in requests:
        yield engine_pb2.ExecuteResponse(prepared=map(prepared, reversed(request.prepares)))


async def dying(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
    """Ends where it should prepare something."""
    yield WELCOME
    async for request in requests:
        if request.prepares:
            return


async def test_what_is_to_be_prepared_leaves_together(tmp_path: Path) -> None:
    """Each is answered by itself, beside one that is refused, and one that was given up."""
    service = Service(preparing)
    async with linked(tmp_path, service) as (link, listener, _):
        await listener.hears("up")
        asking = [link.prepare(asked(text), 30.0) for text in ("a", "bad", "left", "b")]
        await asyncio.sleep(0)
        asking[2].cancel()
        done = await asyncio.gather(*asking, return_exceptions=True)

        assert [type(each) for each in done] == [
            engine_pb2.PrepareResponse,
            errors.InvalidRequest,
            asyncio.CancelledError,
            engine_pb2.PrepareResponse,
        ]
        sent = [[each.items[0].text for each in request.prepares] for request in service.requests[1:]]
        assert sent == [["a", "bad", "b"]]


async def test_a_stream_that_ends_while_it_prepares(tmp_path: Path) -> None:
    """Everybody who waits is told to come back; the next stream prepares again."""
    async with linked(tmp_path, Service(dying, preparing)) as (link, listener, _):
        await listener.hears("up")
        for error in await asyncio.gather(*(failing(link.prepare(asked(text), None)) for text in "ab")):
            assert (type(error), error.retry_after) == (errors.EngineUnavailable, 1.0)
        await listener.hears("up", "down: DISCONNECTED", "up")
        assert (await link.prepare(asked("a"), None)).items


async def test_a_lost_stream_is_opened_again(tmp_path: Path) -> None:
    """Whatever ends it, the listener is told once that it is down, and the next one is up."""
    service = Service(closing, refusing(errors.OutOfOrder("no"), after_welcome=True), endless)
    async with linked(tmp_path, service) as (link, listener, _):
        await listener.hears("up", "down: DISCONNECTED", "up", "down: OUT_OF_ORDER", "up")
        link.submit(submit(1))
        await eventually(lambda: bool(service.requests and service.requests[-1].submits))


async def test_a_stream_that_was_never_up_is_not_down(tmp_path: Path) -> None:
    """A refusal before Welcome is not told to the listener."""
    service = Service(refusing(errors.WriterBusy("no", retry_after=1)), refusing(errors.EngineUnavailable("loading")), endless)
    async with linked(tmp_path, service) as (_, listener, _):
        await listener.hears("up")
        assert len(service.streams) == 1


async def test_a_lost_end_ends_the_link(tmp_path: Path) -> None:
    """JOURNAL_BEHIND is for good."""
    async with linked(tmp_path, Service(refusing(errors.JournalBehind("7 was run here")))) as (_, listener, running):
        async with asyncio.timeout(30):
            with pytest.raises(errors.JournalBehind, match="7 was run here"):
                await running
        assert listener.told == []


@pytest.mark.parametrize("after_welcome", [False, True])
async def test_a_newer_epoch_ends_the_link(tmp_path: Path, after_welcome: bool) -> None:
    """EPOCH_STALE, at Hello or later, is for good."""
    stale = errors.EpochStale("epoch 3 is over: 4 has been here")
    async with linked(tmp_path, Service(refusing(stale, after_welcome=after_welcome))) as (_, listener, running):
        async with asyncio.timeout(30):
            with pytest.raises(errors.EpochStale, match="4 has been here"):
                await running
        assert listener.told == (["up", "down: EPOCH_STALE"] if after_welcome else [])


async def test_events_come_as_they_were_sent(tmp_path: Path) -> None:
    """Those of one message together, in order; Welcome again is up again."""

    async def speak(requests: Requests) -> AsyncIterator[engine_pb2.ExecuteResponse]:
        yield WELCOME
        yield engine_pb2.ExecuteResponse(events=[engine_pb2.RunEvent(run_id=n) for n in (1, 2, 3)])
        yield engine_pb2.ExecuteResponse(welcome=WELCOME.welcome, events=[engine_pb2.RunEvent(run_id=4)])
        async for _ in requests:
            pass

    async with linked(tmp_path, Service(speak)) as (_, listener, _):
        await listener.hears("up", "3 events", "up", "1 events")
        assert [event.run_id for event in listener.events] == [1, 2, 3, 4]


async def test_a_stream_may_be_dropped(tmp_path: Path) -> None:
    """Who is told something impossible drops it: down, and up again; what waited for it does not go over the next one."""
    service = Service(endless)
    async with linked(tmp_path, service) as (link, listener, _):
        await listener.hears("up")
        for run_id in (1, 2):
            link.submit(submit(run_id, SUBMIT_BYTES))
        link.cancel(1)
        link.drop("it said what it must not")
        await listener.hears("up", "down: DISCONNECTED", "up")
        link.submit(submit(3))
        await eventually(lambda: service.requests[-1] == engine_pb2.ExecuteRequest(submits=[submit(3)]))

        assert [each.run_id for request in service.requests for each in request.submits] == [3]


async def test_a_link_that_is_closed_stays_closed(tmp_path: Path) -> None:
    """The listener is told that the engine is gone, and the link ends."""
    async with linked(tmp_path, Service(endless)) as (link, listener, running):
        await listener.hears("up")
        await link.close()
        async with asyncio.timeout(30):
            await running
        assert len(listener.told) == 2


async def test_a_link_that_is_cancelled_ends(tmp_path: Path) -> None:
    """Cancelling its task is not taken for a lost stream: nothing is opened again."""
    async with linked(tmp_path, Service(endless)) as (_, listener, running):
        await listener.hears("up")
        running.cancel()
        await asyncio.wait({running}, timeout=10)

        assert running.cancelled()
        assert listener.told == ["up", "down: DISCONNECTED"]


async def failing(call: Awaitable[object]) -> errors.OstinatoError:
    try:
        await call
    except errors.OstinatoError as error:
        return error
    raise AssertionError("an error was expected")


async def test_no_service(tmp_path: Path) -> None:
    """Without a service, preparing fails at once, with a retry hint."""
    link = EngineLink(f"unix:{tmp_path}/none.sock", pause_seconds=0.01)
    async with asyncio.timeout(30):
        error = await failing(link.prepare(engine_pb2.PrepareRequest(), None))
    await link.close()

    assert (type(error), error.retry_after) == (errors.EngineUnavailable, 1.0)


def test_only_the_way_to_the_engine_is_renamed() -> None:
    """What the service itself said goes to the caller as it is."""
    assert type(unavailable(errors.from_code(grpc.StatusCode.UNAVAILABLE, "connection refused"))) is errors.EngineUnavailable
    for error in (errors.invalid("items", "no"), errors.QueueFull("no", retry_after=7), errors.DeadlineExceeded("no")):
        assert unavailable(error) is error


@pytest.mark.parametrize("missing", ["runs", "kv_blocks", "block_tokens"])
def test_an_engine_that_holds_nothing(missing: str) -> None:
    """Each part of the capacity is needed for anything to fit."""
    description = engine_pb2.DescribeResponse()
    description.CopyFrom(DESCRIPTION)
    check_description(description)
    description.capacity.ClearField(missing)  # type: ignore[arg-type]
    with pytest.raises(errors.ProtocolViolation):
        check_description(description)


async def test_a_refusal_before_hello_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that has refused before Hello could be written is heard: what it said is not taken for a broken line, which
    would be tried again for ever."""
    call = importlib.import_module("grpc.aio._call").StreamStreamCall
    write = call.write

    async def late(stream: Any, message: engine_pb2.ExecuteRequest) -> None:
        await stream.code()
        await write(stream, message)

    monkeypatch.setattr(call, "write", late)
    async with linked(tmp_path, Service(refusing(errors.EpochStale("a newer one")))) as (_, listener, running):
        with pytest.raises(errors.EpochStale):
            await asyncio.wait_for(running, 30)
        assert listener.told == []


async def test_a_writer_that_fails(tmp_path: Path) -> None:
    """What cannot be written ends the stream and then the link, with the reason: it does not go on reading for ever."""
    with contextlib.suppress(AttributeError):  # which `linked` raises again
        async with linked(tmp_path, Service(endless)) as (link, listener, running):
            await listener.hears("up")
            link.submit(cast(Any, "no message"))
            ended, _ = await asyncio.wait({running}, timeout=10)

    assert ended == {running}
    assert isinstance(running.exception(), AttributeError)
    assert listener.told == ["up", "down: DISCONNECTED"]


def asked(text: str = "x", **parameters: object) -> engine_pb2.PrepareRequest:
    return engine_pb2.PrepareRequest(items=[types_pb2.Item(text=text, parameters=types_pb2.Parameters(**parameters))])  # type: ignore[arg-type]


class Changing(SidecarEnd):
    """Believes the service as often as it is told, and then meets another process."""

    def __init__(self, times: int, error: errors.OstinatoError | None) -> None:
        super().__init__("unix:unused")
        self.times, self.error, self.asked = times, error, 0

    async def introduced(self, channel: grpc.aio.Channel) -> Metadata:
        self.asked += 1
        if self.asked <= self.times:
            return (("ostinato-hop", "first"),)
        if self.error is not None:
            raise self.error
        return (("ostinato-hop", "second"),)


@pytest.mark.parametrize("error", [errors.Unauthenticated("not the service"), None])
async def test_no_hello_for_a_process_that_came_between(
    error: errors.OstinatoError | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that takes the service's place after the introduction, or a service that was restarted then, gets no message on
    the stream that was opened to the one before. Why it is refused is logged once."""
    service, hop = Service(endless), Changing(1, error)
    server = Server([f"unix:{tmp_path}/engine.sock"], registry=CollectorRegistry())
    server.add(engine_pb2_grpc.add_EngineServicer_to_server, service, "ostinato.v1.Engine")
    await server.start()
    link = EngineLink(server.addresses[0], 0.01, hop)
    running = asyncio.create_task(link.run(Listener(), hello))
    try:
        await eventually(lambda: hop.asked >= 2, "it asks again")
        if error is not None:
            await eventually(lambda: hop.asked >= 6, "it tries again")
            assert service.requests == []
            assert sum("engine stream ended: UNAUTHENTICATED" in message for message in caplog.messages) == 1
        else:
            await eventually(lambda: bool(service.requests), "it believes the one that it meets twice")
            assert hop.asked >= 4
    finally:
        await link.close()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await server.stop(0)
