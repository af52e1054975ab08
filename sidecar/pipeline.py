"""The life of a request, on one event loop: read `Pipeline.generate` first.

What happens becomes an event of the core (`dispatch`), and the core's effects are performed at once, in order (`_perform`).
What takes time, an append or a run, becomes a later event. Nothing awaits between an event and its effects.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ostinato import errors, tracing
from ostinato.digest import request_digest
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2
from serving.auth import Context, caller
from serving.handlers import ran_out, remaining
from serving.hop import is_short
from serving.intake import CHARGE, Charge

from sidecar import answers
from sidecar.admission import check, check_size, draft, prepare_cost, response_bytes_max
from sidecar.answers import CancelWaiter, Waiter, answer_of, is_whole, result_of, stamp_of
from sidecar.collisions import Collisions
from sidecar.config import Settings
from sidecar.core import events as ev
from sidecar.core.fairness import AdmissionQueue
from sidecar.core.sequencer import Sequencer, numbered
from sidecar.fingerprints import Fingerprints
from sidecar.held import Held
from sidecar.item import ActiveItem, need_of, submission
from sidecar.journal.model import Admission, Appended, Audit, Binding, JournalBroken, Sealed, Unfinished
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink, run_error
from sidecar.observe import Observer
from sidecar.quota import JournalQuota
from sidecar.rerun import VERIFY, Record, Rerunner
from sidecar.turns import TurnQueue

KEY_CHARACTERS_SHOWN = 64
"""Of an idempotency key, in an error."""

CompletionListener = Callable[[types_pb2.EntryHeader, int], None]
"""Gets the header of each COMPLETED entry, and the most runs that the engine held with it, its own included."""

log = logging.getLogger(__name__)


class Pipeline:
    """One per process. `clock` is monotonic, in seconds. `random_bytes` gives as many as it is told to, for nonces."""

    async def generate(self, request: generation_pb2.GenerateRequest, context: Context, waiter: Waiter) -> bytes | None:
        """The life of a request: prepare, admit, number, submit, record, answer.

        The response, or None if the waiter has written it. Raises what refuses the request, or what its call is lost for.
        """
        asked_at, timeout = self.clock(), remaining(context)
        self.observer.asked(request)
        try:
            try:
                bytes_max, key = self._check(request, context, timeout), request.idempotency_key
                given: Binding | types_pb2.Stamp | None = await self.journal.binding(caller().tenant, key) if key else None
                if given is None:
                    self.quota.check(caller().tenant)
                    prepared = await self._prepare(request, timeout, bytes_max)
                    # The core refuses the batch, or has it appended (`_number`) when it is its turn.
                    batch = self._admit(request, prepared, waiter, None if timeout is None else asked_at + timeout)
                    given = await batch.numbered
                repeated = isinstance(given, Binding)
                stamp = await self._join(request, given, waiter) if isinstance(given, Binding) else given
            except errors.OstinatoError as error:
                self.observer.refused(error)
                raise
            self.observer.numbered(stamp, repeated=repeated)
            # The core submits the items in order (`_submit`). As each ends, its outcome is recorded (`_record`) and told to the
            # waiter (`_answer`).
            return await waiter.answer(stamp, repeated=repeated)
        except (asyncio.CancelledError, errors.SlowReader) as error:
            self._leave(waiter, error, late=ran_out(remaining(context), timeout))
            raise

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        link: EngineLink,
        observer: Observer,
        held: Held,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._settings, self.random_bytes = settings, random_bytes
        self.core = Sequencer(settings.bounds)
        self.queue = AdmissionQueue(self.core)
        self.preparing = TurnQueue(settings.prepares_max, settings.tenant_prepares_max, settings.tenant_prepare_queue_max)
        self.journal, self.link, self.observer, self.held, self.clock = journal, link, observer, held, clock
        self.items: dict[int, ActiveItem] = {}
        """By sequence: admitted, outcome not durable yet."""
        self.engine: engine_pb2.DescribeResponse | None = None
        """None: not connected."""
        self.engine_changed = asyncio.Event()
        """The engine has connected or disconnected. The reader clears it."""
        self.drained = asyncio.Event()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the process must end and recover."""
        self.completion_listeners: list[CompletionListener] = []
        self.fingerprints = Fingerprints(journal)
        self.quota = JournalQuota(settings.tenant_journal_bytes, settings.writer, keeps_payloads=settings.payloads == "full")
        self.rerunner = Rerunner(self.dispatch, journal, observer, self.fingerprints, self.quota)
        self.remote = answers.RemoteWaiters(journal, self.supervise)
        self._pending: dict[int, PendingAdmission] = {}
        """By batch id."""
        self._last_batch_id = 0
        self._ends: list[ev.End] = []
        """By the present event: to be recorded together."""
        self._collisions = Collisions()
        self._tasks: set[asyncio.Task[None]] = set()
        observer.watch(self.core, lambda: self.queue.waiting.items, lambda: held.bytes)

    def connected_engine(self) -> engine_pb2.DescribeResponse:
        """Raises EngineUnavailable without one."""
        if self.engine is None:
            raise errors.EngineUnavailable("no engine is connected", retry_after=1.0)
        return self.engine

    def load(self) -> tuple[int, int]:
        """Items that run and that wait: all of them if the caller is an admin, a tenant's own if it is not."""
        if caller().admin:
            running = self.core.window.runs if self.core.window is not None else 0
            return running, self.core.queued + self.queue.waiting.items
        tenant = caller().tenant
        own = [item.submitted_at is not None for item in self.items.values() if item.input.tenant == tenant]
        return sum(own), len(own) - sum(own) + self.queue.waiting.items_of(tenant)

    # ---- events and effects

    def dispatch(self, event: ev.Event) -> None:
        """Tell the core an event. Its effects are performed before this returns; what ends by it is recorded in one commit."""
        for effect in self.queue.step(event, self.clock()):
            self._perform(effect)
        if self._ends:
            self._guarded(self._record)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.AppendAdmission(batch_id):
                self._number(self._pending[batch_id])
            case ev.Refuse(batch_id, error):
                self._pending.pop(batch_id).settle(error)
            case ev.Submit():
                self._submit(effect)
            case ev.End():
                self._ends.append(effect)
            case ev.SubmitRerun(run_id, rerun_id, expires_at):
                assert self.engine is not None
                digest = self.engine.model.fingerprint.digest
                self.link.submit(self.rerunner.submission(run_id, rerun_id, expires_at - self.clock(), digest))
            case ev.CancelRun(run_id):
                self.link.cancel(run_id)
            case ev.LeaveToRecovery(sequence):
                self.items[sequence].defer()
                self.observer.deferred(self.items[sequence])
            case ev.RerunLost(rerun_id, error):
                self.rerunner.lost(rerun_id, error)
            case ev.Fault(error):
                self.observer.fault(error)
                self.link.drop(error.message)
            case ev.Drained():
                self.drained.set()

    # ---- prepare and admit

    def _leave(self, waiter: Waiter, error: BaseException, *, late: bool) -> None:
        """Its call has ended before the answer."""
        if isinstance(error, errors.SlowReader):
            reason: errors.OstinatoError = errors.Cancelled(error.message)
        elif late:  # gRPC shows a cancelled call and a passed deadline alike
            reason = errors.DeadlineExceeded("the caller's deadline passed")
        else:
            reason = errors.Cancelled("the caller went away")
        for item in filter(None, map(self.items.get, waiter.sequences)):
            item.remove(waiter, reason)
        self.remote.remove(waiter)
        if waiter.batch_id:
            self.dispatch(ev.CancelBatch(waiter.batch_id, reason))

    def _check(self, request: generation_pb2.GenerateRequest, context: Context, timeout: float | None) -> int:
        """What needs neither journal nor engine. The most bytes of a response that the client reads."""
        if timeout is not None and timeout <= 0:
            raise errors.DeadlineExceeded("the deadline had passed before anything was numbered")
        check(request, self._settings)
        self.held.check()
        return response_bytes_max(context.invocation_metadata() or (), self._settings)

    async def _prepare(
        self, request: generation_pb2.GenerateRequest, timeout: float | None, bytes_max: int
    ) -> engine_pb2.PrepareResponse:
        """Rendered, tokenised and resolved by the service."""
        prepare = engine_pb2.PrepareRequest(items=request.items, parameters=request.parameters)
        if is_short(prepare):
            prepared = await self.link.prepare(prepare, timeout)
        else:
            async with self.preparing.place(caller().tenant, prepare_cost(prepare)):
                prepared = await self.link.prepare_long(prepare, timeout)
        check_size(prepared, bytes_max, verify=request.verify, signed=self._settings.signing_key is not None)
        if (charge := CHARGE.get()) is not None:
            charge.prepared(prepared.ByteSize())
        return prepared

    def _admit(
        self,
        request: generation_pb2.GenerateRequest,
        prepared: engine_pb2.PrepareResponse,
        waiter: Waiter,
        deadline: float | None,
    ) -> PendingAdmission:
        self._last_batch_id += 1
        waiter.batch_id = self._last_batch_id
        admission = draft(request, prepared, caller().tenant, self.random_bytes)
        numbered = asyncio.get_running_loop().create_future()
        batch = PendingAdmission(waiter.batch_id, admission, waiter, self.clock(), numbered, CHARGE.get())
        if tracing.tracer is not None:
            batch.caller, batch.span = tracing.current(), tracing.span("admission")
        self._pending[batch.batch_id] = batch
        if batch.charge is not None:
            batch.charge.hold(len(admission.items))
        needs, keyed = tuple(map(need_of, admission.items)), bool(admission.key)
        self.dispatch(ev.Admit(batch.batch_id, needs, keyed, None if keyed else deadline, admission.tenant))
        return batch

    async def _join(self, request: generation_pb2.GenerateRequest, binding: Binding, waiter: Waiter) -> types_pb2.Stamp:
        """Wait for the items of a bound key, recorded or still to end. Raises KeyReused if they are of another request."""
        if binding.request_digest and request_digest(request) != binding.request_digest:
            await self.journal.batch(caller().tenant, request.idempotency_key, binding)  # unless the binding is damaged
            named = _shown(request.idempotency_key)
            raise errors.KeyReused(
                f"the idempotency key {named} was used for another request: use another key, or send the same request"
            )
        self.observer.metrics.repeated.inc()
        first, last = binding.first_sequence, binding.first_sequence + binding.count - 1
        waiter.sequences = range(first, last + 1)
        joined = {number: self.items[number] for number in waiter.sequences if number in self.items}
        for item in joined.values():
            item.join(waiter)
        recorded = await self.journal.batch(caller().tenant, request.idempotency_key, binding)
        remote = []
        for entries in recorded:
            if entries.admitted.header.sequence in joined:
                continue
            if is_whole(entries):
                waiter.result(answer_of(entries))
            else:
                remote.append(entries.admitted.header.sequence)
        if remote:
            await self.remote.join(waiter, remote)
        return stamp_of(recorded[0].admitted.header)

    # ---- number

    def _number(self, batch: PendingAdmission) -> None:
        """Append the batch, which gives its items consecutive sequences."""
        if tracing.tracer is not None:
            batch.journal_span = batch.span.child("journal")
        try:
            self.quota.check(batch.admission.tenant)  # again: much may have been appended while it waited
            appending = self.journal.append(batch.admission)
        except errors.JournalFull as error:
            appending = asyncio.get_running_loop().create_future()
            appending.set_exception(error)
        appending.add_done_callback(partial(self._guarded, self._numbered, batch))

    def _numbered(self, batch: PendingAdmission, appending: asyncio.Future[Appended]) -> None:
        """The batch is durable, its key was bound already, or the journal refused it."""
        del self._pending[batch.batch_id]
        error = appending.exception()
        batch.journal_span.end(error)
        why_not = error if isinstance(error, errors.Refused) else appending.result().binding
        if why_not is not None:
            self.dispatch(ev.NotNumbered(batch.batch_id))
            batch.settle(why_not)
            return
        appended = appending.result()
        self.quota.add(batch.admission.tenant, appended.entries)
        now, stamp = self.clock(), stamp_of(appended.entries[0].header)
        batch.waiter.sequences = range(stamp.first_sequence, stamp.first_sequence + stamp.count)
        for entry, digest in zip(appended.entries, appended.inputs, strict=True):
            given = entry.read(sequencer_pb2.AdmittedPayload)
            item = ActiveItem(entry.header, given, now, [batch.waiter], batch.charge, digest)
            self.items[item.sequence] = item
            if batch.caller is not tracing.OFF:
                self.observer.activated(item, batch.caller)
        batch.settle(stamp)
        self.observer.admitted(stamp, now - batch.asked_at)
        self.dispatch(ev.Numbered(batch.batch_id, stamp.first_sequence))

    def recover(self, unfinished: Sequence[Unfinished]) -> None:
        """Take up what earlier epochs or other writers left, ascending."""
        for each in unfinished:
            header, payload = each.admitted.header, each.admitted.read(sequencer_pb2.AdmittedPayload)
            waiters = self.remote.claim(header.sequence)
            item = self.items[header.sequence] = ActiveItem(header, payload, self.clock(), waiters)
            self.observer.activated(item, tracing.current())
            keyed = bool(payload.idempotency_key)
            self.dispatch(ev.Recovered(header.sequence, need_of(payload), keyed, each.attempt, payload.tenant))

    # ---- submit, and what the engine reports (link.Listener)

    def _submit(self, submit: ev.Submit) -> None:
        assert self.engine is not None
        item, now = self.items[submit.sequence], self.clock()
        again = item.submitted_at is not None
        item.begin(submit.attempt, now)
        item.fingerprint_digest, item.company = self.engine.model.fingerprint.digest, submit.company
        item.first_fingerprint_digest = item.first_fingerprint_digest or item.fingerprint_digest
        self.link.submit(
            submission(
                item.input,
                submit.expires_at - now,
                run_id=submit.run_id,
                purpose=engine_pb2.PURPOSE_PRIMARY,
                sequence=submit.sequence,
                attempt=submit.attempt,
                stream=any(waiter.wants_tokens for waiter in item.waiters),
                traceparent=self.observer.submitted(item, submit.attempt, again=again),
                ahead=submit.ahead,
            )
        )

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        again, self.engine = self.engine is not None, description
        self.observer.engine(description)
        self.spawn(self.fingerprints.meet(description.model.fingerprint))
        if again:
            self.dispatch(ev.Regraded(description.model.grade))
            return
        self.dispatch(ev.Connected.of(description))
        self.engine_changed.set()

    def engine_down(self, error: errors.OstinatoError) -> None:
        self.engine = None
        self.observer.engine_lost([self.items[item.sequence] for item in self.core.runs.values()])
        self.dispatch(ev.Disconnected())
        self.engine_changed.set()

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        self.observer.fault(error)

    def engine_events(self, events: Sequence[engine_pb2.RunEvent]) -> None:
        """What is said of a run after its end is ignored, as of one that was cancelled."""
        reports, ended, fault = list[ev.Report](), set[int](), ""
        for event in events:
            run = self.core.runs.get(event.run_id) if event.run_id not in ended else None
            try:
                report = self._report(event, self.items[run.sequence] if run is not None else None)
            except ValueError as error:
                fault = str(error)
                break
            if report is not None:
                reports.append(report)
                if type(report) is not ev.Started:
                    ended.add(report.run_id)
        if reports:
            self.dispatch(ev.Reported(tuple(reports)))
        if fault:
            self._perform(ev.Fault(errors.ProtocolViolation(fault)))

    def _report(self, event: engine_pb2.RunEvent, item: ActiveItem | None) -> ev.Report | None:
        """What the core has to know of it. Raises ValueError for what the service must not say."""
        match event.WhichOneof("event"):
            case "started":
                return ev.Started(event.run_id)
            case "tokens":
                if item is not None:
                    now = self.clock()
                    self.observer.tokens(item, len(event.tokens.token_ids), now)
                    item.tokens(event.tokens, now)
                return None
            case "finished":
                output = event.finished.output
                if item is not None:
                    self._finished(item, output)
                else:
                    self.rerunner.finished(event.run_id, output)
                return ev.Finished(event.run_id, output.grade)
            case "failed":
                error = run_error(event.failed)
                self.rerunner.failed(event.run_id, error)
                return ev.Failed(event.run_id, error)
            case _:
                raise ValueError(f"an event of run {event.run_id} that says nothing")

    def _finished(self, item: ActiveItem, output: types_pb2.Output) -> None:
        assert self.engine is not None
        drift = self.fingerprints.drift(item.first_fingerprint_digest, item.fingerprint_digest)
        item.finished(output, self.engine.model.vocabulary_size, drift)
        item.company_at_end = self.core.window.runs if self.core.window is not None else 0
        if item.input.verify:
            with item.span.entered():
                item.verification = self.rerunner.start(item.input, item.sequence, VERIFY, item.input.tenant)

    # ---- record and answer

    def _record(self) -> None:
        """Append the outcomes of what has ended."""
        ends, self._ends = self._ends, []
        items, now, outcomes = [self.items[end.sequence] for end in ends], self.clock(), []
        for item, end in zip(items, ends, strict=True):
            group = self._settings.group_of(item.input.tenant)
            outcomes.append(item.outcome(end.error, end.attempt, now, self._collisions, group))
            if tracing.tracer is not None:
                self.observer.recording(item, end.error)
        answers = [self.journal.append(outcome) for outcome in outcomes]
        answers[-1].add_done_callback(partial(self._guarded, self._recorded, items, answers))  # the journal answers in order

    def _recorded(self, items: Sequence[ActiveItem], answers: Sequence[asyncio.Future[Appended]], _: object) -> None:
        """The outcomes are durable."""
        for answer in answers:
            answer.exception()  # marks it as retrieved: the first that failed is raised below
        answered = []
        for item, answer in zip(items, answers, strict=True):
            entries = answer.result().entries
            self.quota.add(item.input.tenant, entries)
            if not entries:
                self.spawn(self._answer_later(item, None))
                continue
            result = result_of(entries[0])
            self.observer.recorded(item, entries[0], result, last=item is items[-1])
            if result.HasField("output"):
                for listener in self.completion_listeners:
                    listener(entries[0].header, max(item.company, item.company_at_end))
            if item.verification is None and item.recovery is None:
                self._answer(item, result)
                answered.append(item.sequence)
            else:
                self.spawn(self._answer_later(item, (entries[0], result)))
        if answered:
            self.dispatch(ev.Ended(tuple(answered)))

    async def _answer_later(self, item: ActiveItem, recorded: tuple[Sealed, types_pb2.Result] | None) -> None:
        """More has to be awaited, and other items need not wait for it. None: another writer's outcome came first. Raises
        JournalBroken."""
        if recorded is None:
            item.cancel_verification(errors.Abandoned("another outcome came first"))
            item.stage.end()
            item.span.end()
            result = answers.answer_or_header(await answers.ended(self.journal, item.sequence))
        else:
            outcome, result = recorded
            if item.verification is not None and result.HasField("output"):
                assert item.output is not None
                record = Record(item.admitted, outcome.header, item.input, item.output, item.company)
                result.comparison.CopyFrom(await self.rerunner.verify(record, item.verification))
            else:
                item.cancel_verification(errors.Abandoned("there is no answer to verify"))
        self._answer(item, result)
        if item.recovery is not None and item.output is not None:  # not part of the answer, which is durable
            nonce, digest = item.input.nonce, item.fingerprint_digest
            await self.rerunner.append(Audit(item.admitted, item.recovery, nonce, digest, item.output.grade))
        self.dispatch(ev.Ended((item.sequence,)))

    def _answer(self, item: ActiveItem, result: types_pb2.Result) -> None:
        del self.items[item.sequence]
        if item.charge is not None:
            item.charge.release()
        for waiter in item.waiters:
            waiter.result(result)

    # ---- cancel

    async def cancel_items(self, first: int, last: int) -> int:
        """End these sequences, both included. How many of them end as CANCELLED."""
        items = numbered(self.items, first, last)
        waiter = CancelWaiter(len(items))
        for item in items:
            item.join(waiter)
        self.dispatch(ev.CancelItems(first, last))
        for item in items:
            item.cancel_verification(errors.Cancelled("cancelled on request"))
        cancelled = await waiter.cancelled()
        return cancelled + await self.remote.cancel(first, last, self.items)

    # ---- tasks

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """A task whose failure ends the process. Only the journal may fail in it."""
        self.supervise(asyncio.get_running_loop().create_task(coroutine))

    def supervise(self, task: asyncio.Task[None]) -> None:
        """As `spawn`, for a task that its owner may cancel."""
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _guarded(self, callback: Callable[..., None], *arguments: object) -> None:
        """As `spawn`, for what awaits nothing."""
        try:
            callback(*arguments)
        except Exception as error:  # noqa: BLE001  # it ends the process
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)
        elif not isinstance(error, JournalBroken):  # every task may raise that one
            log.error("one more task has failed", exc_info=error)


@dataclass(slots=True, eq=False)
class PendingAdmission:
    """A batch that has no sequences yet."""

    batch_id: int
    admission: Admission
    waiter: Waiter
    asked_at: float
    numbered: asyncio.Future[types_pb2.Stamp | Binding]
    """Its stamp, or what its key was bound to meanwhile. Fails with what refuses it."""
    charge: Charge | None = None
    caller: tracing.Span = tracing.OFF
    """Of its call."""
    span: tracing.Span = tracing.OFF
    journal_span: tracing.Span = tracing.OFF

    def settle(self, given: types_pb2.Stamp | Binding | errors.OstinatoError) -> None:
        self.span.end(given if isinstance(given, errors.OstinatoError) else None)
        if self.charge is not None and not isinstance(given, types_pb2.Stamp):  # it has no items
            self.charge.release(len(self.admission.items))
        if self.numbered.done():
            return
        if isinstance(given, errors.OstinatoError):
            self.numbered.set_exception(given)
        else:
            self.numbered.set_result(given)


def _shown(key: str) -> str:
    """The key in quotes, in one line of ASCII, shortened."""
    shown = json.dumps(key[:KEY_CHARACTERS_SHOWN])
    return shown if len(key) <= KEY_CHARACTERS_SHOWN else f"{shown}..."
