"""Which batch is numbered next: fair queueing between tenants, before the sequencer. Pure.

A sequence is a place in a first-in, first-out queue. So only few numbered items may wait for the engine
(`Bounds.numbered_items_max`), and other batches wait here. `FairQueue` is a deficit round robin over tenants, by tokens.

1. A batch leaves the queue once: to the sequencer, or refused. A batch without a key is also refused when its call ends or its
   deadline passes.
2. Batches of one tenant are numbered in the order of their arrival.
3. Of two tenants that both wait, neither gets more than one quantum and two batches ahead of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ostinato import errors

from sidecar.core import events as ev
from sidecar.core.events import Admit
from sidecar.core.sequencer import Sequencer, TimerQueue, refusal

QUANTUM_TOKENS = 256
"""About one short request. A smaller quantum would cost nothing, and change nothing either."""


def cost(admit: Admit) -> int:
    """Tokens of a batch, prompts and answers at worst; never nothing."""
    return max(1, sum(need.kv_tokens for need in admit.needs))


@dataclass(slots=True, eq=False)
class Lane:
    """What waits of one tenant."""

    tenant: str
    batches: dict[int, Admit] = field(default_factory=dict)
    """By batch id, the first first."""
    items: int = 0
    tokens: int = 0
    """Saved up, and good for so many."""

    @property
    def first(self) -> Admit:
        return next(iter(self.batches.values()))

    def turns(self, quantum: int) -> int:
        """That it has to wait for until its first batch is paid, at least one."""
        return max(1, -(-(cost(self.first) - self.tokens) // quantum))


class FairQueue:
    """Batches that wait for numbers."""

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: dict[str, Lane] = {}
        """In the order of their turns."""
        self._admits: dict[int, Admit] = {}
        """By batch id."""
        self._timers = TimerQueue()
        self._serving: Lane | None = None
        """Whose turn has begun; stands first while something of it waits."""
        self.items = 0
        """Of all tenants."""

    @property
    def tenants(self) -> int:
        """How many have something waiting."""
        return len(self._lanes)

    def items_of(self, tenant: str) -> int:
        lane = self._lanes.get(tenant)
        return lane.items if lane is not None else 0

    def get(self, batch_id: int) -> Admit | None:
        """The batch with this id, if it waits."""
        return self._admits.get(batch_id)

    def __iter__(self) -> Iterator[Admit]:
        return (admit for lane in list(self._lanes.values()) for admit in list(lane.batches.values()))

    def put(self, admit: Admit) -> None:
        lane = self._lanes.setdefault(admit.tenant, Lane(admit.tenant))
        assert admit.batch_id not in self._admits
        self._admits[admit.batch_id] = lane.batches[admit.batch_id] = admit
        self._timers.put(admit.batch_id, None if admit.keyed else admit.deadline)
        lane.items += len(admit.needs)
        self.items += len(admit.needs)

    def first(self) -> Admit | None:
        """Whose turn it is; stays so until it is taken or dropped."""
        if not self._lanes:
            return None
        lane = next(iter(self._lanes.values()))
        if lane is not self._serving or lane.tokens < cost(lane.first):
            lane = self._advance()
        return lane.first

    def take(self) -> Admit:
        """The first, which pays."""
        admit = self.first()
        assert admit is not None, "something waits"
        self._lanes[admit.tenant].tokens -= cost(admit)
        self.drop(admit)
        return admit

    def drop(self, admit: Admit) -> None:
        """It does not wait any more."""
        lane = self._lanes[admit.tenant]
        del self._admits[admit.batch_id], lane.batches[admit.batch_id]
        self._timers.put(admit.batch_id, None)
        lane.items -= len(admit.needs)
        self.items -= len(admit.needs)
        if not lane.batches:
            del self._lanes[admit.tenant]

    def drop_late(self, now: float) -> Iterator[Admit]:
        """Those that nobody would wait for any more; they do not wait either."""
        for batch_id in self._timers.due(now):
            self.drop(admit := self._admits[batch_id])
            yield admit

    def _advance(self) -> Lane:
        """Ends the turn that there is, and gives turns until one can pay: all at once, however many there are."""
        lanes = list(self._lanes.values())
        if lanes[0] is self._serving:
            lanes.append(lanes.pop(0))
        turns = [lane.turns(self._quantum) for lane in lanes]
        fewest = min(turns)
        chosen = turns.index(fewest)
        for place, lane in enumerate(lanes):
            lane.tokens += self._quantum * (fewest if place <= chosen else fewest - 1)
        self._lanes = {lane.tenant: lane for lane in (*lanes[chosen:], *lanes[:chosen])}
        self._serving = lanes[chosen]
        return lanes[chosen]


MEMORY_SECONDS = 10.0
"""An item that ended so long ago counts for 1/e."""
LEAST_SECONDS, MOST_SECONDS = 0.1, 60.0
"""Of a hint."""


class ThroughputEstimator:
    """Outcomes per second, of late. `unknown_seconds`: the hint while nothing has ended yet."""

    def __init__(self, unknown_seconds: float) -> None:
        self._unknown_seconds = unknown_seconds
        self._ended, self._at = 0.0, 0.0

    def ended(self, now: float) -> None:
        """One more item has its outcome."""
        self._ended, self._at = self._left(now) + 1.0, now

    def per_second(self, now: float) -> float:
        return self._left(now) / MEMORY_SECONDS

    def retry_after(self, queued: int, now: float) -> float:
        """Seconds until half of what waits has ended, if that goes on: early enough that the engine has work then."""
        if not self._ended:
            return self._unknown_seconds
        rate = self.per_second(now)
        return MOST_SECONDS if queued > 2 * MOST_SECONDS * rate else max(LEAST_SECONDS, queued / (2 * rate))

    def _left(self, now: float) -> float:
        return self._ended * math.exp(min(0.0, self._at - now) / MEMORY_SECONDS)


class AdmissionQueue:
    """See the module. Takes the sequencer's events and gives its effects."""

    def __init__(self, core: Sequencer) -> None:
        self._core, self._bounds = core, core.bounds
        self.waiting = FairQueue()
        self.throughput = ThroughputEstimator(core.bounds.retry_after_seconds)

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
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

    def _before(self, event: ev.Event, now: float) -> Iterator[ev.Effect]:
        match event:
            case ev.Admit():
                error = self._refusal(event, now)
                if error is not None:
                    yield ev.Refuse(event.batch_id, error)
                else:
                    self.waiting.put(event)
            case ev.CancelBatch(batch_id, error):
                admit = self.waiting.get(batch_id)
                if admit is not None and not admit.keyed:
                    self.waiting.drop(admit)
                    yield ev.Refuse(batch_id, error)
            case ev.Ended():
                self.throughput.ended(now)
            case ev.Tick():
                yield from map(_late, self.waiting.drop_late(now))
            case ev.Drain() | ev.DrainEnd():
                for admit in self.waiting:
                    self.waiting.drop(admit)
                    draining = errors.Draining("the sidecar is draining", retry_after=self._bounds.retry_after_seconds)
                    yield ev.Refuse(admit.batch_id, draining)

    def _refusal(self, admit: ev.Admit, now: float) -> errors.OstinatoError | None:
        """None: it may wait here."""
        core, bounds, own = self._core, self._bounds, self.waiting.items_of(admit.tenant)
        queued = core.queued + self.waiting.items
        error = refusal(admit, core.window, queued, bounds, draining=core.draining)
        if isinstance(error, errors.QueueFull):
            return errors.QueueFull(error.message, retry_after=self.throughput.retry_after(queued, now))
        if error is None and own and own + len(admit.needs) > bounds.tenant_queue_items_max:
            share = self.throughput.retry_after(own * self.waiting.tenants, now)
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


def _late(admit: ev.Admit) -> ev.Effect:
    return ev.Refuse(admit.batch_id, errors.DeadlineExceeded("the deadline passed before anything was numbered"))
