"""`python -m sidecar`: wiring, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry

from ostinato import install_hint
from ostinato.errors import JournalUnavailable, OstinatoError, RecordDamaged
from ostinato.v1 import engine_pb2
from ostinato.v1.generation_pb2_grpc import add_GenerationServicer_to_server
from ostinato.v1.sequencer_pb2_grpc import add_SequencerServicer_to_server
from serving import auth, logs, program
from serving.hop import SidecarEnd, read_secret
from serving.metrics import registry, serve_metrics
from serving.server import Server, probe
from serving.settings import describe, read

from sidecar.api import GenerationServicer, SequencerServicer
from sidecar.checks import Auditor, CanaryRunner, read_canaries
from sidecar.config import Settings, is_shared
from sidecar.core import events as ev
from sidecar.divergence.output import DivergenceCollector
from sidecar.divergence.tracker import DivergenceTracker
from sidecar.held import Held
from sidecar.journal.diagnosis import RESTORE
from sidecar.journal.mark import HighWater, MarkFile, shares_disk
from sidecar.journal.model import JournalBroken, Unfinished
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink
from sidecar.observe import Metrics, Observer
from sidecar.opening import open_journal
from sidecar.pipeline import Pipeline
from sidecar.witness import Publisher, Witness

log = logging.getLogger("sidecar")

DRAIN_END_SECONDS = 5.0
"""After `drain_seconds`, for the last outcomes to become durable."""
SWITCH_SECONDS = 0.001
"""The journal's thread waits at most this long for the interpreter. Python's 5 ms would delay each append."""

GENERATION, SEQUENCER = "ostinato.v1.Generation", "ostinato.v1.Sequencer"


class Sidecar:
    """One sidecar."""

    def __init__(self, settings: Settings, numbers: CollectorRegistry) -> None:
        self.settings = settings
        self.numbers = numbers
        self.credentials = _credentials(settings)
        hop, tls = _engine_credentials(settings)
        with program.configuring("--canaries"):
            watched = read_canaries(settings.canaries)
        gateway = _gateway() if settings.vllm_face else None
        self.tracker = DivergenceTracker(settings.writer)
        self.observer = Observer(Metrics(numbers), self.tracker.not_compared)
        numbers.register(DivergenceCollector(lambda: self.tracker.restored_counts))
        self.held = Held(settings.held, self.observer.lost)
        self.server = Server(
            settings.listen,
            registry=numbers,
            message_bytes_max=settings.message_bytes_max,
            open_to_all=settings.open,
            plaintext_tokens=settings.allow_plaintext_tokens,
            credentials=self.credentials,
            health_address=settings.health_listen,
            unwritten=self.held,
            write_seconds=settings.unread_seconds_max,
            bounds=settings,
        )
        self.store = open_journal(settings, wall_millis())
        self.journal = Journal(
            self.store,
            now_millis=wall_millis,
            on_commit=self.observer.committed,
            on_entries=self.tracker.committed,
            on_taken=self._take_over,
            on_damaged=self.observer.damaged,
        )
        self.high_water = HighWater(MarkFile(settings.mark), self.journal) if settings.mark is not None else None
        if settings.mark is not None and not is_shared(settings.journal) and shares_disk(settings.mark, Path(settings.journal)):
            self.observer.mark_shares_disk(settings.mark)
        self.link = EngineLink(settings.engine, settings.reconnect_seconds, hop, tls, self.held.alone)
        self.pipeline = Pipeline(settings, self.journal, self.link, self.observer, self.held, time.monotonic, os.urandom)
        self.auditor = Auditor(self.pipeline, settings)
        self.canaries = CanaryRunner(self.pipeline, watched, settings.canary_seconds)
        generation = GenerationServicer(self.pipeline, settings)
        self.services = [GENERATION]
        self.server.add(add_GenerationServicer_to_server, generation, GENERATION)
        witness = Witness(settings.witness_keys, self.journal, self.observer) if settings.witness_keys is not None else None
        self.publisher = Publisher(settings, self.journal, self.observer) if settings.witness else None
        sequencer = SequencerServicer(self.pipeline, self.tracker, settings, witness)
        self.server.add(add_SequencerServicer_to_server, sequencer, SEQUENCER)
        if gateway is not None:
            self.server.add(gateway.register, gateway.VllmServicer(generation, self.pipeline, settings), gateway.NAME)
            self.services.append(gateway.NAME)

    async def run(self, stop: asyncio.Event) -> int:
        """Until `stop` is set, or until the process must end and recover. The exit code."""
        self.observer.opened(self.store.head)
        with reading(self.settings):
            await self.pipeline.fingerprints.load()
            await self.tracker.restore(self.journal)
            await self.pipeline.quota.restore(self.journal)
            self.pipeline.recover(self.store.to_recover)
            await self.auditor.read_back()
        await self.server.start()
        listening = {"addresses": ",".join(self.server.addresses), "health_address": self.server.health_address}
        log.info("listening", extra={**listening, "epoch": self.store.head.epoch})
        log.info("waiting for the engine", extra={"address": self.settings.engine})
        self.server.set_health(SEQUENCER, serving=True)
        running = [
            self.link.run(self.pipeline, self._hello),
            self._watch_clock(),
            self.credentials.watch(self.numbers),
            self.tracker.run(self.journal),
            self.pipeline.quota.run(self.journal),
            *(each.run() for each in (self.publisher, self.high_water) if each is not None),
        ]
        stopped, *tasks = map(asyncio.ensure_future, (stop.wait(), *running))
        ending: list[asyncio.Future[Any]] = [stopped, *tasks, self.pipeline.broken, self.journal.broken]
        done, pending = await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        if done == {stopped}:
            done = await self._drain(pending)
        done.discard(stopped)
        for cause in done:
            _say_why(cause)
        code = program.FAILED if done else program.DRAINED
        await self.server.stop(grace=1.0 if code == program.DRAINED else 0.0)
        await self.link.close()
        for task in pending:
            task.cancel()
        with contextlib.suppress(JournalBroken):
            await self.tracker.save(self.journal)
            await self.pipeline.quota.save(self.journal)
            if self.high_water is not None:
                await self.high_water.write()
        await self.journal.close()
        return code

    def _take_over(self, unfinished: Sequence[Unfinished]) -> None:
        if not self.pipeline.core.draining:  # else another sidecar takes them over when this lease ends
            self.observer.taken_over(unfinished)
            self.pipeline.recover(unfinished)

    async def _hello(self) -> engine_pb2.Hello:
        head = await self.journal.head()
        return engine_pb2.Hello(
            log_id=head.log_id,
            writer=head.writer,
            epoch=head.epoch,
            last_sequence=head.last_sequence,
            head_hash=head.entry_hash,
        )

    async def _watch_clock(self) -> None:
        """Every tick: deadlines, checks that are due, and whether requests can be admitted."""
        serving = False
        while True:
            self.pipeline.dispatch(ev.Tick())
            self.auditor.tick()
            self.canaries.tick()
            self.observer.metrics.journal_full.set(self.journal.full)
            can_admit = self.pipeline.engine is not None and not self.journal.full and not self.pipeline.core.draining
            if can_admit != serving:
                serving = can_admit
                self.server.set_health(*self.services, serving=serving)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.pipeline.engine_changed.wait(), self.settings.tick_seconds)
            self.pipeline.engine_changed.clear()

    async def _drain(self, ending: AbstractSet[asyncio.Future[Any]]) -> set[asyncio.Future[Any]]:
        """Finish what can be finished. Which of `ending` are done: then nothing can be finished any more."""
        self.pipeline.dispatch(ev.Drain())
        log.info("draining", extra={"unfinished": len(self.pipeline.items)})
        self.server.set_health(*self.services, serving=False)
        drained = asyncio.create_task(self.pipeline.drained.wait())
        first: AbstractSet[asyncio.Future[Any]] = {drained, *ending}
        done, _ = await asyncio.wait(first, timeout=self.settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            self.pipeline.dispatch(ev.DrainEnd())
            # Not for ever: while the journal is full, outcomes are left to recovery.
            done, _ = await asyncio.wait(first, timeout=DRAIN_END_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        log.info("drained", extra={"left_to_recovery": len(self.pipeline.items)})
        return done - {drained}


def _credentials(settings: Settings) -> auth.Credentials:
    """Raises StartupError that names the flag and the file."""
    listed = auth.load_tokens(settings.tokens) if settings.tokens is not None else None
    return auth.Credentials(auth.server_tls(settings), listed, settings.trust_tenant_metadata)


def _engine_credentials(settings: Settings) -> tuple[SidecarEnd | None, grpc.ChannelCredentials | None]:
    """How each end of the engine stream proves itself. Raises StartupError that names the flag and the file."""
    secret = read_secret(settings.engine_secret)
    if settings.engine_ca is None or settings.engine_certificate is None or settings.engine_key is None:
        return SidecarEnd(settings.engine, secret), None
    from serving.tls import client_credentials

    tls = client_credentials(settings.engine_ca, settings.engine_certificate, settings.engine_key)
    return SidecarEnd(settings.engine, secret) if secret else None, tls


@contextlib.contextmanager
def reading(settings: Settings) -> Iterator[None]:
    """Around what is read before anything is served. Raises StartupError if the journal is unavailable or damaged."""
    name = "the database" if is_shared(settings.journal) else settings.journal
    try:
        yield
    except JournalUnavailable as error:
        raise program.StartupError(f"--journal: {error}") from error
    except (JournalBroken, RecordDamaged) as error:
        raise program.StartupError(f"--journal: {name}: {error.args[0]}: look at it with verify") from error
    except DecodeError as error:
        raise program.StartupError(f"--journal: {name} is damaged: an entry's payload cannot be read: {RESTORE}") from error


def _gateway() -> ModuleType:
    """The module sidecar.gateway, which imports an optional package. Raises StartupError if that is not installed."""
    try:
        from sidecar import gateway
    except ImportError as error:
        raise program.StartupError(f"--vllm-face: {error}; {install_hint('gateway')}") from error
    return gateway


def _say_why(cause: asyncio.Future[Any]) -> None:
    """Log why the process ends; an unexpected exception with its traceback."""
    why = cause.exception() or cause.result()
    fault = why if isinstance(why, BaseException) and not isinstance(why, OstinatoError) else None
    log.critical("must end and recover: %s", why if fault is None else repr(fault), exc_info=fault)


def wall_millis() -> int:
    """Unix time. Shown to people; nothing is ordered by it."""
    return time.time_ns() // 1_000_000


def main() -> int:
    """The exit code."""
    if sys.argv[1:2] == ["token"]:
        return auth.token_command("python -m sidecar token", sys.argv[2:])
    if sys.argv[1:2] == ["probe"]:
        return probe(Settings, "sidecar", sys.argv[2:], os.environ)
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        from sidecar import commands  # here: typer is slow to import

        commands.main(sys.argv[1:])
    settings, sources = read(Settings, "sidecar", sys.argv[1:], os.environ)
    logs.setup(settings.log_format, settings.log_level)
    log.info("starting: %s", describe(settings, sources))
    sys.setswitchinterval(SWITCH_SECONDS)

    async def serve(stop: asyncio.Event) -> int:
        numbers = registry()
        with (
            program.exporting_traces(settings.traces, "ostinato.sidecar", settings.writer),
            serve_metrics(numbers, settings.metrics) as port,
        ):
            log.info("metrics", extra={"port": port})
            sidecar = Sidecar(settings, numbers)  # opens its journal, which may take long
            program.install_signal_handlers(stop)
            return await sidecar.run(stop)

    return program.run("sidecar", serve)


if __name__ == "__main__":
    sys.exit(main())
