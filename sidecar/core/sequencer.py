"""The order of submission: one outcome for each sequence, attempts, capacity, drain. Pure.

A sequence's life: Admit, AppendAdmission, Numbered (it waits), Submit, Started, Finished or Failed, End, Ended (it is
forgotten). `Sequencer` has the invariants.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import TypeVar

import msgspec

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.reruns import Reruns
from sidecar.core.window import Bounds, Shares, Window

T = TypeVar("T")

UNATTRIBUTED_CRASHES_MAX = 4
"""An engine that dies before it reports a start does not show which run killed it. An item that was submitted to this many such
engines is quarantined."""


class Phase(Enum):
    WAITING = auto()
    SUBMITTED = auto()
    STARTED = auto()
    ENDING = auto()
    """Its End was given out, and is not durable yet."""


class Item(msgspec.Struct, eq=False):
    """A sequence without a durable outcome."""

    sequence: int
    batch_id: int
    """0: numbered by an earlier epoch or another writer."""
    need: ev.Need
    keyed: bool
    deadline: float | None
    tenant: str = ""
    first_attempt: int = 1
    """More than 1 if earlier epochs submitted it."""
    attempt: int = 1
    """The newest that was submitted; `first_attempt` until then. The outcome is this attempt's."""
    phase: Phase = Phase.WAITING
    run_id: int = 0
    """Of the newest submission; 0: not submitted in this epoch."""
    blocks: int = 0
    """KV blocks that it needs in this engine."""
    expires_at: float = 0.0
    losses: int = 0
    """Engines that were lost after Started, or while it was quarantined."""
    unattributed_crashes: int = 0
    """Engines that were lost before Started, with other runs beside this one."""

    @property
    def quarantined(self) -> bool:
        """Whether the item may be what kills the engine. It then runs exclusively."""
        return self.losses >= 2 or self.unattributed_crashes >= UNATTRIBUTED_CRASHES_MAX

    def engine_lost(self) -> None:
        if self.phase is Phase.STARTED or self.quarantined:
            self.losses += 1
        else:
            self.unattributed_crashes += 1
        self.phase = Phase.WAITING


class Batch(msgspec.Struct, eq=False):
    """An admitted call, until its last item has ended."""

    admit: ev.Admit
    open_items: int
    first_sequence: int = 0
    """0 until the batch is durable."""
    cancelled: errors.OstinatoError | None = None
    """Why the call ended before its batch was durable."""


class Timers:
    """The next moment of each key, found without a scan of all keys."""

    def __init__(self) -> None:
        self._moments: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        """Includes outdated moments."""

    def put(self, key: int, moment: float | None) -> None:
        """Replace the key's moment. None: it has none."""
        if moment is None:
            self._moments.pop(key, None)
            return
        self._moments[key] = moment
        heapq.heappush(self._heap, (moment, key))
        if len(self._heap) > 2 * len(self._moments) + 64:
            self._heap = [(moment, key) for key, moment in self._moments.items()]
            heapq.heapify(self._heap)

    def due(self, now: float) -> Iterator[int]:
        """Remove and give the keys whose moment has come, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            moment, key = heapq.heappop(self._heap)
            if self._moments.get(key) == moment:
                del self._moments[key]
                yield key


class Sequencer:
    """One per writer and epoch. Not thread-safe.

    1. `waiting` is in ascending order of sequence, whether its numbering, a takeover or the loss of an engine put an item
       there, and only its head is submitted. With tenants it is the head of those whose tenant may hold more of the engine
       (`Shares`): only others' items overtake, and only those of a tenant that holds its share. So items of one tenant that
       this epoch numbers are first submitted in ascending order, and without tenants all items are.
    2. Each item gets exactly one End, and is remembered until that is durable. Only a drain leaves keyed items without one.
    3. Runs never exceed the engine's window. Nothing overtakes that head while it waits for room, except a verification
       (`reruns`).
    4. An item is submitted again only after Disconnected, and fewer than `attempts_max` engines were lost under it before. A
       quarantined item runs exclusively, so it cannot take other items down with it.
    5. A refused batch leaves no trace. While draining, every batch is refused, and no item waits for another engine: if the
       engine is lost, items without a key end, and the others are left to recovery.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.items: dict[int, Item] = {}
        """By sequence: all that have no durable outcome."""
        self.waiting: dict[int, Item] = {}
        """By sequence: those of `items` that wait for room."""
        self.runs: dict[int, Item] = {}
        """By run id: those of `items` that the engine holds."""
        self.queued = 0
        """Items that wait for the journal or for the engine."""
        self.shares = Shares(bounds.tenant_share)
        self.reruns = Reruns(bounds, self.shares)
        self.window: Window | None = None
        """None: no engine is connected."""
        self.draining = False
        self._abandoning = False
        self._drained = False
        self._batches: dict[int, Batch] = {}
        self._timers = Timers()
        self._last_run_id = 0
        self._stream_after_run_id = 0
        self._newest_submitted = 0
        """Of the items that this epoch numbered, without those that went ahead of others."""
        self._effects: list[ev.Effect] = []

    def queued_of(self, tenant: str) -> int:
        """Of `queued`, those of one tenant; all, where the engine is not divided between tenants."""
        return self.shares.queued(tenant) if self.shares.divided else self.queued

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        effects = self._effects = []
        match event:
            case ev.Reported(reports):
                for report in reports:
                    self._report(report)
            case ev.Admit():
                self._admit(event)
            case ev.Numbered(batch_id, first_sequence):
                self._numbered(self._batches[batch_id], first_sequence)
            case ev.Ended(sequences):
                for sequence in sequences:
                    self._ended(self.items.pop(sequence))
            case ev.Tick():
                for sequence in self._timers.due(now):
                    self._expire(self.items[sequence])
                effects += self.reruns.expire(now, self.window)
            case ev.NotNumbered(batch_id):
                admit = self._batches.pop(batch_id).admit
                self._queue(admit.tenant, -len(admit.needs))
            case ev.Recovered():
                self._recovered(event)
            case ev.CancelItems(first, last):
                for item in numbered(self.items, first, last):
                    self._end(item, errors.Cancelled("cancelled on request"))
            case ev.CancelBatch(batch_id, error):
                self._cancel_batch(batch_id, error)
            case ev.Rerun() | ev.CancelRerun():
                effects += self.reruns.react(event, self.window, draining=self.draining)
            case _:
                self._engine_or_drain(event)
        if self.window is not None and (self.waiting or self.reruns.waiting):
            self._submit_what_fits(self.window, now)
        if self.draining and not (self._drained or self.items or self.queued):
            self._drained = True
            effects.append(ev.Drained())
        return effects

    def _engine_or_drain(self, event: ev.Connected | ev.Regraded | ev.Disconnected | ev.Drain | ev.DrainEnd) -> None:
        match event:
            case ev.Connected():
                # The engine's own queue knows no tenants: what waits there delays all.
                runs_max = event.runs if self.shares.divided else 2 * event.runs
                self.window = Window(event, self.bounds.window_runs_max or runs_max)
                self._stream_after_run_id = self._last_run_id
            case ev.Regraded(grade):
                if self.window is not None:
                    self.window.engine = msgspec.structs.replace(self.window.engine, grade=grade)
            case ev.Disconnected():
                self._disconnected()
            case ev.Drain() | ev.DrainEnd():
                self.draining = True
                self._effects += self.reruns.lose(errors.Draining("the sidecar is draining"), self.window)
                if self.window is None or isinstance(event, ev.DrainEnd):
                    self._abandon()

    # ---- numbers

    def refusal(self, admit: ev.Admit, queued: int) -> errors.OstinatoError | None:
        """Why the batch gets no sequences, if `queued` items wait; None: it may have them."""
        soon = self.bounds.retry_after_seconds
        if self.draining:
            return errors.Draining("the sidecar is draining", retry_after=soon)
        if self.window is None:
            return errors.EngineUnavailable("no engine is connected", retry_after=soon)
        for index, need in enumerate(admit.needs):
            if self.window.need(need.kv_tokens) > self.window.engine.kv_blocks:
                return errors.invalid(f"items[{index}]", _too_big(need, self.window))
            if need.required_grade > self.window.engine.grade:
                earned = types_pb2.Grade.Name(self.window.engine.grade)
                return errors.GradeNotEarned(f"the engine has earned {earned}", details={"earned": earned})
        if queued + len(admit.needs) > self.bounds.queue_items_max:
            return errors.QueueFull(f"no room: at most {self.bounds.queue_items_max} items may wait", retry_after=soon)
        return None

    def _admit(self, admit: ev.Admit) -> None:
        if (error := self.refusal(admit, self.queued)) is not None:
            self._effects.append(ev.Refuse(admit.batch_id, error))
            return
        assert admit.batch_id not in self._batches
        self._batches[admit.batch_id] = Batch(admit, len(admit.needs))
        self._queue(admit.tenant, len(admit.needs))
        self._effects.append(ev.AppendAdmission(admit.batch_id))

    def _numbered(self, batch: Batch, first_sequence: int) -> None:
        admit, batch.first_sequence = batch.admit, first_sequence
        about = admit.keyed, admit.deadline, admit.tenant
        self._wait([Item(first_sequence + place, admit.batch_id, need, *about) for place, need in enumerate(admit.needs)])
        if batch.cancelled is not None:
            self._cancel_batch(admit.batch_id, batch.cancelled)
        if self._abandoning:
            self._abandon()

    def _recovered(self, event: ev.Recovered) -> None:
        item = Item(event.sequence, 0, event.need, event.keyed, None, event.tenant, event.attempt, event.attempt)
        self._queue(item.tenant, 1)
        self._wait([item])
        if not item.keyed:
            self._end(item, errors.Abandoned("found unfinished, without a key"))

    def _queue(self, tenant: str, count: int) -> None:
        """More items of a tenant wait for the journal or for the engine, or fewer."""
        self.queued += count
        if self.shares.divided:
            self.shares.queue(tenant, count)

    def _wait(self, items: list[Item]) -> None:
        """Put these, which are ascending and were counted by `_queue`, into `waiting`."""
        newest = next(reversed(self.waiting), 0)
        for item in items:
            assert self.items.get(item.sequence, item) is item
            self.items[item.sequence] = self.waiting[item.sequence] = item
            self._timers.put(item.sequence, item.deadline)
        if items and items[0].sequence < newest:
            self.waiting = dict(sorted(self.waiting.items()))

    # ---- runs

    def _submit_what_fits(self, window: Window, now: float) -> None:
        if window.runs >= window.runs_max:
            return
        if self.reruns.waiting:
            self._effects += self.reruns.verify(window, self._next_run_id, now)
        while self.waiting:
            item = self._head(window) if self.shares.divided else next(iter(self.waiting.values()))
            if item is None:
                break
            item.blocks = window.need(item.need.kv_tokens)
            if (error := unfit(item, window)) is not None:
                self._end(item, error)
            elif window.fits(item.blocks, exclusive=item.quarantined):
                self._submit(item, window, now)
            else:
                return
        if self.reruns.waiting and not self.waiting:
            self._effects += self.reruns.submit(window, self._next_run_id, now)

    def _head(self, window: Window) -> Item | None:
        """The first item that waits and whose tenant may hold more."""
        full: set[str] = set()
        for item in self.waiting.values():
            if item.tenant in full:
                continue
            if self.shares.may_take(item.tenant, window.need(item.need.kv_tokens), window.engine):
                return item
            full.add(item.tenant)
            if len(full) == self.shares.waiting:
                break
        return None

    def _submit(self, item: Item, window: Window, now: float) -> None:
        self._leave_queue(item)
        ahead = item.sequence > next(iter(self.waiting), item.sequence)
        assert self.shares.divided or not ahead, "invariant 1: what waits is ascending"
        if item.batch_id and not item.run_id and not ahead:
            assert item.sequence > self._newest_submitted, "invariant 1: first submissions are ascending"
            self._newest_submitted = item.sequence
        assert item.phase is Phase.WAITING, "invariant 4"
        assert item.losses < self.bounds.attempts_max, "invariant 4"
        window.take(item.blocks, exclusive=item.quarantined)
        if self.shares.divided:
            self.shares.run(item.tenant, 1, item.blocks)
        item.phase, item.run_id = Phase.SUBMITTED, self._next_run_id()
        item.attempt = item.first_attempt + item.losses
        item.expires_at = now + self.bounds.item_timeout_seconds
        if item.deadline is not None:
            item.expires_at = min(item.expires_at, item.deadline)
        self.runs[item.run_id] = item
        self._timers.put(item.sequence, item.expires_at + self.bounds.overdue_seconds)
        self._effects.append(ev.Submit(item.run_id, item.sequence, item.attempt, item.expires_at, window.runs, ahead))

    def _report(self, report: ev.Report) -> None:
        item = self.runs.get(report.run_id)
        if item is None:
            self._stray(report)
            return
        match report:
            case ev.Started() if item.phase is Phase.SUBMITTED:
                item.phase = Phase.STARTED
            case ev.Finished(grade=grade) if item.phase is Phase.STARTED:
                fell = grade < item.need.required_grade
                error = errors.GradeLost(f"the grade fell to {types_pb2.Grade.Name(grade)} while it ran") if fell else None
                self._end(item, error, ran=True)
            case ev.Failed(error=error):
                self._end(item, error, ran=True)
            case _:
                self._fault(f"{type(report).__name__} for a run that is {item.phase.name}")

    def _stray(self, report: ev.Report) -> None:
        """Of a rerun, of a run that was cancelled while the report was in flight, or of an unknown run."""
        run_id, ended = report.run_id, not isinstance(report, ev.Started)
        if self.window is not None and ended and self.reruns.ended(run_id, self.window):
            return
        if not self._stream_after_run_id < run_id <= self._last_run_id:
            self._fault(f"{type(report).__name__} for run {run_id}, which was never submitted")

    def _fault(self, what: str) -> None:
        self._effects.append(ev.Fault(errors.ProtocolViolation(what)))

    def _next_run_id(self) -> int:
        self._last_run_id += 1
        return self._last_run_id

    def _disconnected(self) -> None:
        self.window = None
        lost = sorted(self.runs.values(), key=lambda item: item.sequence)
        self.runs.clear()
        self.shares.lose()
        for item in lost:
            item.engine_lost()
            self._queue(item.tenant, 1)
        self._wait(lost)
        for item in lost:
            if item.losses >= self.bounds.attempts_max:
                self._end(item, errors.AttemptsExhausted(f"the engine was lost under it {item.losses} times"))
        self._effects += self.reruns.lose(errors.EngineUnavailable("the engine was lost"), None)
        if self.draining:
            self._abandon()

    # ---- ends

    def _end(self, item: Item, error: errors.OstinatoError | None = None, *, ran: bool = False) -> None:
        """Give out the item's End, unless it was given out before. `ran`: its run has ended."""
        if item.phase is Phase.ENDING:
            return
        self._release(item, ran=ran)
        item.phase = Phase.ENDING
        self._effects.append(ev.End(item.sequence, item.attempt, error))

    def _release(self, item: Item, *, ran: bool = False) -> None:
        """Take it out of `waiting` or `runs`, and out of the engine unless it `ran` to its end."""
        self._timers.put(item.sequence, None)
        if item.phase is Phase.WAITING:
            self._leave_queue(item)
            return
        assert self.window is not None
        del self.runs[item.run_id]
        self.window.give(item.blocks)
        if self.shares.divided:
            self.shares.run(item.tenant, -1, -item.blocks)
        if not ran:
            self._effects.append(ev.CancelRun(item.run_id))

    def _leave_queue(self, item: Item) -> None:
        del self.waiting[item.sequence]
        self._queue(item.tenant, -1)

    def _ended(self, item: Item) -> None:
        assert item.phase is Phase.ENDING, "invariant 2"
        batch = self._batches.get(item.batch_id)
        if batch is not None:
            batch.open_items -= 1
            if not batch.open_items:
                del self._batches[item.batch_id]

    def _cancel_batch(self, batch_id: int, error: errors.OstinatoError) -> None:
        batch = self._batches.get(batch_id)
        if batch is None or batch.admit.keyed:
            return
        batch.cancelled = error
        first, count = batch.first_sequence, len(batch.admit.needs) if batch.first_sequence else 0
        for item in numbered(self.items, first, first + count - 1):
            self._end(item, error)

    def _expire(self, item: Item) -> None:
        waited = item.phase is Phase.WAITING
        why = "the deadline passed while it waited" if waited else "its time passed and the engine was silent"
        self._end(item, errors.DeadlineExceeded(why))

    def _abandon(self) -> None:
        """End the items without a key, and leave those with one to the next epoch."""
        self._abandoning = True
        for item in list(self.items.values()):
            if not item.keyed:
                self._end(item, errors.Abandoned("unfinished when the drain ended"))
            elif item.phase is not Phase.ENDING:
                self._release(item)
                del self.items[item.sequence]
                self._effects.append(ev.LeaveToRecovery(item.sequence))
        assert not self.waiting, "invariant 5"
        assert not self.runs, "invariant 5"


def unfit(item: Item, window: Window) -> errors.OstinatoError | None:
    """Why this engine must not run the item; None: it may."""
    if item.need.model_digest != window.engine.model_digest:
        return errors.FingerprintChanged("another model, tokenizer or template runs now")
    if item.need.required_grade > window.engine.grade:
        return errors.GradeLost(f"the engine has only earned {types_pb2.Grade.Name(window.engine.grade)}")
    if item.blocks > window.engine.kv_blocks:
        return errors.EngineFailed(_too_big(item.need, window))
    return None


def _too_big(need: ev.Need, window: Window) -> str:
    return f"needs {window.need(need.kv_tokens)} KV blocks at worst, the engine has {window.engine.kv_blocks}"


def numbered(by_sequence: Mapping[int, T], first: int, last: int) -> list[T]:
    """The values for first to last, found with no more steps than the mapping or the range has."""
    if last - first < len(by_sequence):
        return [by_sequence[sequence] for sequence in range(first, last + 1) if sequence in by_sequence]
    return [value for sequence, value in by_sequence.items() if first <= sequence <= last]
