"""`python -m service`: loads the engine, tests it, serves it, and drains. `calibrate` and `probe` are its other commands."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from ostinato import enums
from ostinato.digest import model_digest
from ostinato.v1 import types_pb2
from ostinato.v1.engine_pb2_grpc import add_EngineServicer_to_server
from serving.auth import Credentials, server_tls
from serving.hop import ServiceEnd, read_secret
from serving.logs import report_failure, setup
from serving.metrics import registry, serve_metrics
from serving.program import BAD_CONFIGURATION, DRAINED, FAILED, StartupError, exporting_traces, install_signal_handlers, run
from serving.server import Server, probe
from serving.settings import describe, read

from service.config import Settings
from service.description import HeldGrade, fingerprint
from service.engines import load, options, turbomind
from service.engines.base import Engine, EngineUnusable
from service.fence import Fence, SequenceFile
from service.grade import find_grade
from service.observe import Metrics
from service.prepare import Preparer, Workers
from service.stream import NAME, EngineServicer, Runs, Streams

IDLE_SECONDS = 2.0
"""A service that was told to stop ends the stream of a sidecar that has had no run for this long."""

T = TypeVar("T")
_log = logging.getLogger("service")


async def serve(settings: Settings, own: CollectorRegistry, stop: asyncio.Event) -> int:
    """Listens at once, loads and tests the engine meanwhile, serves until told to stop, and drains. The exit code."""
    workers = Workers(settings.prepare_threads, settings.prepare_queue_max)
    servicer = EngineServicer(workers)
    server = Server(
        settings.addresses,
        registry=own,
        message_bytes_max=settings.message_bytes_max,
        open_to_all=settings.allow_plaintext,
        socket_mode=int(settings.socket_mode, 8),
        credentials=Credentials(server_tls(settings), hop=ServiceEnd(read_secret(settings.engine_secret))),
    )
    server.add(add_EngineServicer_to_server, servicer, NAME)
    engine: Engine | None = None
    try:
        await server.start()
        _log.info("listening", extra={"addresses": ",".join(server.addresses)})
        engine, seconds = await load_engine(settings)
        install_signal_handlers(stop)
        file = SequenceFile(settings.state_dir / "sequences.json")
        starting = start_engine(engine, settings, Metrics(own), secrets.token_hex(16), file, seconds)
        servicer.streams = await _unless_stopped(stop, starting)
        if servicer.streams is not None:
            server.set_health(NAME, serving=True)
            _log.info("serving")
            await stop.wait()
            servicer.streams.drain(IDLE_SECONDS)
        await server.stop(settings.drain_seconds)
    finally:
        await server.stop(0)
        workers.close()
        if engine is not None:
            await engine.close()
    _log.info("drained")
    return DRAINED


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns. None once told to stop, and then it is cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def load_engine(settings: Settings) -> tuple[Engine, float]:
    """The loaded engine, and the seconds that took. Raises StartupError with one line about what is missing."""
    began = time.monotonic()
    try:
        engine = await asyncio.to_thread(load, settings)
    except EngineUnusable as error:
        raise StartupError(str(error)) from error
    seconds = round(time.monotonic() - began, 3)
    _log.info("engine loaded", extra={"engine": engine.name, "model": engine.model_name, "seconds": seconds})
    return engine, seconds


async def start_engine(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    incarnation: str,
    file: SequenceFile | None = None,
    load_seconds: float = 0.0,
) -> Streams:
    """Starts the engine, finds its grade, and returns what serves it. Raises StartupError where a required grade is missed.
    `load_seconds` is for the log."""
    fence = Fence(sequences=file.read() if file is not None else {})
    identity = fingerprint(engine.fields)
    metrics.describe(engine.capacity, identity.digest, identity.fields)
    metrics.include(engine)
    held = HeldGrade()
    held.watch(lambda: metrics.grade.set(held.grade))
    runs = Runs(engine, held, metrics)
    runs.start()
    limits = settings.limits(engine.context_tokens, engine.top_k_max)
    preparer = Preparer(engine.vocabulary, limits, engine.check_format, model_digest(identity.fields), chat=engine.chat)
    await asyncio.to_thread(preparer.lexicon.warm)
    await _earn_grade(held, identity.digest, runs, settings, metrics, load_seconds)
    return Streams(settings, runs, preparer, metrics, identity, incarnation, fence, file)


async def _earn_grade(
    held: HeldGrade, digest: bytes, runs: Runs, settings: Settings, metrics: Metrics, load_seconds: float
) -> None:
    began = time.monotonic()
    finding = await find_grade(runs, digest, settings.self_test, settings.state_dir, settings.self_test_timeout_seconds)
    held.earn(finding.grade, finding.reason)
    metrics.self_test_seconds.set(finding.seconds)
    name = enums.word(types_pb2.Grade, held.grade)
    proof_seconds = runs.engine.proof_seconds
    costs = {"load": load_seconds - proof_seconds, "proof": proof_seconds, "self_test": time.monotonic() - began}
    seconds = {f"{part}_seconds": round(max(0.0, value), 3) for part, value in costs.items()}
    _log.info("grade earned", extra={"grade": name, "reason": held.reason, "rests_on": runs.engine.ceiling[1], **seconds})
    if held.grade < settings.required_grade:
        raise StartupError(f"--require-grade: {settings.require_grade} is required, {name} was earned: {held.reason}")


def calibrate(settings: Settings) -> int:
    """`python -m service calibrate`: proves on this GPU what an exact start needs, for the next start with the same settings.
    Nothing listens meanwhile, and there is no self-test.

    The exit code: 0; 1 where something is not covered or cannot be loaded; 2 for an engine that has nothing to prove.
    """
    chosen = options(settings)
    if not isinstance(chosen, turbomind.TurbomindOptions):
        why = f"calibrate: --engine {settings.engine} has no products to prove; only turbomind has"
        report_failure("service", why, BAD_CONFIGURATION)
        return BAD_CONFIGURATION
    try:
        engine = turbomind.load(chosen)
    except EngineUnusable as error:
        report_failure("service", f"calibrate: {error}", FAILED)
        return FAILED
    sys.stdout.write(engine.exactness.table() + "\n")
    asyncio.run(engine.close())
    return FAILED if engine.exactness.why_not else DRAINED


def main() -> None:
    """Exits."""
    if sys.argv[1:2] == ["probe"]:
        sys.exit(probe(Settings, "service", sys.argv[2:], os.environ))
    calibrating = sys.argv[1:2] == ["calibrate"]
    settings, sources = read(Settings, "service", sys.argv[2 if calibrating else 1 :], os.environ)
    setup(settings.log_format, settings.log_level)
    _log.info("settings: %s", describe(settings.effective, sources))
    if calibrating:
        sys.exit(calibrate(settings))

    async def traced_service(stop: asyncio.Event) -> int:
        own = registry()
        with exporting_traces(settings.traces, "ostinato.service"), serve_metrics(own, settings.metrics) as port:
            _log.info("metrics", extra={"port": port})
            return await serve(settings, own, stop)

    sys.exit(run("service", traced_service))


if __name__ == "__main__":
    main()
