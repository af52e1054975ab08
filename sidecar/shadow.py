"""A shadow: a second service that gets a share of what completed, and whose answers reach nobody.

It has a stream, a core and a bounded queue of its own, so whatever it does, the engine that answers does not notice. What it
cannot take is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ostinato import errors
from ostinato.digest import is_sampled
from ostinato.v1 import engine_pb2, types_pb2

from sidecar.config import Settings
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.sequencer import Sequencer
from sidecar.dispatcher import Dispatcher
from sidecar.link import EngineLink, run_error
from sidecar.rerun import Rechecker, Record, Rerunner

log = logging.getLogger(__name__)

SHADOW = types_pb2.COMPARISON_KIND_SHADOW


class Shadow:
    """Witnesses a dispatcher's outcomes. A link.Listener and a rerunner.EventSink."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings) -> None:
        self.engine: engine_pb2.DescribeResponse | None = None
        """The second service's; None: not connected."""
        self._dispatcher, self._rate = dispatcher, settings.shadow_rate
        self._link = EngineLink(settings.shadow, settings.reconnect_seconds)
        bounds = replace(settings.bounds, reruns_max=settings.shadow_queue_max, reruns_share=1.0)
        self._core = Sequencer(bounds)
        self._reruns = Rerunner(self)
        self._rechecker = Rechecker(self._reruns, dispatcher.journal, dispatcher.observer, dispatcher.fingerprints)
        dispatcher.outcomes.witnesses.append(self.completed)

    async def run(self, hello: Callable[[], Awaitable[engine_pb2.Hello]]) -> None:
        """Keep the stream up. Where that ends for good, the sidecar serves without: a second service that turns it away, and a
        fault of ours in here, are no reason to stop answering."""
        try:
            await self._link.run(self, hello)
        except (errors.EpochStale, errors.JournalBehind) as error:
            log.error("no shadow any more", extra={"why": error.message})
        except Exception:
            log.exception("the shadow has failed")

    async def close(self) -> None:
        await self._link.close()

    def completed(self, record: Record, company: int) -> None:
        """See outcomes.Witness."""
        if is_sampled("shadow", record.completed.log_id, record.completed.sequence, self._rate):
            self._dispatcher.spawn(self._mirror(record))

    async def _mirror(self, record: Record) -> None:
        ours, theirs = self._dispatcher.engine, self.engine
        if ours is not None and theirs is not None and _tokenizer(ours) != _tokenizer(theirs):
            self._dispatcher.observer.not_compared(SHADOW, errors.FingerprintChanged.reason)
            return  # the recorded token ids say something else there
        with contextlib.suppress(errors.OstinatoError):  # counted
            comparison = (await self._rechecker.check(record, SHADOW)).comparison
            if comparison.verdict == types_pb2.VERDICT_INCOMPARABLE:
                self._dispatcher.observer.shadow_drifted(comparison)

    def tell(self, event: ev.Event) -> None:
        """One event for the shadow's own core."""
        for effect in self._core.step(event, self._dispatcher.clock()):
            match effect:
                case do.SubmitRerun(run_id, rerun_id, expires_at):
                    self._link.submit(self._reruns.submission(run_id, rerun_id, expires_at - self._dispatcher.clock()))
                case do.CancelRun(run_id):
                    self._link.cancel(run_id)
                case do.RerunLost(rerun_id, error):
                    self._reruns.lost(rerun_id, error)
                case do.Fault(error):
                    self._link.drop(error.message)

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        again, self.engine = self.engine is not None, description
        if again:
            return
        self._dispatcher.observer.shadow(description)
        self._dispatcher.spawn(self._dispatcher.fingerprints.meet(description.model.fingerprint))
        self.tell(ev.Connected.of(description))

    def engine_down(self, error: errors.OstinatoError) -> None:
        self.engine = None
        self._dispatcher.observer.shadow(None)
        self.tell(ev.Disconnected())

    def engine_events(self, events: list[engine_pb2.RunEvent]) -> None:
        for event in events:
            match event.WhichOneof("event"):
                case "finished":
                    output = event.finished.output
                    self._reruns.finished(event.run_id, output)
                    self.tell(ev.Finished(event.run_id, output.grade))
                case "failed":
                    error = run_error(event.failed)
                    self._reruns.failed(event.run_id, error)
                    self.tell(ev.Failed(event.run_id, error))

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        log.error("shadow fault", extra={"reason": error.reason, "why": error.message})


def _tokenizer(engine: engine_pb2.DescribeResponse) -> str:
    return engine.model.fingerprint.fields.get("tokenizer", "")
