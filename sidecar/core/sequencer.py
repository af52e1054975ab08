"""The order of submission, one outcome for each number, attempts, room and drain.

Invariants, numbered for the tests that attack them:
 1. First submissions leave in ascending order of sequence; of what waits, only the head is ever submitted.
 2. Every numbered item gets exactly one End, and is remembered until that is durable.
 3. The engine never holds more than its window; nothing overtakes a head that waits for room (`reruns` on verifications).
 4. An item is submitted again only after Disconnected, and ends once attempts_max engines were lost under it; from its second
    loss on it runs with nothing beside it, so that a poison item cannot take its neighbours along (`item` on those that kill
    before they begin).
 5. A refused batch leaves no trace. While draining every batch is refused and nothing is submitted a second time.
 6. What waits is in ascending order of sequence, whatever brought it there: its numbers, a takeover, or the loss of an engine.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TypeVar

from ostinato import errors
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.events import Admit, Need
from sidecar.core.reruns import Reruns
from sidecar.core.window import Bounds, Window

T = TypeVar("T")
UNATTRIBUTED_CRASHES_MAX = 4
"""An engine that dies too quickly to say what it began blames nobody; from then on, what it held is tried one at a time."""


class Phase(Enum):
    WAITING = auto()
    """For room, in order."""
    SUBMITTED = auto()
    STARTED = auto()
    ENDING = auto()
    """Its outcome is on the way to the disk."""


@dataclass(slots=True, eq=False)
class Item:
    """An admitted item that has no durable outcome yet."""

    sequence: int
    batch_id: int
    """Of its call; 0 where that was in an earlier epoch."""
    need: Need
    keyed: bool
    deadline: float | None
    first_attempt: int = 1
    """More than 1 if earlier epochs had it."""
    attempt: int = field(init=False)
    """The newest that was submitted, and the first one until then: its outcome is that one's."""
    phase: Phase = Phase.WAITING
    run_id: int = 0
    expires_at: float = 0.0
    losses: int = 0
    """Engines that were lost under it after Started, or with nothing beside it."""
    unattributed_crashes: int = 0
    """Engines that were lost before they began it, with others beside it."""

    def __post_init__(self) -> None:
        self.attempt = self.first_attempt

    @property
    def quarantined(self) -> bool:
        """Whether it may be what kills the engine; it then runs with nothing beside it."""
        return self.losses >= 2 or self.unattributed_crashes >= UNATTRIBUTED_CRASHES_MAX

    def lost(self) -> None:
        """The engine that held it is gone. With nothing beside it, it is held against it, begun or not."""
        if self.phase is Phase.STARTED or self.quarantined:
            self.losses += 1
        else:
            self.unattributed_crashes += 1
        self.phase = Phase.WAITING

    def overdue_at(self, overdue_seconds: float) -> float | None:
        """When its time is over, where it stands now; None: never."""
        match self.phase:
            case Phase.WAITING:
                return self.deadline
            case Phase.SUBMITTED | Phase.STARTED:
                return self.expires_at + overdue_seconds
            case Phase.ENDING:
                return None

    @property
    def why_overdue(self) -> str:
        waited = self.phase is Phase.WAITING
        return "the deadline passed while it waited" if waited else "its time passed and the engine was silent"


def numbered(by_sequence: Mapping[int, T], first: int, last: int) -> list[T]:
    """Those numbered first to last, without looking at more than there are, or than were asked for."""
    if last - first < len(by_sequence):
        return [by_sequence[sequence] for sequence in range(first, last + 1) if sequence in by_sequence]
    return [each for sequence, each in by_sequence.items() if first <= sequence <= last]


@dataclass(slots=True, eq=False)
class Batch:
    """An admitted call."""

    admit: Admit
    open_items: int
    first_sequence: int = 0
    """0 until the numbers are durable."""
    left: OstinatoError | None = None
    """Why the caller went, if it did."""

    def items(self) -> Iterator[Item]:
        """A keyed batch outlives its caller's deadline."""
        deadline = None if self.admit.keyed else self.admit.deadline
        for sequence, need in enumerate(self.admit.needs, self.first_sequence):
            yield Item(sequence, self.admit.batch_id, need, self.admit.keyed, deadline)


class Batches:
    """By batch id."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self.numbering = 0
        """Items whose numbers are not durable yet."""

    def open(self, admit: Admit) -> None:
        assert admit.batch_id not in self._batches
        self._batches[admit.batch_id] = Batch(admit, len(admit.needs))
        self.numbering += len(admit.needs)

    def numbered(self, batch_id: int, first_sequence: int) -> Batch:
        batch = self._batches[batch_id]
        batch.first_sequence = first_sequence
        self.numbering -= len(batch.admit.needs)
        return batch

    def not_numbered(self, batch_id: int) -> None:
        self.numbering -= len(self._batches.pop(batch_id).admit.needs)

    def item_ended(self, item: Item) -> None:
        batch = self._batches.get(item.batch_id)
        if batch is not None:
            batch.open_items -= 1
            if not batch.open_items:
                del self._batches[item.batch_id]

    def left(self, batch_id: int, error: OstinatoError) -> range:
        """The caller went; the sequences that end with it: none of a keyed batch, none before there are numbers."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.admit.keyed:
            return range(0)
        batch.left = error
        return range(batch.first_sequence, batch.first_sequence + len(batch.admit.needs)) if batch.first_sequence else range(0)


class TimerQueue:
    """By key, one moment each."""

    def __init__(self) -> None:
        self._moments: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        """With some that were put off or dropped since."""

    def put(self, key: int, moment: float | None) -> None:
        """Look at it then, and not when it was put down for before; None: never."""
        if moment is None:
            self._moments.pop(key, None)
            return
        self._moments[key] = moment
        heapq.heappush(self._heap, (moment, key))
        if len(self._heap) > 2 * len(self._moments) + 64:
            self._heap = [(moment, key) for key, moment in self._moments.items()]
            heapq.heapify(self._heap)

    def due(self, now: float) -> Iterator[int]:
        """Those whose moment has come, the earliest first; they are dropped."""
        while self._heap and self._heap[0][0] <= now:
            moment, key = heapq.heappop(self._heap)
            if self._moments.get(key) == moment:
                del self._moments[key]
                yield key


def refusal(admit: Admit, window: Window | None, queued: int, bounds: Bounds, *, draining: bool) -> errors.OstinatoError | None:
    """None: the batch may be numbered."""
    soon = bounds.retry_after_seconds
    if draining:
        return errors.Draining("the sidecar is draining", retry_after=soon)
    if window is None:
        return errors.EngineUnavailable("no engine is connected", retry_after=soon)
    for index, need in enumerate(admit.needs):
        if not window.ever_fits(need.kv_tokens):
            return errors.invalid(f"items[{index}]", _too_big(need.kv_tokens, window))
        if need.required_grade > window.engine.grade:
            earned = types_pb2.Grade.Name(window.engine.grade)
            return errors.GradeNotEarned(f"the engine has earned {earned}", details={"earned": earned})
    if queued + len(admit.needs) > bounds.queue_items_max:
        return errors.QueueFull(f"{queued} items wait, {bounds.queue_items_max} may", retry_after=soon)
    return None


def unfit(item: Item, window: Window) -> errors.OstinatoError | None:
    """None: this engine may run it. Else another one prepared it, promised more for it, or was larger."""
    if item.need.model_digest != window.engine.model_digest:
        return errors.FingerprintChanged("another model, tokenizer or template runs now")
    if item.need.required_grade > window.engine.grade:
        return errors.GradeLost(f"the engine has only earned {types_pb2.Grade.Name(window.engine.grade)}")
    if not window.ever_fits(item.need.kv_tokens):
        return errors.EngineFailed(_too_big(item.need.kv_tokens, window))
    return None


def _too_big(kv_tokens: int, window: Window) -> str:
    return f"needs {window.need(kv_tokens)} KV blocks at worst, the engine has {window.engine.kv_blocks}"


class Sequencer:
    """See the module. One per writer and epoch; not thread-safe."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.items: dict[int, Item] = {}
        """By sequence: admitted, outcome not durable yet."""
        self.waiting: dict[int, Item] = {}
        """The part of them that waits for room, ascending."""
        self.reruns = Reruns(bounds)
        self.window: Window | None = None
        """None: no engine is connected."""
        self.draining = False
        self._abandoning = False
        self._drained = False
        self._batches, self._timers = Batches(), TimerQueue()
        self._runs: dict[int, Item] = {}
        self._last_run_id = 0
        self._stream_after_run_id = 0

    @property
    def queued(self) -> int:
        """Items that wait for the journal or for room."""
        return self._batches.numbering + len(self.waiting)

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        effects = list(self._react(event, now))
        if self.waiting or self.reruns.wait:
            effects.extend(self._submit_what_fits(now))
        if self.draining and not self._drained and not self.items and not self._batches.numbering:
            self._drained = True
            effects.append(ev.Drained())
        return effects

    def _react(self, event: ev.Event, now: float) -> Iterator[ev.Effect]:
        match event:
            case ev.Admit():
                yield self._admit(event)
            case ev.Numbered():
                yield from self._numbered(event)
            case ev.NotNumbered(batch_id):
                self._batches.not_numbered(batch_id)
            case ev.Recovered():
                yield from self._recovered(event)
            case ev.Connected():
                self.window = Window(event, self.bounds.window_runs_max or 2 * event.runs)
                self._stream_after_run_id = self._last_run_id
            case ev.Regraded(grade):
                if self.window is not None:
                    self.window.engine = replace(self.window.engine, grade=grade)
            case ev.Disconnected():
                yield from self._disconnected()
            case ev.Started(run_id) | ev.Finished(run_id) | ev.Failed(run_id):
                yield from self._run_event(run_id, event)
            case ev.Ended(sequence):
                item = self.items.pop(sequence)
                assert item.phase is Phase.ENDING
                self._batches.item_ended(item)
            case ev.CancelItems(first, last):
                for item in numbered(self.items, first, last):
                    yield from self._end(item, errors.Cancelled("cancelled on request"))
            case ev.CancelBatch(batch_id, error):
                yield from self._caller_gone(batch_id, error)
            case ev.Rerun() | ev.CancelRerun():
                yield from self.reruns.told(event, self.window, draining=self.draining)
            case ev.Tick():
                yield from self._expire(now)
                yield from self.reruns.expire(now, self.window)
            case ev.Drain() | ev.DrainEnd():
                self.draining = True
                yield from self.reruns.lose(errors.Draining("the sidecar is draining"), self.window)
                if self.window is None or isinstance(event, ev.DrainEnd):
                    yield from self._abandon()

    # ---- numbers

    def _admit(self, admit: ev.Admit) -> ev.Effect:
        if (error := refusal(admit, self.window, self.queued, self.bounds, draining=self.draining)) is not None:
            return ev.Refuse(admit.batch_id, error)
        self._batches.open(admit)
        return ev.AppendAdmission(admit.batch_id)

    def _numbered(self, numbered: ev.Numbered) -> Iterator[ev.Effect]:
        batch = self._batches.numbered(numbered.batch_id, numbered.first_sequence)
        self._enqueue(*batch.items())
        if batch.left is not None:
            yield from self._caller_gone(numbered.batch_id, batch.left)
        if self._abandoning:
            yield from self._abandon()

    def _recovered(self, recovered: ev.Recovered) -> Iterator[ev.Effect]:
        item = Item(recovered.sequence, 0, recovered.need, recovered.keyed, None, recovered.attempt)
        self._enqueue(item)
        if not item.keyed:
            yield from self._end(item, errors.Abandoned("found unfinished, without a key"))

    def _enqueue(self, *items: Item) -> None:
        """Items that are new here, ascending."""
        for item in items:
            assert item.sequence not in self.items
            self.items[item.sequence] = item
        self._wait(items)

    def _wait(self, items: Sequence[Item]) -> None:
        """Put these, which are ascending, into the queue: behind the last, unless a takeover or a lost engine brings them."""
        last = next(reversed(self.waiting), 0)
        for item in items:
            self.waiting[item.sequence] = item
            self._timers.put(item.sequence, item.overdue_at(self.bounds.overdue_seconds))
        if items and items[0].sequence < last:
            self.waiting = dict(sorted(self.waiting.items()))

    # ---- runs

    def _submit_what_fits(self, now: float) -> Iterator[ev.Effect]:
        if self.window is None:
            return
        yield from self.reruns.verify(self.window, self._next_run_id, now)
        while self.waiting:
            head = next(iter(self.waiting.values()))
            if (error := unfit(head, self.window)) is not None:
                yield from self._end(head, error)
            elif self.window.fits(head.need.kv_tokens, exclusive=head.quarantined):
                yield self._submit(head, self.window, now)
                assert head.sequence < next(iter(self.waiting), sys.maxsize), "invariant 6: what waits is ascending"
            else:
                return
        yield from self.reruns.submit(self.window, self._next_run_id, now)

    def _submit(self, item: Item, window: Window, now: float) -> ev.Effect:
        del self.waiting[item.sequence]
        window.take(item.need.kv_tokens, exclusive=item.quarantined)
        item.phase, item.run_id = Phase.SUBMITTED, self._next_run_id()
        item.attempt = item.first_attempt + item.losses
        item.expires_at = min(now + self.bounds.item_timeout_seconds, item.deadline or float("inf"))
        self._runs[item.run_id] = item
        self._timers.put(item.sequence, item.overdue_at(self.bounds.overdue_seconds))
        return ev.Submit(item.run_id, item.sequence, item.attempt, item.expires_at, window.runs)

    def _run_event(self, run_id: int, event: ev.Started | ev.Finished | ev.Failed) -> Iterator[ev.Effect]:
        item = self._runs.get(run_id)
        if item is None:
            yield from self._stray_event(run_id, event)
            return
        match event:
            case ev.Started() if item.phase is Phase.SUBMITTED:
                item.phase = Phase.STARTED
            case ev.Finished(grade=grade) if item.phase is Phase.STARTED:
                self._release(item)
                if grade < item.need.required_grade:
                    lost = errors.GradeLost(f"the grade fell to {types_pb2.Grade.Name(grade)} while it ran")
                    yield from self._end(item, lost)
                else:
                    yield from self._end(item)
            case ev.Failed(error=error):
                self._release(item)
                yield from self._end(item, error)
            case _:
                yield ev.Fault(errors.ProtocolViolation(f"{type(event).__name__} for a run that is {item.phase.name}"))

    def _stray_event(self, run_id: int, event: ev.Started | ev.Finished | ev.Failed) -> Iterator[ev.Effect]:
        """Of a rerun, of a run that was cancelled while the event was under way, or of no run at all."""
        if self.window is not None and isinstance(event, ev.Finished | ev.Failed) and self.reruns.ended(run_id, self.window):
            return
        if not self._stream_after_run_id < run_id <= self._last_run_id:
            yield ev.Fault(errors.ProtocolViolation(f"{type(event).__name__} for run {run_id}, which was never submitted"))

    def _next_run_id(self) -> int:
        self._last_run_id += 1
        return self._last_run_id

    def _disconnected(self) -> Iterator[ev.Effect]:
        self.window = None
        lost = sorted(self._runs.values(), key=lambda item: item.sequence)
        self._runs.clear()
        for item in lost:
            item.lost()
        self._wait(lost)
        for item in lost:
            if item.losses >= self.bounds.attempts_max:
                yield from self._end(item, errors.AttemptsExhausted(f"the engine was lost under it {item.losses} times"))
        yield from self.reruns.lose(errors.EngineUnavailable("the engine was lost"), None)
        if self.draining:
            yield from self._abandon()

    # ---- ends

    def _end(self, item: Item, error: errors.OstinatoError | None = None) -> Iterator[ev.Effect]:
        """The item's one outcome; whatever comes after the first is too late."""
        if item.phase is Phase.ENDING:
            return
        if self._release(item):
            yield ev.CancelRun(item.run_id)
        item.phase = Phase.ENDING
        yield ev.End(item.sequence, item.attempt, error)

    def _release(self, item: Item) -> bool:
        """Take it out of queue and window; whether a run is left behind."""
        self.waiting.pop(item.sequence, None)
        self._timers.put(item.sequence, None)
        if self._runs.pop(item.run_id, None) is None:
            return False
        assert self.window is not None
        self.window.give(item.need.kv_tokens)
        return True

    def _caller_gone(self, batch_id: int, error: errors.OstinatoError) -> Iterator[ev.Effect]:
        for sequence in self._batches.left(batch_id, error):
            if sequence in self.items:
                yield from self._end(self.items[sequence], error)

    def _expire(self, now: float) -> Iterator[ev.Effect]:
        for sequence in self._timers.due(now):
            item = self.items[sequence]
            yield from self._end(item, errors.DeadlineExceeded(item.why_overdue))

    def _abandon(self) -> Iterator[ev.Effect]:
        """End what has no key; leave what has one to the next epoch."""
        self._abandoning = True
        for item in list(self.items.values()):
            if not item.keyed:
                yield from self._end(item, errors.Abandoned("unfinished when the drain ended"))
            elif item.phase is not Phase.ENDING:
                if self._release(item):
                    yield ev.CancelRun(item.run_id)
                del self.items[item.sequence]
                yield ev.LeaveToRecovery(item.sequence)
