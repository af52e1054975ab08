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

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.agenda import Agenda
from sidecar.core.batches import Batches
from sidecar.core.item import Bounds, Item, Phase, numbered
from sidecar.core.refusals import refusal, unfit
from sidecar.core.reruns import Reruns
from sidecar.core.window import Window


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
        self._batches, self._agenda = Batches(), Agenda()
        self._runs: dict[int, Item] = {}
        self._last_run_id = 0
        self._stream_after_run_id = 0

    @property
    def queued(self) -> int:
        """Items that wait for the journal or for room."""
        return self._batches.numbering + len(self.waiting)

    def step(self, event: ev.Event, now: float) -> list[do.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        effects = list(self._react(event, now))
        if self.waiting or self.reruns.wait:
            effects.extend(self._submit_what_fits(now))
        if self.draining and not self._drained and not self.items and not self._batches.numbering:
            self._drained = True
            effects.append(do.Drained())
        return effects

    def _react(self, event: ev.Event, now: float) -> Iterator[do.Effect]:
        match event:
            case ev.Admit():
                yield self._admit(event)
            case ev.Numbered():
                yield from self._numbered(event)
            case ev.NotNumbered(ticket):
                self._batches.not_numbered(ticket)
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
            case ev.Cancel(first, last):
                for item in numbered(self.items, first, last):
                    yield from self._end(item, errors.Cancelled("cancelled on request"))
            case ev.CallerGone(ticket, error):
                yield from self._caller_gone(ticket, error)
            case ev.Rerun() | ev.DropRerun():
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

    def _admit(self, admit: ev.Admit) -> do.Effect:
        if (error := refusal(admit, self.window, self.queued, self.bounds, draining=self.draining)) is not None:
            return do.Refuse(admit.ticket, error)
        self._batches.open(admit)
        return do.AppendAdmission(admit.ticket)

    def _numbered(self, numbered: ev.Numbered) -> Iterator[do.Effect]:
        batch = self._batches.numbered(numbered.ticket, numbered.first_sequence)
        self._enqueue(*batch.items())
        if batch.left is not None:
            yield from self._caller_gone(numbered.ticket, batch.left)
        if self._abandoning:
            yield from self._abandon()

    def _recovered(self, recovered: ev.Recovered) -> Iterator[do.Effect]:
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
            self._agenda.put(item.sequence, item.overdue_at(self.bounds.overdue_seconds))
        if items and items[0].sequence < last:
            self.waiting = dict(sorted(self.waiting.items()))

    # ---- runs

    def _submit_what_fits(self, now: float) -> Iterator[do.Effect]:
        if self.window is None:
            return
        yield from self.reruns.verify(self.window, self._next_run_id, now)
        while self.waiting:
            head = next(iter(self.waiting.values()))
            if (error := unfit(head, self.window)) is not None:
                yield from self._end(head, error)
            elif self.window.fits(head.need.kv_tokens, exclusive=head.suspect):
                yield self._submit(head, self.window, now)
                assert head.sequence < next(iter(self.waiting), sys.maxsize), "invariant 6: what waits is ascending"
            else:
                return
        yield from self.reruns.submit(self.window, self._next_run_id, now)

    def _submit(self, item: Item, window: Window, now: float) -> do.Effect:
        del self.waiting[item.sequence]
        window.take(item.need.kv_tokens, exclusive=item.suspect)
        item.phase, item.run_id = Phase.SUBMITTED, self._next_run_id()
        item.attempt = item.first_attempt + item.losses
        item.expires_at = min(now + self.bounds.item_timeout_seconds, item.deadline or float("inf"))
        self._runs[item.run_id] = item
        self._agenda.put(item.sequence, item.overdue_at(self.bounds.overdue_seconds))
        return do.Submit(item.run_id, item.sequence, item.attempt, item.expires_at, window.runs)

    def _run_event(self, run_id: int, event: ev.Started | ev.Finished | ev.Failed) -> Iterator[do.Effect]:
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
                yield do.Fault(errors.ProtocolViolation(f"{type(event).__name__} for a run that is {item.phase.name}"))

    def _stray_event(self, run_id: int, event: ev.Started | ev.Finished | ev.Failed) -> Iterator[do.Effect]:
        """Of a rerun, of a run that was cancelled while the event was under way, or of no run at all."""
        if self.window is not None and isinstance(event, ev.Finished | ev.Failed) and self.reruns.ended(run_id, self.window):
            return
        if not self._stream_after_run_id < run_id <= self._last_run_id:
            yield do.Fault(errors.ProtocolViolation(f"{type(event).__name__} for run {run_id}, which was never submitted"))

    def _next_run_id(self) -> int:
        self._last_run_id += 1
        return self._last_run_id

    def _disconnected(self) -> Iterator[do.Effect]:
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

    def _end(self, item: Item, error: errors.OstinatoError | None = None) -> Iterator[do.Effect]:
        """The item's one outcome; whatever comes after the first is too late."""
        if item.phase is Phase.ENDING:
            return
        if self._release(item):
            yield do.CancelRun(item.run_id)
        item.phase = Phase.ENDING
        yield do.End(item.sequence, item.attempt, error)

    def _release(self, item: Item) -> bool:
        """Take it out of queue and window; whether a run is left behind."""
        self.waiting.pop(item.sequence, None)
        self._agenda.put(item.sequence, None)
        if self._runs.pop(item.run_id, None) is None:
            return False
        assert self.window is not None
        self.window.give(item.need.kv_tokens)
        return True

    def _caller_gone(self, ticket: int, error: errors.OstinatoError) -> Iterator[do.Effect]:
        for sequence in self._batches.left(ticket, error):
            if sequence in self.items:
                yield from self._end(self.items[sequence], error)

    def _expire(self, now: float) -> Iterator[do.Effect]:
        for sequence in self._agenda.due(now):
            item = self.items[sequence]
            yield from self._end(item, errors.DeadlineExceeded(item.why_overdue))

    def _abandon(self) -> Iterator[do.Effect]:
        """End what has no key; leave what has one to the next epoch."""
        self._abandoning = True
        for item in list(self.items.values()):
            if not item.keyed:
                yield from self._end(item, errors.Abandoned("unfinished when the drain ended"))
            elif item.phase is not Phase.ENDING:
                if self._release(item):
                    yield do.CancelRun(item.run_id)
                del self.items[item.sequence]
                yield do.LeaveToRecovery(item.sequence)
