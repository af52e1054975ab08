"""`python -m service`: the wiring, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from ostinato.v1.engine_pb2_grpc import add_EngineServicer_to_server
from serving.logs import setup
from serving.metrics import registry, serve_metrics
from serving.program import DRAINED, exporting_traces, install_signal_handlers, run
from serving.server import Server, probe
from serving.settings import describe, read

from service.calibration import calibrate
from service.config import Settings
from service.engines.base import Engine
from service.memory import Memory
from service.metrics import Metrics
from service.opening import make_ready, open_engine
from service.servicer import NAME, EngineServicer, Workers

IDLE_SECONDS = 2.0
"""Told to stop, a service lets a sidecar go that has asked for nothing for this long."""

T = TypeVar("T")
_log = logging.getLogger("service")


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Listen at once, load and test the engine meanwhile, serve until told to stop, and drain."""
    own = registry()
    page = serve_metrics(own, settings.metrics)
    workers = Workers(settings.prepare_threads, settings.prepare_queue_max)
    servicer = EngineServicer(workers)
    server = Server(
        settings.addresses,
        registry=own,
        message_bytes_max=settings.message_bytes_max,
        allow_remote=settings.allow_remote,
        socket_mode=int(settings.socket_mode, 8),
    )
    server.add(add_EngineServicer_to_server, servicer, NAME)
    engine: Engine | None = None
    try:
        await server.start()
        _log.info("listening", extra={"addresses": ",".join(server.addresses)})
        _log.info("metrics", extra={"port": page.port})
        engine, seconds = await open_engine(settings)
        install_signal_handlers(stop)
        memory = Memory(settings.state_dir / "sequences.json")
        making = make_ready(engine, settings, Metrics(own), secrets.token_hex(16), memory, seconds)
        servicer.ready = await _unless(stop, making)
        if servicer.ready is not None:
            await server.set_health(NAME, serving=True)
            _log.info("serving")
            await stop.wait()
            servicer.ready.streams.drain(IDLE_SECONDS)
        await server.stop(settings.drain_seconds)
    finally:
        await server.stop(0)
        workers.close()
        if engine is not None:
            await engine.close()
        page.close()
    _log.info("drained")
    return DRAINED


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None, and no more of it, once told to stop."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def main() -> None:
    """Never returns."""
    if sys.argv[1:2] == ["probe"]:
        sys.exit(probe(Settings, "service", sys.argv[2:], os.environ))
    calibrating = sys.argv[1:2] == ["calibrate"]
    settings, sources = read(Settings, "service", sys.argv[2 if calibrating else 1 :], os.environ)
    setup(settings.log_format, settings.log_level)
    _log.info("settings: %s", describe(settings.effective, sources))
    if calibrating:
        sys.exit(calibrate(settings))

    async def traced_service(stop: asyncio.Event) -> int:
        with exporting_traces(settings.traces, "ostinato.service"):
            return await serve(settings, stop)

    sys.exit(run("service", traced_service))


if __name__ == "__main__":
    main()
