"""Performs what the core decides: journal, engine and callers on one event loop.

Everything that happens becomes one event for the core, and its effects are performed at once and in order. What takes time (an
append, a run) becomes a later event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from ostinato import errors
from ostinato.v1 import engine_pb2, types_pb2

from sidecar.answers import RemoteWaiters, Waiter, answer_or_header, ended, no_verdict, result_of, stamp_of, verification_of
from sidecar.collisions import Collisions
from sidecar.core import events as ev
from sidecar.core.fairness import AdmissionQueue
from sidecar.core.sequencer import Sequencer
from sidecar.fingerprints import Fingerprints
from sidecar.item import ActiveItem, PendingAdmission, RerunResult, need_of
from sidecar.journal.model import Admission, Appended, Audit, Binding, JournalBroken, Unfinished
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink, run_error
from sidecar.observe import Observer
from sidecar.rerun import Record, Rerunner

VERIFY = types_pb2.COMPARISON_KIND_VERIFY
Witness = Callable[[Record, int], None]
"""Told of an item that completed: its record, and the most runs that the engine was seen to hold with it, itself included."""


class Host(Protocol):
    """Whose items end."""

    items: dict[int, ActiveItem]
    clock: Callable[[], float]

    def dispatch(self, event: ev.Event) -> None: ...

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None: ...


class Outcomes:
    """One beside each Pipeline."""

    def __init__(self, host: Host, journal: Journal, observer: Observer, rerunner: Rerunner) -> None:
        self._host, self._journal, self._observer, self._rerunner = host, journal, observer, rerunner
        self.witnesses: list[Witness] = []
        self._collisions = Collisions()
        self._ends: list[ev.End] = []

    def end(self, end: ev.End) -> None:
        """An item has ended. All that do in one turn of the loop become durable together, in one task."""
        self._ends.append(end)
        if len(self._ends) == 1:
            self._host.spawn(self._append())

    async def _append(self) -> None:
        ends, self._ends = self._ends, []
        works, now = [self._host.items[end.sequence] for end in ends], self._host.clock()
        outcomes = [work.outcome(end.error, end.attempt, now, self._collisions) for work, end in zip(works, ends, strict=True)]
        spans = [work.spans.item.child("journal") for work in works]
        appended = await self._journal.append_outcomes(outcomes)
        for span in spans:
            span.end()
        for work, each in zip(works, appended, strict=True):
            telling = self._tell(work, each)
            if each.entries and work.second is None and work.recovery is None:
                await telling
            else:  # there is more to wait for, and not for its neighbours
                self._host.spawn(telling)

    async def _tell(self, work: ActiveItem, appended: Appended) -> None:
        """Those who wait, and then the core."""
        result = await self._result(work, appended)
        del self._host.items[work.sequence]
        for call in work.calls:
            call.result(result)
        work.ended.set_result(result)
        if work.recovery is not None and work.output is not None:  # the answer is durable, and this is not part of it
            await self._rerunner.append(Audit(work.admitted, work.recovery, work.fingerprint_digest, work.output.grade))
        self._host.dispatch(ev.Ended(work.sequence))

    async def _result(self, work: ActiveItem, appended: Appended) -> types_pb2.Result:
        """What a later reader of the journal derives too, while payloads are kept. Raises JournalBroken."""
        if not appended.entries:  # another writer's outcome came first, and is the one
            work.forgo(errors.Abandoned("another outcome came first"))
            work.spans.item.end()
            return answer_or_header(await ended(self._journal, work.sequence))  # --payloads digests may have dropped it
        (sealed,) = appended.entries
        result = result_of(sealed)
        self._observer.ended(work, sealed, result)
        if work.output is not None and sealed.header.kind == types_pb2.ENTRY_KIND_COMPLETED:
            await self._judge(work, Record(work.admitted, sealed.header, work.input, work.output, work.company), result)
        else:
            work.forgo(errors.Abandoned("there is no answer to verify"))
        return result

    async def _judge(self, work: ActiveItem, record: Record, result: types_pb2.Result) -> None:
        if work.second is not None:
            result.comparison.CopyFrom(await self._verify(record, work.second))
        for witness in self.witnesses:
            witness(record, max(work.company, work.company_at_end))

    async def _verify(self, record: Record, second: asyncio.Future[RerunResult]) -> types_pb2.Comparison:
        sequence = record.completed.sequence
        try:
            entry = (await self._rerunner.check(record, VERIFY, second)).entry
        except errors.OstinatoError as error:
            entry = await self._rerunner.append(
                Audit(record.admitted, no_verdict(sequence, VERIFY, error), grade=record.completed.grade)
            )
        return verification_of(sequence, entry)


log = logging.getLogger(__name__)


class Pipeline:
    """The edge around one core. `clock` is monotonic, in seconds."""

    def __init__(
        self, core: Sequencer, journal: Journal, link: EngineLink, observer: Observer, clock: Callable[[], float]
    ) -> None:
        self.core = core
        self.queue = AdmissionQueue(core)
        self.journal = journal
        self.link = link
        self.observer = observer
        self.clock = clock
        self.items: dict[int, ActiveItem] = {}
        """By sequence: admitted, outcome not durable yet."""
        self.engine: engine_pb2.DescribeResponse | None = None
        """None: not connected."""
        self.engine_changed = asyncio.Event()
        """It came or went; for one who clears it."""
        self.drained = asyncio.Event()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the process must end and recover."""
        self.fingerprints = Fingerprints(journal)
        self.rerunner = Rerunner(self.dispatch, journal, observer, self.fingerprints)
        self.outcomes = Outcomes(self, journal, observer, self.rerunner)
        self.remote = RemoteWaiters(journal, self.supervise)
        self._pending: dict[int, PendingAdmission] = {}
        self._runs: dict[int, ActiveItem] = {}
        self._last_batch_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        observer.watch(core, lambda: self.queue.waiting.items)

    # ---- events in

    def dispatch(self, event: ev.Event) -> None:
        """One event for the core; its effects are performed before this returns."""
        for effect in self.queue.step(event, self.clock()):
            self._perform(effect)

    def recover(self, unfinished: Sequence[Unfinished]) -> None:
        """Take up what earlier epochs left, ascending."""
        for one in unfinished:
            calls = self.remote.claim(one.admitted.header.sequence)
            work = self.items[one.admitted.header.sequence] = ActiveItem.of(one.admitted, calls, self.clock())
            self.dispatch(ev.Recovered(work.sequence, need_of(work.input), bool(work.input.idempotency_key), one.attempt))

    async def admit(
        self, admission: Admission, call: Waiter, deadline: float | None, gone: Callable[[], errors.OstinatoError]
    ) -> tuple[int, types_pb2.Stamp | Binding]:
        """The batch id, and the batch's stamp or what its key was bound to before. Raises what refuses it. `gone` says why the
        call ended, if it is cancelled."""
        self._last_batch_id += 1
        batch_id = self._last_batch_id
        asking = self._pending[batch_id] = PendingAdmission(
            admission, call, self.clock(), asyncio.get_running_loop().create_future()
        )
        try:
            self.dispatch(
                ev.Admit(batch_id, tuple(map(need_of, admission.items)), bool(admission.key), deadline, admission.tenant)
            )
            return batch_id, await asking.answer
        except asyncio.CancelledError:
            self.leave(batch_id, call, gone())
            raise

    def leave(self, batch_id: int, call: Waiter, error: errors.OstinatoError) -> None:
        """This call is over; its batch id is 0 if it only joined."""
        for work in filter(None, map(self.items.get, call.sequences)):
            work.detach(call, error)
        self.remote.leave(call)
        self.dispatch(ev.CancelBatch(batch_id, error))

    # ---- the engine's side (link.Listener)

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        """See link.Listener."""
        again, self.engine = self.engine is not None, description
        self.observer.engine(description)
        self.spawn(self.fingerprints.meet(description.model.fingerprint))
        if again:
            self.dispatch(ev.Regraded(description.model.grade))
            return
        self.dispatch(ev.Connected.of(description))
        self.engine_changed.set()

    def engine_down(self, error: errors.OstinatoError) -> None:
        """See link.Listener."""
        self.engine = None
        self.observer.engine_lost(self._runs.values())
        self._runs.clear()
        self.dispatch(ev.Disconnected())
        self.engine_changed.set()

    def engine_events(self, events: list[engine_pb2.RunEvent]) -> None:
        """See link.Listener."""
        for event in events:
            work = self._runs.get(event.run_id)
            try:
                self._engine_event(event, work)
            except ValueError as fault:
                self._perform(ev.Fault(errors.ProtocolViolation(str(fault))))
                return

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        """See link.Listener."""
        self.observer.fault(error)

    def _engine_event(self, event: engine_pb2.RunEvent, work: ActiveItem | None) -> None:
        match event.WhichOneof("event"):
            case "started":
                self.dispatch(ev.Started(event.run_id))
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
                            work.second = self.rerunner.start(work.input, work.sequence, types_pb2.COMPARISON_KIND_VERIFY)
                else:
                    self.rerunner.finished(event.run_id, output)
                self.dispatch(ev.Finished(event.run_id, output.grade))
                self._runs.pop(event.run_id, None)
            case "failed":
                error = run_error(event.failed)
                self.rerunner.failed(event.run_id, error)
                self.dispatch(ev.Failed(event.run_id, error))
                self._runs.pop(event.run_id, None)
            case "tokens":
                pass
            case _:
                raise ValueError(f"an event of run {event.run_id} that says nothing")

    # ---- effects out

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.AppendAdmission(batch_id):
                self.spawn(self._append_admission(batch_id))
            case ev.Refuse(batch_id, error):
                self._pending.pop(batch_id).refuse(error)
            case ev.Submit():
                self._submit(effect)
            case ev.SubmitRerun(run_id, rerun_id, expires_at):
                assert self.engine is not None
                fingerprint = self.engine.model.fingerprint.digest
                self.link.submit(self.rerunner.submission(run_id, rerun_id, expires_at - self.clock(), fingerprint))
            case ev.CancelRun(run_id):
                self._runs.pop(run_id, None)
                self.link.cancel(run_id)
            case ev.End():
                self.outcomes.end(effect)
            case ev.LeaveToRecovery(sequence):
                self.items[sequence].leave()
            case ev.RerunLost(rerun_id, error):
                self.rerunner.lost(rerun_id, error)
            case ev.Fault(error):
                self.observer.fault(error)
                self.link.drop(error.message)
            case ev.Drained():
                self.drained.set()

    def _submit(self, submit: ev.Submit) -> None:
        assert self.engine is not None
        work, now = self.items[submit.sequence], self.clock()
        again = work.submitted_at is not None
        work.fingerprint_digest, work.company = self.engine.model.fingerprint.digest, submit.company
        work.first_fingerprint_digest = work.first_fingerprint_digest or work.fingerprint_digest
        self._runs[submit.run_id] = work
        self.link.submit(work.submit(submit.run_id, submit.attempt, submit.expires_at - now, now))
        self.observer.submitted(work, again=again)

    async def _append_admission(self, batch_id: int) -> None:
        asking = self._pending[batch_id]
        try:
            with asking.span.child("journal"):
                appended = await self.journal.append(asking.admission)
        except errors.Refused as error:
            self.dispatch(ev.NotNumbered(batch_id))
            self._pending.pop(batch_id).refuse(error)
            return
        if appended.binding is not None:
            self.dispatch(ev.NotNumbered(batch_id))
            self._pending.pop(batch_id).settle(appended.binding)
            return
        now, stamp = self.clock(), stamp_of(appended.entries[0].header)
        asking.call.sequences = range(stamp.first_sequence, stamp.first_sequence + stamp.count)
        for entry in appended.entries:
            self.items[entry.header.sequence] = ActiveItem.of(entry, [asking.call], now, asking.caller)
        self._pending.pop(batch_id).settle(stamp)
        self.observer.admitted(stamp, now - asking.asked_at)
        self.dispatch(ev.Numbered(batch_id, stamp.first_sequence))

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
