"""Performs what the core decides: journal, engine and callers on one event loop.

Everything that happens becomes one event for the core, and its effects are performed at once and in order. What takes time (an
append, a run) becomes a later event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ostinato import errors
from ostinato.v1 import engine_pb2, types_pb2

from sidecar.calls import Call
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.entrance import Entrance
from sidecar.core.sequencer import Sequencer
from sidecar.elsewhere import Elsewhere
from sidecar.fingerprints import Fingerprints
from sidecar.journal.model import Admission, Binding, JournalBroken, Unfinished
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink, run_error
from sidecar.observer import Observer
from sidecar.outcomes import Outcomes
from sidecar.rerun import Rechecker, Rerunner
from sidecar.results import stamp_of
from sidecar.work import Asking, Work, need_of

log = logging.getLogger(__name__)


class Dispatcher:
    """The edge around one core. `clock` is monotonic, in seconds."""

    def __init__(
        self, core: Sequencer, journal: Journal, link: EngineLink, observer: Observer, clock: Callable[[], float]
    ) -> None:
        self.core = core
        self.entrance = Entrance(core)
        self.journal = journal
        self.link = link
        self.observer = observer
        self.clock = clock
        self.works: dict[int, Work] = {}
        """By sequence: admitted, outcome not durable yet."""
        self.engine: engine_pb2.DescribeResponse | None = None
        """None: not connected."""
        self.engine_changed = asyncio.Event()
        """It came or went; for one who clears it."""
        self.drained = asyncio.Event()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the process must end and recover."""
        self.reruns = Rerunner(self)
        self.fingerprints = Fingerprints(journal)
        self.rechecker = Rechecker(self.reruns, journal, observer, self.fingerprints)
        self.outcomes = Outcomes(self, journal, observer, self.rechecker)
        self.elsewhere = Elsewhere(journal, self.supervise)
        self._asking: dict[int, Asking] = {}
        self._runs: dict[int, Work] = {}
        self._last_ticket = 0
        self._tasks: set[asyncio.Task[None]] = set()
        observer.watch(core, lambda: self.entrance.waiting.items)

    # ---- events in

    def tell(self, event: ev.Event) -> None:
        """One event for the core; its effects are performed before this returns."""
        for effect in self.entrance.step(event, self.clock()):
            self._perform(effect)

    def recover(self, unfinished: Sequence[Unfinished]) -> None:
        """Take up what earlier epochs left, ascending."""
        for one in unfinished:
            calls = self.elsewhere.claim(one.admitted.header.sequence)
            work = self.works[one.admitted.header.sequence] = Work.of(one.admitted, calls, self.clock())
            self.tell(ev.Recovered(work.sequence, need_of(work.input), bool(work.input.idempotency_key), one.attempt))

    async def admit(
        self, admission: Admission, call: Call, deadline: float | None, gone: Callable[[], errors.OstinatoError]
    ) -> tuple[int, types_pb2.Stamp | Binding]:
        """The ticket, and the stamp of the numbered batch, or what its key was bound to before. Raises what refuses it. `gone`
        says why the caller left, if it is cancelled."""
        self._last_ticket += 1
        ticket = self._last_ticket
        asking = self._asking[ticket] = Asking(admission, call, self.clock(), asyncio.get_running_loop().create_future())
        try:
            self.tell(ev.Admit(ticket, tuple(map(need_of, admission.items)), bool(admission.key), deadline, admission.tenant))
            return ticket, await asking.answer
        except asyncio.CancelledError:
            self.leave(ticket, call, gone())
            raise

    def leave(self, ticket: int, call: Call, error: errors.OstinatoError) -> None:
        """This call is over; its ticket is 0 if it only joined."""
        for work in filter(None, map(self.works.get, call.sequences)):
            work.detach(call, error)
        self.elsewhere.leave(call)
        self.tell(ev.CallerGone(ticket, error))

    # ---- the engine's side (link.Listener)

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        """See link.Listener."""
        again, self.engine = self.engine is not None, description
        self.observer.engine(description)
        self.spawn(self.fingerprints.meet(description.model.fingerprint))
        if again:
            self.tell(ev.Regraded(description.model.grade))
            return
        self.tell(ev.Connected.of(description))
        self.engine_changed.set()

    def engine_down(self, error: errors.OstinatoError) -> None:
        """See link.Listener."""
        self.engine = None
        self.observer.engine_lost(self._runs.values())
        self._runs.clear()
        self.tell(ev.Disconnected())
        self.engine_changed.set()

    def engine_events(self, events: list[engine_pb2.RunEvent]) -> None:
        """See link.Listener."""
        for event in events:
            work = self._runs.get(event.run_id)
            try:
                self._engine_event(event, work)
            except ValueError as fault:
                self._perform(do.Fault(errors.ProtocolViolation(str(fault))))
                return

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        """See link.Listener."""
        self.observer.fault(error)

    def _engine_event(self, event: engine_pb2.RunEvent, work: Work | None) -> None:
        match event.WhichOneof("event"):
            case "started":
                self.tell(ev.Started(event.run_id))
            case "tokens" if work is not None:
                tokens, now = event.tokens, self.clock()
                self.observer.tokens(work, len(tokens.token_ids), now)
                work.tokens(tokens, now)
            case "finished":
                output = event.finished.output
                if work is not None:
                    assert self.engine is not None
                    drift = self.fingerprints.drift(work.first_fingerprint_digest, work.fingerprint_digest)
                    work.finished(output, self.engine.model.vocabulary_size, drift)
                    work.company_at_end = self.core.window.runs if self.core.window is not None else 0
                    if work.input.verify:
                        with work.spans.item.entered():
                            work.second = self.rechecker.begin(work.input, work.sequence, types_pb2.COMPARISON_KIND_VERIFY)
                else:
                    self.reruns.finished(event.run_id, output)
                self.tell(ev.Finished(event.run_id, output.grade))
                self._runs.pop(event.run_id, None)
            case "failed":
                error = run_error(event.failed)
                self.reruns.failed(event.run_id, error)
                self.tell(ev.Failed(event.run_id, error))
                self._runs.pop(event.run_id, None)
            case "tokens":
                pass
            case _:
                raise ValueError(f"an event of run {event.run_id} that says nothing")

    # ---- effects out

    def _perform(self, effect: do.Effect) -> None:
        match effect:
            case do.AppendAdmission(ticket):
                self.spawn(self._append_admission(ticket))
            case do.Refuse(ticket, error):
                self._asking.pop(ticket).refuse(error)
            case do.Submit():
                self._submit(effect)
            case do.SubmitRerun(run_id, rerun_id, expires_at):
                self.link.submit(self.reruns.submission(run_id, rerun_id, expires_at - self.clock()))
            case do.CancelRun(run_id):
                self._runs.pop(run_id, None)
                self.link.cancel(run_id)
            case do.End():
                self.outcomes.end(effect)
            case do.LeaveToRecovery(sequence):
                self.works[sequence].leave()
            case do.RerunLost(rerun_id, error):
                self.reruns.lost(rerun_id, error)
            case do.Fault(error):
                self.observer.fault(error)
                self.link.drop(error.message)
            case do.Drained():
                self.drained.set()

    def _submit(self, submit: do.Submit) -> None:
        assert self.engine is not None
        work, now = self.works[submit.sequence], self.clock()
        again = work.submitted_at is not None
        work.fingerprint_digest, work.company = self.engine.model.fingerprint.digest, submit.company
        work.first_fingerprint_digest = work.first_fingerprint_digest or work.fingerprint_digest
        self._runs[submit.run_id] = work
        self.link.submit(work.submit(submit.run_id, submit.attempt, submit.expires_at - now, now))
        self.observer.submitted(work, again=again)

    async def _append_admission(self, ticket: int) -> None:
        asking = self._asking[ticket]
        try:
            with asking.span.child("journal"):
                appended = await self.journal.append(asking.admission)
        except errors.Refused as error:
            self.tell(ev.NotNumbered(ticket))
            self._asking.pop(ticket).refuse(error)
            return
        if appended.binding is not None:
            self.tell(ev.NotNumbered(ticket))
            self._asking.pop(ticket).settle(appended.binding)
            return
        now, stamp = self.clock(), stamp_of(appended.entries[0].header)
        asking.call.sequences = range(stamp.first_sequence, stamp.first_sequence + stamp.count)
        for entry in appended.entries:
            self.works[entry.header.sequence] = Work.of(entry, [asking.call], now, asking.caller)
        self._asking.pop(ticket).settle(stamp)
        self.observer.admitted(stamp, now - asking.asked_at)
        self.tell(ev.Numbered(ticket, stamp.first_sequence))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """A task whose failure ends the process: nothing else may fail here than the journal."""
        self.supervise(asyncio.get_running_loop().create_task(coroutine))

    def supervise(self, task: asyncio.Task[None]) -> None:
        """As `spawn`, of a task that its owner may cancel."""
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not self.broken.done():
            self.broken.set_exception(error)
        elif not isinstance(error, JournalBroken):  # which all of them may tell, one after the other
            log.error("one more task has failed", exc_info=error)
