"""gRPC's own services beside ours: health, reflection, channelz."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ostinato.serving.handlers import Context, behaviour_of, rebuilt


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Check is gRPC's. List is ours, where gRPC knows of it; and Watch, since gRPC's holds a lock while it writes, and a
    watcher that does not read would keep `set` waiting. The empty name stands for the process, which is SERVING from its
    start to its stop."""

    def __init__(self) -> None:
        super().__init__()
        self._bells: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        """Of those who watch, by service."""

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        bell, name = asyncio.Event(), request.service
        self._bells[name].add(bell)
        try:
            told = None
            while True:
                bell.clear()
                status = self._server_status.get(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                await bell.wait()
        finally:
            self._bells[name].discard(bell)
            if not self._bells[name]:
                del self._bells[name]

    async def _set(self, service: str, status: int) -> None:
        self._server_status[service] = status
        for bell in self._bells.get(service, ()):
            bell.set()

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:  # noqa: N802
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


def add_standard(server: grpc.aio.Server, own: Sequence[str], *, debug: bool) -> Health:
    """Adds health and reflection for the services `own`, and with `debug` channelz."""
    served = Health()
    health_pb2_grpc.add_HealthServicer_to_server(served, server)
    names = [*own, health.SERVICE_NAME, reflection.SERVICE_NAME]
    if debug:
        channelz.add_channelz_servicer(server)
        names.append("grpc.channelz.v1.Channelz")
    reflection.enable_server_reflection(names, server)
    return served


class Bystanders(grpc.aio.ServerInterceptor):
    """Ends health watches and reflection streams when the server stops: they never end by themselves, and would hold every
    drain open for its whole grace."""

    def __init__(self) -> None:
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """Ends them all with UNAVAILABLE."""
        self._closed = True
        for call in self._calls:
            call.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming or not handler_call_details.method.startswith("/grpc."):
            return handler
        behaviour = behaviour_of(handler)

        async def ending(request: Any, context: Context) -> None:
            call = asyncio.current_task()
            assert call is not None, "a handler runs in a task"
            self._calls.add(call)
            try:
                await behaviour(request, context)
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            finally:
                self._calls.discard(call)

        return rebuilt(handler, ending, handler.request_deserializer, handler.response_serializer)
