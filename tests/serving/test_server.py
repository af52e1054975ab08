"""Servers on real sockets: who may listen where, health, reflection, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry

from ostinato.v1 import generation_pb2_grpc
from serving.intake import Bounds
from serving.program import StartupError
from serving.server import Server, probe
from serving.settings import field

from tests.http2 import connected
from tests.pair import python
from tests.serving.echo import METHODS, NAME, Context, Echo, call, register, serving, text
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
HEALTH, REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def made(*addresses: str, echo: Echo | None = None, **kwargs: Any) -> Server:
    """A server that is not started."""
    server = Server(addresses, registry=CollectorRegistry(), **kwargs)
    server.add(register, echo or Echo(), NAME)
    return server


async def answers(address: str, method: str = "UnaryUnary") -> None:
    """A call to the server there is answered."""
    async with grpc.aio.insecure_channel(address) as channel:
        assert (await call(channel, method, text("x")))[0].content == "x"


@pytest.fixture(name="server")
async def _server() -> AsyncIterator[Server]:
    server = made("127.0.0.1:0")
    await server.start()
    yield server
    await server.stop(grace=0)


@pytest.fixture(name="health")
async def _health(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.addresses[0]) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def test_a_port_in_use_is_an_error_that_names_it(server: Server) -> None:
    """A second server does not share the port in silence; it fails and says which address."""
    second = made(server.addresses[0])
    with pytest.raises(StartupError, match=f"{server.addresses[0]}: Address already in use"):
        await second.start()


@pytest.mark.parametrize("method", METHODS)
async def test_a_unix_socket_serves(tmp_path: Path, method: str) -> None:
    """All kinds of calls work over a unix socket, which only its owner and group may open."""
    server = made(f"unix:{tmp_path}/s.sock")
    await server.start()
    await answers(server.addresses[0], method)
    mode = stat.S_IMODE((tmp_path / "s.sock").stat().st_mode)
    await server.stop(grace=0)

    assert mode == 0o660
    assert not (tmp_path / "s.sock").exists()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """A file that a killed process left behind does not keep the next one from starting."""
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()

    server = made(f"unix:{path}")
    await server.start()
    await answers(server.addresses[0])
    await server.stop(grace=0)


async def test_a_living_socket_is_left_alone(tmp_path: Path) -> None:
    """If another server answers there, the second fails and the first continues."""
    first, second = made(f"unix:{tmp_path}/s.sock"), made(f"unix:{tmp_path}/s.sock")
    await first.start()
    with pytest.raises(StartupError, match=r"s\.sock: Address already in use"):
        await second.start()
    await answers(first.addresses[0])
    await first.stop(grace=0)


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """Somebody's file at that path is not removed."""
    (tmp_path / "precious").write_text("data")
    with pytest.raises(StartupError, match="no socket"):
        await made(f"unix:{tmp_path}/precious").start()

    assert (tmp_path / "precious").read_text() == "data"


async def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    """The folder of a socket's path is made, closed to others; where that cannot be, the path is named."""
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"file/s\.sock: .*[Dd]irectory|file/s\.sock: File exists"):
        await made(f"unix:{tmp_path}/file/s.sock").start()
    server = made(f"unix:{tmp_path}/missing/s.sock")
    await server.start()
    await server.stop(grace=0)

    assert stat.S_IMODE((tmp_path / "missing").stat().st_mode) & 0o027 == 0


async def test_a_socket_where_everybody_may_write_is_refused(tmp_path: Path) -> None:
    """Whoever may write in the folder could take the socket's place, so the error names the folder."""
    os.chmod(tmp_path, 0o777)  # noqa: PTH101  # a quick call, in a test
    with pytest.raises(StartupError, match=rf"cannot listen on .*: {tmp_path}: mode 0777 lets every user"):
        await made(f"unix:{tmp_path}/s.sock").start()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        *((text, "is no address") for text in ("", "7000", "localhost", "localhost:http", "example.org:7000")),
        ("127.0.0.1:65536", "a port is 0 to 65535"),
        *((text, "a socket's path is absolute") for text in ("unix:s", "unix:")),
        ("unix:/" + "ü" * 60, "a socket's path is at most 107 bytes long, this one is 121"),
    ],
)
async def test_what_is_no_address_is_refused(address: str, why: str) -> None:
    """Names, missing ports, relative paths, and those that the kernel would cut are refused before anything is bound."""
    with pytest.raises(StartupError, match=why):
        made(address)


async def test_one_server_listens_at_several_addresses(tmp_path: Path) -> None:
    """Every address is bound, and real ports are reported."""
    server = made("127.0.0.1:0", "localhost:0", f"unix:{tmp_path}/s.sock")
    await server.start()
    assert not [address for address in server.addresses if address.endswith(":0")]
    for address in server.addresses:
        await answers(address)
    await server.stop(grace=0)


async def test_health_is_what_the_program_says(server: Server, health: Any) -> None:
    """A service is NOT_SERVING until it is said to serve; the process is SERVING; an unknown name is NOT_FOUND."""

    async def check(name: str) -> Any:
        return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

    assert [await check(""), await check(NAME)] == [SERVING, NOT_SERVING]
    server.set_health(NAME, serving=True)
    assert await check(NAME) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await check("ostinato.v1.Nothing")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListRequest"), reason="this grpcio-health-checking has no List")
@pytest.mark.usefixtures("server")
async def test_health_lists_all_services(health: Any) -> None:
    """One question tells the state of every service."""
    statuses = (await health.List(health_pb2.HealthListRequest())).statuses

    assert {name: entry.status for name, entry in statuses.items()} == {"": SERVING, NAME: NOT_SERVING}


async def test_a_watch_sees_changes_and_does_not_hold_up_the_stop(server: Server, health: Any) -> None:
    """A watcher is told of every change, and a stop ends it at once instead of waiting for it."""
    watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
    assert (await watch.read()).status == NOT_SERVING
    server.set_health(NAME, serving=True)
    assert (await watch.read()).status == SERVING

    await server.stop(grace=1000)

    assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watcher_that_does_not_read_delays_no_other(server: Server) -> None:
    """A peer that grants no window cannot be told, and others are told all the same."""
    async with connected(server.addresses[0], window=0) as peer, grpc.aio.insecure_channel(server.addresses[0]) as channel:
        peer.call("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(service=NAME).SerializeToString())
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == NOT_SERVING

        async with asyncio.timeout(10):
            server.set_health(NAME, serving=True)
            assert (await watch.read()).status == SERVING


@pytest.mark.parametrize("how", ["reset", "vanish"])
@pytest.mark.parametrize("path", [*(f"/{NAME}/{method}" for method in METHODS), f"{HEALTH}Watch"])
async def test_a_client_that_leaves_while_it_is_written_to(path: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """By a reset of the stream or of the connection: its calls end, and nothing is in the log."""
    calls, begun = 20, 0

    def act(_content: str, _context: Context) -> None:
        nonlocal begun
        begun += 1

    server = made("127.0.0.1:0", echo=Echo(act))
    await server.start()
    before = len(asyncio.all_tasks())
    async with connected(server.addresses[0], window=0) as peer:
        streams = [peer.call(path, b"" if "health" in path else text("x" * 1000)) for _ in range(calls)]
        if "health" in path:
            await eventually(lambda: len(asyncio.all_tasks()) > before + calls)
        else:
            await eventually(lambda: begun == calls)
        if how == "reset":
            for stream in streams:
                peer.reset(stream)
        else:
            peer.vanish()
        await eventually(lambda: len(asyncio.all_tasks()) <= before + 1)
    await server.stop(grace=0)

    assert troubles(caplog) == []


def troubles(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error, but by gRPC's own poller, which may still write to the loop of an earlier test."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    return [message for message in messages if "PollerCompletionQueue" not in message]


async def test_reflection_names_our_services() -> None:
    """A client without our files finds every service, and messages, by reflection."""
    server = Server(["127.0.0.1:0"], registry=CollectorRegistry())
    server.add(
        generation_pb2_grpc.add_GenerationServicer_to_server,
        generation_pb2_grpc.GenerationServicer(),  # type: ignore[abstract]  # at run time it answers UNIMPLEMENTED
        "ostinato.v1.Generation",
    )
    server.add(register, Echo(), NAME)
    await server.start()

    def ask() -> tuple[list[str], str]:
        with grpc.insecure_channel(server.addresses[0]) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            return list(database.get_services()), database.FindFileContainingSymbol("ostinato.v1.GenerateRequest").name

    services, file = await asyncio.to_thread(ask)
    await server.stop(grace=0)
    assert {"ostinato.v1.Generation", NAME, "grpc.health.v1.Health"} <= set(services)
    assert file == "ostinato/v1/generation.proto"


async def test_a_message_over_the_limit_is_refused_by_grpc() -> None:
    """message_bytes_max bounds what is read; the answer has no details, it is gRPC's own."""
    async with serving(Echo(), message_bytes_max=1000) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(channel, "UnaryUnary", text("x" * 1001))

    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_burst_is_taken_up_whole() -> None:
    """Thousands of calls at once all reach their handler; gRPC's own bound would end most, and not say why."""
    burst, arrived, all_here = 2500, 0, asyncio.Event()

    async def act(_content: str, _context: Any) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == burst:
            all_here.set()
        await all_here.wait()

    async with serving(Echo(act)) as channel, asyncio.TaskGroup() as calls:
        for _ in range(burst):
            calls.create_task(call(channel, "UnaryUnary", text("x"), timeout=1000))

    assert arrived == burst


async def test_a_stop_lets_calls_end_and_takes_no_more() -> None:
    """Within the grace a call under way is answered, and a new one is UNAVAILABLE."""
    running, finish = asyncio.Event(), asyncio.Event()

    async def act(_content: str, _context: Any) -> None:
        running.set()
        await finish.wait()

    server = made("127.0.0.1:0", echo=Echo(act))
    await server.start()
    async with grpc.aio.insecure_channel(server.addresses[0]) as channel:
        first = asyncio.create_task(call(channel, "UnaryUnary", text("x"), timeout=1000))
        await running.wait()
        stopping = asyncio.create_task(server.stop(grace=1000))
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        code = grpc.StatusCode.OK
        while code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):  # the latter for one that the stop met on its way
            code = await check(b"").code()
        finish.set()
        assert (await first)[0].content == "x"
        await stopping

    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_stop_cancels_what_outlives_its_grace() -> None:
    """After the grace the calls left are cancelled, so a stop always ends."""
    running = asyncio.Event()

    async def act(_content: str, _context: Any) -> None:
        running.set()
        await asyncio.Event().wait()

    async with serving(Echo(act)) as channel:
        left = asyncio.create_task(call(channel, "UnaryUnary", text("x"), timeout=1000))
        await running.wait()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await left


def test_every_option_is_one_that_grpc_knows() -> None:
    """A misspelt option of a channel or a server is ignored in silence, so each name that we use must be in gRPC's library."""
    written = (path.read_text() for folder in ("proto", "service", "sidecar") for path in (ROOT / folder).rglob("*.py"))
    used = {name for text in written for name in re.findall(r'"(grpc\.[a-z][a-z0-9_.]+)", ?[^)]', text)}
    (library,) = (Path(grpc.__file__).parent / "_cython").glob("cygrpc*.so")

    assert len(used) > 10
    known = library.read_bytes()
    assert {name for name in used if name.encode() + b"\0" not in known} == set()


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a program listens."""

    listen: tuple[str, ...] = field(("unix:/default.sock",), "addresses")
    health_listen: str = field("", "for probes")


async def asked(address: str, *argv: str) -> int:
    """The exit code; the probe blocks, so it has a thread."""
    return await asyncio.to_thread(probe, Settings, "sidecar", ["--address", address, *argv], {})


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_probe_says_what_health_says(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 while the service it names serves, 1 while it does not, and one line with the status each time."""
    server = made("127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s.sock")
    await server.start()
    address = server.addresses[0]

    assert await asked(address) == 0
    assert await asked(address, NAME) == 1
    server.set_health(NAME, serving=True)
    assert await asked(address, NAME) == 0
    assert await asked(address, "no.such.Service") == 1
    await server.stop(grace=0)
    assert await asked(address) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["SERVING:", "NOT_SERVING:", "SERVING:", "NOT_FOUND", "UNAVAILABLE"]
    assert all(address in line for line in lines)


def test_a_server_that_does_not_answer_fails_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that accepts and says nothing costs the timeout and no more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        assert probe(Settings, "service", ["--address", address, "--timeout-seconds", "0.2"], {}) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "argv", "expected"),
    [
        ({}, [], "unix:/default.sock"),
        ({"LISTEN": "unix:/nowhere.sock, 127.0.0.1:1"}, [], "unix:/nowhere.sock"),
        ({"LISTEN": "127.0.0.1:1", "HEALTH_LISTEN": "unix:/health.sock"}, [], "unix:/health.sock"),
        ({"LISTEN": "unix:/nowhere.sock", "HEALTH_LISTEN": "", "ODD": "1"}, [], "unix:/nowhere.sock"),
        ({"CONFIG": "{file}"}, [], "unix:/file.sock"),
        ({}, ["--config", "{file}"], "unix:/file.sock"),
        ({"CONFIG": "{file}", "LISTEN": "unix:/nowhere.sock"}, [], "unix:/nowhere.sock"),
    ],
)
def test_the_address_is_the_programs_own(
    settings: dict[str, str], argv: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The environment, and below it the settings file, say where to ask, by the port for probes or the first address; nothing
    else there matters."""
    file = tmp_path / "ostinato.toml"
    file.write_text('[service]\nlisten = ["unix:/file.sock", "127.0.0.1:1"]\nodd = 1\n')
    environ = {f"OSTINATO_SERVICE_{name}": value.format(file=file) for name, value in settings.items()}

    assert probe(Settings, "service", [each.format(file=file) for each in argv], environ) == 1
    assert capsys.readouterr().out.endswith(f"service at {expected}\n")


@pytest.mark.parametrize(
    "argv", [["--timeout-seconds", "0"], ["--timeout-seconds", "nan"], ["--adress", "x"], ["a", "b"], ["--config", "/nowhere"]]
)
def test_a_bad_flag_is_not_bad_health(argv: list[str]) -> None:
    """A probe that was asked wrongly exits with 2, as the programs do."""
    with pytest.raises(SystemExit) as ended:
        probe(Settings, "sidecar", argv, {})

    assert ended.value.code == 2


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_both_programs_have_it(program: str) -> None:
    """`python -m PROGRAM probe` asks, and starts nothing."""
    done = python("-m", program, "probe", "--address", "127.0.0.1:1")

    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("UNAVAILABLE")


NO_MESSAGES = [b"\xff" * 5, b"\x0a\xff", b"\x0a\x02\xff\xff", b"\x08", b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"]
"""Neither of health nor of reflection."""


async def test_bytes_to_standard_services_that_are_no_message(caplog: pytest.LogCaptureFixture) -> None:
    """Health, also on the port for probes, and reflection answer them with INVALID_ARGUMENT, and log nothing; nor do names that
    no service has."""
    server = made("127.0.0.1:0", health_address="127.0.0.1:0")
    await server.start()
    targets = server.addresses[0], server.health_address
    try:
        async with grpc.aio.insecure_channel(targets[0]) as door, grpc.aio.insecure_channel(targets[1]) as probes:
            for data in NO_MESSAGES:
                codes = {await _code(door, REFLECTION, data)}
                for name in ("Check", "Watch"):
                    codes |= {await _code(channel, f"{HEALTH}{name}", data) for channel in (door, probes)}
                assert codes == {grpc.StatusCode.INVALID_ARGUMENT}, data
            assert await _code(door, f"{HEALTH}List", b"\xff") is grpc.StatusCode.INVALID_ARGUMENT
            for data in (b"\x0a\x01\x00", b"\x22\x03a\x00b", b"\x1a\x02..", b"\x2a\x02\x0a\x00", b"\x32\x01\x1b"):
                assert await _code(door, REFLECTION, data) is grpc.StatusCode.OK, data
            assert await _code(door, f"{HEALTH}Check", b"\x0a\x01\x00") is grpc.StatusCode.NOT_FOUND
    finally:
        await server.stop(grace=0)

    assert caplog.records == []


async def _code(channel: Any, path: str, data: bytes) -> grpc.StatusCode:
    """Of a call with this message."""
    if path == REFLECTION:
        call = channel.stream_stream(path)(iter([data]))
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:  # the code comes after the answers
                pass
    else:
        call = (channel.unary_stream if path.endswith("Watch") else channel.unary_unary)(path)(data)
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("path", [f"/{NAME}/UnaryUnary", f"/{NAME}/StreamStream", f"/{NAME}/Unknown"])
async def test_a_connection_whose_calls_are_reset_takes_no_more_than_its_places(path: str) -> None:
    """Further calls on it are refused before they are taken up, another connection is served, and a stop does not wait."""
    registry = CollectorRegistry()
    server = Server(["127.0.0.1:0"], registry=registry, bounds=Bounds(connection_calls_max=8, tenant_resets_second=0.01))
    server.add(register, Echo(), NAME)
    await server.start()
    intake = server._guard.intake
    assert intake is not None

    async with connected(server.addresses[0], window=65535) as peer:
        streams: list[int] = []

        def settled() -> bool:
            return len(intake._reset) == len(streams) or peer.ended[streams[-1]].is_set()

        for _ in range(30):
            streams.append(peer.begin(path))
            peer.reset(streams[-1])
            await eventually(settled, "it is kept or refused")
        await answers(server.addresses[0])
        await asyncio.wait_for(server.stop(grace=60), 30)

    assert [peer.ended[stream].is_set() for stream in streams] == [False] * 9 + [True] * 21, "gRPC lets one more than 8 in"
