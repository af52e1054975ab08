"""What stands before the sequencer: batches that wait for their numbers, let in fairly. Pure.

A number is a place in a queue that nobody overtakes. So only a few numbered items may wait for the engine, and the rest waits
here, where a tenant that floods stands in its own way only. Everything but an Admit goes straight to the sequencer; so does an
Admit where there is room.

1. A batch leaves here once: to the sequencer, or refused; without a key also when its caller leaves or its deadline passes.
2. Of one tenant's batches none overtakes another.
"""

from __future__ import annotations

from collections.abc import Iterator

from ostinato import errors

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.fairness import FairQueue
from sidecar.core.pace import Pace
from sidecar.core.refusals import refusal
from sidecar.core.sequencer import Sequencer


class Entrance:
    """See the module. Takes the sequencer's events and gives its effects."""

    def __init__(self, core: Sequencer) -> None:
        self._core, self._bounds = core, core.bounds
        self.waiting = FairQueue()
        self.pace = Pace(core.bounds.retry_after_seconds)

    def step(self, event: ev.Event, now: float) -> list[do.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        effects = list(self._before(event, now))
        if not isinstance(event, ev.Admit):
            effects += self._core.step(event, now)
        while (admit := self._may_enter()) is not None:
            if admit.over(now):
                self.waiting.drop(admit)
                effects.append(_late(admit))
            else:
                effects += self._core.step(self.waiting.take(), now)
        return effects

    def _before(self, event: ev.Event, now: float) -> Iterator[do.Effect]:
        match event:
            case ev.Admit():
                error = self._refusal(event, now)
                if error is not None:
                    yield do.Refuse(event.ticket, error)
                else:
                    self.waiting.put(event)
            case ev.CallerGone(ticket, error):
                admit = self.waiting.get(ticket)
                if admit is not None and not admit.keyed:
                    self.waiting.drop(admit)
                    yield do.Refuse(ticket, error)
            case ev.Ended():
                self.pace.ended(now)
            case ev.Tick():
                yield from map(_late, self.waiting.drop_late(now))
            case ev.Drain() | ev.DrainEnd():
                for admit in self.waiting:
                    self.waiting.drop(admit)
                    draining = errors.Draining("the sidecar is draining", retry_after=self._bounds.retry_after_seconds)
                    yield do.Refuse(admit.ticket, draining)

    def _refusal(self, admit: ev.Admit, now: float) -> errors.OstinatoError | None:
        """None: it may wait here."""
        core, bounds, own = self._core, self._bounds, self.waiting.items_of(admit.tenant)
        queued = core.queued + self.waiting.items
        error = refusal(admit, core.window, queued, bounds, draining=core.draining)
        if isinstance(error, errors.QueueFull):
            return errors.QueueFull(error.message, retry_after=self.pace.retry_after(queued, now))
        if error is None and own and own + len(admit.needs) > bounds.tenant_queue_items_max:
            share = self.pace.retry_after(own * self.waiting.tenants, now)
            most = bounds.tenant_queue_items_max
            return errors.QueueFull(f"{own} items of this tenant wait, {most} may", retry_after=share)
        return error

    def _may_enter(self) -> ev.Admit | None:
        """Whose turn it is, if there is room for its items. A batch that is larger than the room has it for itself."""
        admit, queued = self.waiting.first(), self._core.queued
        if admit is None or self._core.window is None:
            return None
        fits = queued + len(admit.needs) <= self._bounds.numbered_items_max
        return admit if fits or not queued else None


def _late(admit: ev.Admit) -> do.Effect:
    return do.Refuse(admit.ticket, errors.DeadlineExceeded("the deadline passed before anything was numbered"))
