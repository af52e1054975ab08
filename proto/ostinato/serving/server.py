"""A gRPC server of ours: addresses, health, reflection, start and stop.

    server = Server(["unix:/run/ostinato/engine.sock", "127.0.0.1:7001"], registry=registry)
    server.add(add_EngineServicer_to_server, servicer, "ostinato.v1.Engine")
    await server.start()
    await server.set_health("ostinato.v1.Engine", serving=True)
    ...
    await server.stop(grace=10)

Anyone who reaches a plain TCP port can use it, so without TLS all but loopback is refused unless it is allowed by name. TLS
is for TCP; a unix socket is guarded by its mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from ostinato.serving.addresses import parse
from ostinato.serving.credentials import NONE, Credentials
from ostinato.serving.guard import Guard
from ostinato.serving.handlers import Unwritten
from ostinato.serving.standard import Bystanders, Health, add_standard

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""gRPC's own default, for requests."""
GRPC_LOGGER = "grpc._cython.cygrpc"
PENDING_CALLS_MAX = 1 << 16
"""That have arrived and that no handler has taken up yet."""

S = TypeVar("S")


class Server:
    """One server of a program. To be made inside the event loop it runs on."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        registry: CollectorRegistry,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        allow_remote: bool = False,
        socket_mode: int = 0o660,
        credentials: Credentials = NONE,
        health_address: str = "",
        unwritten: Unwritten | None = None,
        write_seconds: float | None = None,
    ) -> None:
        """Binds nothing yet. `health_address`: a port in plain text with health on it and nothing else, open to all: probes
        have no certificate. `unwritten`, `write_seconds`: as for Guard. Raises StartupError that names the flag, --listen or
        --health-listen, of an address that cannot be parsed, or that is remote and not allowed."""
        self._credentials = credentials
        self._addresses = [parse("--listen", text, allow_remote or credentials.tls is not None) for text in addresses]
        self._health_address = parse("--health-listen", health_address, allow_remote=True) if health_address else None
        self._socket_mode = socket_mode
        self._bystanders = Bystanders()
        self._services: list[str] = []
        self._health: Health | None = None
        exclusive = ("grpc.so_reuseport", 0)  # with it on, a second server would share a port in silence
        logging.getLogger(GRPC_LOGGER).addFilter(worth_a_line)
        # Health alone is not counted: the registry stays empty.
        self._probed = grpc.aio.server(interceptors=[Guard(CollectorRegistry()), self._bystanders], options=[exclusive])
        self._grpc = grpc.aio.server(
            interceptors=[Guard(registry, credentials, unwritten, write_seconds), self._bystanders],
            options=[
                exclusive,
                ("grpc.max_receive_message_length", message_bytes_max),
                # Beyond a thousand gRPC would end calls by itself, with a bare CANCELLED. Ours are refused with a reason.
                ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
                ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
                # A peer that vanished without a word is noticed within about two minutes, and its calls end; peers may ask us
                # the same, more often than gRPC would let them.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        self.addresses: list[str] = []
        """Where it listens, real ports filled in; known after `start`."""
        self.health_address = ""
        """The same of the port for probes."""

    def add(self, register: Callable[[S, grpc.aio.Server], None], servicer: S, name: str) -> None:
        """Serves `servicer`, by its generated `add_…Servicer_to_server`, under its full name. Before `start`."""
        register(servicer, self._grpc)
        self._services.append(name)

    async def start(self) -> None:
        """Listens. Our services are NOT_SERVING until `set_health` says otherwise. Raises StartupError with the address that
        cannot be had."""
        local = all(address.local for address in self._addresses)
        self._health = add_standard(self._grpc, self._services, debug=local or self._credentials.asked)
        for name in self._services:
            await self.set_health(name, serving=False)
        for address in self._addresses:
            self.addresses.append(address.bind(self._grpc, self._socket_mode, self._credentials.port_credentials()))
        if self._health_address is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
            self.health_address = self._health_address.bind(self._probed, self._socket_mode)
            await self._probed.start()
        await self._grpc.start()

    async def set_health(self, name: str, *, serving: bool) -> None:
        """Says of the service `name` whether it serves. Without effect once stopping."""
        assert self._health is not None, "start comes first"
        status = health_pb2.HealthCheckResponse
        await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Refuses new calls (UNAVAILABLE), lets those under way end for `grace` seconds, then cancels them. Health says
        NOT_SERVING from the first moment. May be called again, also before `start`."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        self._bystanders.close()
        await asyncio.gather(self._grpc.stop(grace), self._probed.stop(grace))


def worth_a_line(record: logging.LogRecord) -> bool:
    """False for gRPC's traceback of a client that left while it was written to: it is logged where the client's end of the call
    is not known yet, which is a race. An operation that gRPC did not even start is our mistake, and is logged."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, grpc.aio.InternalError) and str(error).startswith('Failed "execute_batch"'))
