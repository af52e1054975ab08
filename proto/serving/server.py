"""A gRPC server: addresses, health, reflection, start, stop, and the command that asks for its health.

    server = Server(["unix:/run/ostinato/engine.sock", "127.0.0.1:7001"], registry=registry)
    server.add(add_EngineServicer_to_server, servicer, "ostinato.v1.Engine")
    await server.start()
    server.set_health("ostinato.v1.Engine", serving=True)
    ...
    await server.stop(grace=10)

An address is `unix:/absolute/path`, or `host:port` where host is an IP address or `localhost`, which is 127.0.0.1: of a name
with two addresses gRPC could bind only one, without an error.

Anyone who reaches a TCP port can use it, so beyond loopback callers must prove who they are, and their tokens must not travel
in clear text; a flag each allows the contrary. TLS is for TCP; the mode of a unix socket guards it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import ipaddress
import logging
import os
import re
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from ostinato.v1 import engine_pb2_grpc
from serving import files
from serving.auth import NONE, Context, Credentials
from serving.handlers import Guard, Unwritten
from serving.hop import PEER_SUFFIX
from serving.intake import Bounds, connections_allowed
from serving.logs import one_line
from serving.program import BAD_CONFIGURATION, StartupError
from serving.settings import lookup

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""gRPC's own default, for requests."""
PENDING_CALLS_MAX = 1 << 16
"""That have arrived and that no handler has taken up yet."""
FEW_CONNECTIONS = 16
"""To each address of a server without bounds, which is the service's: its sidecar, the one that follows, and probes."""
PATH_BYTES_MAX = 107
"""Of a socket's path, by the kernel."""
OPEN = "anyone who reaches it could do everything: require credentials, use loopback or a unix socket, or allow it with --open"
IN_CLEAR_TEXT = "tokens could be read on the way: turn TLS on, or allow it with --allow-plaintext-tokens"
UNPROVEN = "the sidecar cannot prove itself there: use unix:/path, --engine-secret on both programs, or --tls-certificate"
HOP_IN_CLEAR_TEXT = "prompts could be read on the way: turn TLS on, use loopback, or allow it with --allow-plaintext"
"""Why an address beyond loopback is refused."""
GRPC_LOGGER = "grpc._cython.cygrpc"

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

S = TypeVar("S")


class Server:
    """One server of a program. To be made inside the event loop it runs on."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        registry: CollectorRegistry,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        open_to_all: bool = False,
        plaintext_tokens: bool = False,
        socket_mode: int = 0o660,
        credentials: Credentials = NONE,
        health_address: str = "",
        unwritten: Unwritten | None = None,
        write_seconds: float | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """Binds nothing yet. `open_to_all` and `plaintext_tokens` allow addresses beyond loopback although callers need no
        credentials, and although tokens can be read on the way. `health_address`: a port in plain text with health on it and
        nothing else, open to all: probes have no certificate. `unwritten`, `write_seconds`, `bounds`: as for Guard. Raises
        StartupError that names the flag, --listen or --health-listen, of an address that cannot be parsed, or is remote and not
        allowed."""
        self._credentials = credentials
        refused = _refusal(credentials, open_to_all, plaintext_tokens)
        self._addresses = [parse_address("--listen", text, refused) for text in addresses]
        if refused == UNPROVEN and (ports := [str(address) for address in self._addresses if isinstance(address, Tcp)]):
            raise StartupError(f"--listen: {ports[0]!r}: {UNPROVEN}", exit_code=BAD_CONFIGURATION)
        self._health_address = parse_address("--health-listen", health_address) if health_address else None
        self._socket_mode = socket_mode
        self._guard = Guard(registry, credentials, unwritten, write_seconds, bounds)
        self._services: list[str] = []
        self._health: Health | None = None
        exclusive = ("grpc.so_reuseport", 0)  # with it on, a second server would share a port without an error
        logging.getLogger(GRPC_LOGGER).addFilter(is_worth_logging)
        self._probe_guard = Guard(CollectorRegistry(), bounds=bounds)  # health is not counted: this registry stays empty
        bounded = bounds.options() if bounds is not None else []
        places = len(self._addresses) + (self._health_address is not None)
        connections = connections_allowed(bounds.connections_max if bounds is not None else None, places)
        connections = connections if bounds is not None else min(connections, FEW_CONNECTIONS)
        bounded.append(("grpc.max_allowed_incoming_connections", connections))
        pending = bounds.calls_max if bounds is not None else PENDING_CALLS_MAX
        self._probed = grpc.aio.server(handlers=[self._probe_guard], options=[exclusive, *bounded])
        self._grpc = grpc.aio.server(
            handlers=[self._guard],
            options=[
                exclusive,
                ("grpc.max_receive_message_length", message_bytes_max),
                # Beyond a thousand gRPC would end calls by itself, with a bare CANCELLED. We refuse them with a reason.
                ("grpc.server.max_pending_requests", pending),
                ("grpc.server.max_pending_requests_hard_limit", pending),
                # A peer that has vanished is noticed within about two minutes, and its calls end. Peers may ping us more often
                # than gRPC would let them.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                *bounded,
            ],
        )
        self.addresses: list[str] = []
        """Where it listens, real ports filled in; known after `start`."""
        self.health_address = ""
        """The same of the port for probes."""

    def add(self, register: Callable[[S, Any], None], servicer: S, name: str) -> None:
        """Serves `servicer`, by its generated `add_…Servicer_to_server`, under its full name. Before `start`."""
        register(servicer, self._guard)
        self._services.append(name)

    async def start(self) -> None:
        """Listens. Our services are NOT_SERVING until `set_health` says otherwise. Raises StartupError with the address that
        cannot be had."""
        self._health = Health({"": SERVING} | dict.fromkeys(self._services, NOT_SERVING))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._guard)
        reflected = reflection.aio.ReflectionServicer([*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME])
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, self._guard)
        hop = self._credentials.hop
        if hop is not None:
            engine_pb2_grpc.add_HopServicer_to_server(hop, self._guard)  # type: ignore[arg-type]
        tls = self._credentials.tls
        for address in self._addresses:
            credentials = tls.credentials() if tls is not None else None  # each port has its own
            self.addresses.append(address.bind(self._grpc, self._socket_mode, credentials))
            if hop is not None and not hop.shared and isinstance(address, Unix):
                await hop.hand_out(address.beside(PEER_SUFFIX).listening())
        if self._health_address is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probe_guard)
            self.health_address = self._health_address.bind(self._probed, self._socket_mode)
            await self._probed.start()
        await self._grpc.start()

    def set_health(self, *names: str, serving: bool) -> None:
        """Says of these services whether they serve. Without effect once stopping."""
        assert self._health is not None, "start comes first"
        for name in names:
            self._health.set(name, SERVING if serving else NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Refuses new calls (UNAVAILABLE), lets open calls end for `grace` seconds, then cancels them. Health says
        NOT_SERVING from the first moment. May be called again, also before `start`."""
        if self._health is not None:
            self._health.stop()
        for guard in (self._guard, self._probe_guard):
            guard.close_streams()
        if self._credentials.hop is not None:
            self._credentials.hop.close()
        await asyncio.gather(self._grpc.stop(grace), self._probed.stop(grace))


def _refusal(credentials: Credentials, open_to_all: bool, plaintext_tokens: bool) -> str:
    """Why an address beyond loopback is refused, and, if it is UNPROVEN, every port; empty: it is not."""
    if credentials.hop is not None and credentials.tls is None:
        if not credentials.hop.shared:
            return UNPROVEN
        return "" if open_to_all else HOP_IN_CLEAR_TEXT
    if not (credentials.proven or open_to_all):
        return OPEN
    in_clear_text = credentials.tokens is not None and credentials.tls is None and not plaintext_tokens
    return IN_CLEAR_TEXT if in_clear_text else ""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """gRPC's own service keeps a lock while it writes to a watcher, so that one that does not read keeps `set` waiting; and it
    has no List. The empty name stands for the process, which is SERVING from its start to its stop."""

    def __init__(self, statuses: Mapping[str, int]) -> None:
        self._statuses = dict(statuses)
        self._changed: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        """Of the watchers, by service."""
        self._stopped = False

    def set(self, name: str, status: int) -> None:
        """Without effect after `stop`."""
        if not self._stopped:
            self._statuses[name] = status
            for changed in self._changed.get(name, ()):
                changed.set()

    def stop(self) -> None:
        """Everything is NOT_SERVING from now on."""
        for name in self._statuses:
            self.set(name, NOT_SERVING)
        self._stopped = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:  # noqa: N802
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        name, changed, sent = request.service, asyncio.Event(), None
        self._changed[name].add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != sent:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    sent = status
                await changed.wait()
        finally:
            self._changed[name].discard(changed)
            if not self._changed[name]:
                del self._changed[name]

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:  # noqa: N802
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """False for gRPC's traceback of a client that left while it was written to: it is logged where the client's end of the call
    is not known yet, which is a race. An operation that gRPC did not even start is our mistake, and is logged."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, grpc.aio.InternalError) and str(error).startswith('Failed "execute_batch"'))


@dataclass(frozen=True, slots=True)
class Tcp:
    """A port."""

    flag: str
    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def local(self) -> bool:
        return self.host.is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.host.version == 6 else f"{self.host}:{self.port}"

    def bind(self, server: grpc.aio.Server, _mode: int, tls: grpc.ServerCredentials | None = None) -> str:
        """Binds and returns the address with its real port. Raises StartupError."""
        try:
            port = server.add_insecure_port(str(self)) if tls is None else server.add_secure_port(str(self), tls)
            return str(replace(self, port=port))
        except RuntimeError as error:
            family = socket.AF_INET6 if self.host.version == 6 else socket.AF_INET
            why = _bind_error(family, (str(self.host), self.port))
            raise StartupError(f"{self.flag}: cannot listen on {self}: {why or error}") from error


@dataclass(frozen=True, slots=True)
class Unix:
    """A socket file."""

    flag: str
    path: Path
    local = True

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def bind(self, server: grpc.aio.Server, mode: int, _tls: grpc.ServerCredentials | None = None) -> str:
        """Binds in plain text, with this mode on the file. Raises StartupError."""
        with self._bound(mode):
            server.add_insecure_port(str(self))
        return str(self)

    def beside(self, suffix: str) -> Unix:
        """The socket whose path ends so, in the same folder."""
        return cast(Unix, parse_address(self.flag, f"{self}{suffix}"))

    def listening(self) -> socket.socket:
        """A socket that listens there, for this process's user only. Raises StartupError."""
        made = socket.socket(socket.AF_UNIX)
        with self._bound(0o600):
            made.bind(str(self.path))
        made.listen()
        return made

    @contextmanager
    def _bound(self, mode: int) -> Iterator[None]:
        """Around the call that binds."""
        try:
            self._check_folder()
            self._clear()
            before = os.umask(0o777 & ~mode)  # the mode holds from the first moment, not from chmod on
            try:
                yield
            finally:
                os.umask(before)
            self.path.chmod(mode)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        except RuntimeError as error:
            raise self._error(_bind_error(socket.AF_UNIX, str(self.path)) or str(error)) from error

    def _error(self, why: str) -> StartupError:
        return StartupError(f"{self.flag}: cannot listen on {self}: {why}")

    def _check_folder(self) -> None:
        """Makes a folder that is missing. A user who may write there could replace our socket by another."""
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        except FileExistsError:
            raise self._error(f"{folder} is no directory") from None
        except OSError as error:
            raise self._error(f"{folder} cannot be made: {error.strerror}") from error
        files.check(files.resolved(folder), folder.stat())

    def _clear(self) -> None:
        """Removes the socket of a process that was killed. gRPC would also take the path of a running one, or of a file."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise self._error("the file is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
        raise self._error("Address already in use")


Address = Tcp | Unix


def _bind_error(family: int, address: Any) -> str:
    """Why the kernel refuses this address, or nothing; gRPC does not say it."""
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return os.strerror(error.errno or 0)
    if family == socket.AF_UNIX:
        Path(address).unlink(missing_ok=True)
    return ""


def parse_address(flag: str, text: str, refused: str = "") -> Address:
    """Raises StartupError that names the flag, for a text that is no address. `refused`: why one beyond loopback is refused;
    empty: it is not."""

    def wrong(why: str) -> StartupError:
        return StartupError(f"{flag}: {text!r}: {why}", exit_code=BAD_CONFIGURATION)

    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:"))
        if not path.is_absolute():
            raise wrong("a socket's path is absolute")
        if (size := len(os.fsencode(path))) > PATH_BYTES_MAX:
            raise wrong(f"a socket's path is at most {PATH_BYTES_MAX} bytes long, this one is {size}")
        return Unix(flag, path)
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        parsed = Tcp(flag, address, int(port))
    except ValueError:
        raise wrong("is no address: unix:/path, or an IP address (or localhost) and a port") from None
    if not 0 <= parsed.port <= 65535:
        raise wrong("a port is 0 to 65535")
    if refused and not parsed.local:
        raise wrong(refused)
    return parsed


def check_target(flag: str, text: str) -> None:
    """Raises ValueError for a text that is not the address of a server; gRPC would try to reach it for ever."""
    path = text.removeprefix("unix:")
    if path == text:
        if not re.fullmatch(r"\S+:\d{1,5}|unix-abstract:\S+", text):
            raise ValueError(f"{flag}: {text!r} is no address: unix:path or host:port")
    elif not path or len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ValueError(f"{flag}: {text!r}: a socket's path is 1 to {PATH_BYTES_MAX} bytes long")


def probe(settings: type, program: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code. Asks at the port for probes, or where `program` listens, as its environment and its settings file say; the
    flags that it runs with cannot be known here, hence --address. In plain text. Raises SystemExit(2) for bad flags."""
    parser = argparse.ArgumentParser(prog=f"python -m {program} probe", allow_abbrev=False)
    parser.add_argument("service", nargs="?", default="", help="full name of a gRPC service; none: the process")
    parser.add_argument(
        "--address", help="host:port or unix:/path [default: where the program listens, as far as can be known]"
    )
    parser.add_argument("--config", help="the program's settings file, where the environment does not name it")
    parser.add_argument("--timeout-seconds", type=float, default=2.0, help="for the answer [default 2]")
    given = parser.parse_args(argv)
    try:
        address = given.address or _address(settings, program, environ, given.config)
    except ValueError as error:
        parser.error(str(error))
    if not 0 < given.timeout_seconds <= 3600:
        parser.error("--timeout-seconds: is not above 0 and at most 3600")
    healthy, answer = check_health(address, given.service, given.timeout_seconds)
    print(one_line(f"{answer}: {given.service or program} at {address}"))  # noqa: T201  # this is its answer
    return 0 if healthy else 1


def _address(settings: type, program: str, environ: Mapping[str, str], config: str | None) -> str:
    """Raises ValueError for settings that do not say it."""
    names = [name for name in ("health_listen", "listen") if name in {field.name for field in dataclasses.fields(settings)}]
    for name in names:
        found = lookup(settings, program, name, environ, config)
        if found:
            return str(found if isinstance(found, str) else found[0])
    raise ValueError(f"{program} listens nowhere")


def check_health(address: str, service: str, timeout_seconds: float) -> tuple[bool, str]:
    """Whether it serves, and the health status; or the status code and why there is none."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            return False, f"{error.code().name} ({' '.join(str(error.details()).split())})"
    return answer.status == SERVING, health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
