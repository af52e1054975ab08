"""Which batch is numbered next: fair queueing between tenants, in front of the sequencer. Pure.

A tenant's sequences are places in a first-in, first-out queue. So only few numbered items may wait for the engine
(`Bounds.numbered_items_max`), and other batches wait here. A batch that may enter at once is not queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ostinato import errors

from sidecar.core import events as ev
from sidecar.core.sequencer import Sequencer, Timers

QUANTUM_TOKENS = 256
"""About one short request. A smaller quantum would change nothing."""

MEMORY_SECONDS = 10.0
"""The estimate's time constant: an item that ended this long ago counts for 1/e."""
LEAST_SECONDS, MOST_SECONDS = 0.1, 60.0
"""Bounds of a retry hint."""


class ThroughputEstimator:
    """Outcomes per second, exponentially weighted. `unknown_seconds` is the hint before any outcome."""

    def __init__(self, unknown_seconds: float) -> None:
        self._unknown_seconds = unknown_seconds
        self._ended, self._at = 0.0, 0.0

    def ended(self, count: int, now: float) -> None:
        self._ended, self._at = self._weight(now) + count, now

    def retry_after(self, queued: int, now: float) -> float:
        """Seconds until half of `queued` items have ended at this rate. The engine still has work then."""
        if not self._ended:
            return self._unknown_seconds
        rate = self._weight(now) / MEMORY_SECONDS
        return MOST_SECONDS if queued > 2 * MOST_SECONDS * rate else max(LEAST_SECONDS, queued / (2 * rate))

    def _weight(self, now: float) -> float:
        return self._ended * math.exp(min(0.0, self._at - now) / MEMORY_SECONDS)


class Batch(Protocol):
    """What waits in a `FairQueue`."""

    @property
    def batch_id(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def items(self) -> int: ...
    @property
    def cost(self) -> int:
        """At least 1."""

    @property
    def deadline(self) -> float | None: ...


B = TypeVar("B", bound=Batch)


@dataclass(slots=True, eq=False)
class Lane(Generic[B]):
    """The waiting batches of one tenant."""

    tenant: str
    batches: dict[int, B] = field(default_factory=dict)
    """By batch id, in order of arrival."""
    items: int = 0
    credit: int = 0
    """The deficit counter: the cost of what the tenant may still take."""

    @property
    def first(self) -> B:
        return next(iter(self.batches.values()))

    def turns(self, quantum: int) -> int:
        """Turns until its first batch is paid for, at least one."""
        return max(1, -(-(self.first.cost - self.credit) // quantum))


class FairQueue(Generic[B]):
    """A deficit round robin over tenants, by cost.

    Tenants take turns. A turn adds a quantum to a tenant's deficit counter, which is lost when the tenant's lane is empty.

    1. Batches of one tenant leave in order of arrival, unless they are dropped.
    2. Of two tenants that wait, neither gets more than one quantum and two batches ahead of the other, except by `passing`.
    """

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: dict[str, Lane[B]] = {}
        """In the order of their turns."""
        self._batches: dict[int, B] = {}
        """By batch id."""
        self._deadlines = Timers()
        self._serving: Lane[B] | None = None
        """Whose turn has begun; stands first while its lane is not empty."""
        self.items = 0
        """Of all tenants."""

    @property
    def tenants(self) -> int:
        """Tenants with a waiting batch."""
        return len(self._lanes)

    def items_of(self, tenant: str) -> int:
        lane = self._lanes.get(tenant)
        return lane.items if lane is not None else 0

    def get(self, batch_id: int) -> B | None:
        return self._batches.get(batch_id)

    def __iter__(self) -> Iterator[B]:
        return (batch for lane in list(self._lanes.values()) for batch in list(lane.batches.values()))

    def put(self, batch: B) -> None:
        lane = self._lanes.setdefault(batch.tenant, Lane(batch.tenant))
        assert batch.batch_id not in self._batches
        self._batches[batch.batch_id] = lane.batches[batch.batch_id] = batch
        self._deadlines.put(batch.batch_id, batch.deadline)
        lane.items += batch.items
        self.items += batch.items

    def first(self) -> B | None:
        """The next batch. It stays the next until it is taken or dropped."""
        if not self._lanes:
            return None
        lane = next(iter(self._lanes.values()))
        if lane is not self._serving or lane.credit < lane.first.cost:
            lane = self._advance()
        return lane.first

    def passing(self, may: Callable[[str], bool]) -> B | None:
        """The first batch of the first tenant that may, where the next batch may not. Its tenant pays later."""
        return next((lane.first for lane in self._lanes.values() if may(lane.tenant)), None)

    def take(self, batch: B) -> None:
        """Remove the first batch of a tenant, which pays for it."""
        self._lanes[batch.tenant].credit -= batch.cost
        self.drop(batch)

    def drop(self, batch: B) -> None:
        """Remove a batch without payment."""
        lane = self._lanes[batch.tenant]
        del self._batches[batch.batch_id], lane.batches[batch.batch_id]
        self._deadlines.put(batch.batch_id, None)
        lane.items -= batch.items
        self.items -= batch.items
        if not lane.batches:
            del self._lanes[batch.tenant]

    def drop_expired(self, now: float) -> Iterator[B]:
        """Remove the batches whose deadline has passed."""
        for batch_id in self._deadlines.due(now):
            self.drop(batch := self._batches[batch_id])
            yield batch

    def _advance(self) -> Lane[B]:
        """End the present turn, and give turns until a lane can pay: all at once, however many there are."""
        lanes = list(self._lanes.values())
        if lanes[0] is self._serving:
            lanes.append(lanes.pop(0))
        turns = [lane.turns(self._quantum) for lane in lanes]
        fewest = min(turns)
        chosen = turns.index(fewest)
        for place, lane in enumerate(lanes):
            lane.credit += self._quantum * (fewest if place <= chosen else fewest - 1)
        self._lanes = {lane.tenant: lane for lane in (*lanes[chosen:], *lanes[:chosen])}
        self._serving = lanes[chosen]
        return lanes[chosen]


class AdmissionQueue:
    """Takes the sequencer's events and gives its effects.

    A batch waits only behind another, or while the sequencer has no room for it. It leaves once: to the sequencer, or refused.
    A batch without a key is also refused when its call ends or its deadline passes. A tenant without an item that waits for the
    engine is not kept waiting by others: each has its part of the engine (`window.Shares`).
    """

    def __init__(self, core: Sequencer) -> None:
        self._core, self._bounds = core, core.bounds
        self.waiting = FairQueue[ev.Admit]()
        self.throughput = ThroughputEstimator(core.bounds.retry_after_seconds)

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        if type(event) is ev.Admit and not self._enters(event, now):
            return self._wait(event, now)
        effects = list(self._before(event, now)) if self.waiting.items else []
        if type(event) is ev.Ended:
            self.throughput.ended(len(event.sequences), now)
        effects += self._core.step(event, now)
        while self.waiting.items and self._core.window is not None:
            admit = self._next()
            if admit is None:
                break
            if admit.expired(now):
                self.waiting.drop(admit)
                effects.append(_expired(admit))
            else:
                self.waiting.take(admit)
                effects += self._core.step(admit, now)
        return effects

    def _next(self) -> ev.Admit | None:
        """The next batch that may be numbered now."""
        first = self.waiting.first()
        if first is None or self._has_room(first):
            return first
        return self.waiting.passing(lambda tenant: not self._core.queued_of(tenant))

    def _wait(self, admit: ev.Admit, now: float) -> list[ev.Effect]:
        if (error := self._refusal(admit, now)) is not None:
            return [ev.Refuse(admit.batch_id, error)]
        if admit.expired(now):
            return [_expired(admit)]
        self.waiting.put(admit)
        return []

    def _refusal(self, admit: ev.Admit, now: float) -> errors.OstinatoError | None:
        own, queued = self.waiting.items_of(admit.tenant), self._core.queued + self.waiting.items
        error = self._core.refusal(admit, queued)
        if isinstance(error, errors.QueueFull):
            return errors.QueueFull(error.message, retry_after=self.throughput.retry_after(queued, now))
        most = self._bounds.tenant_queue_items_max
        if error is None and own and own + admit.items > most:
            hint = self.throughput.retry_after(own * self.waiting.tenants, now)
            return errors.QueueFull(f"{own} items of this tenant wait, {most} may", retry_after=hint)
        return error

    def _enters(self, admit: ev.Admit, now: float) -> bool:
        """Whether a new batch is numbered without waiting here."""
        if admit.expired(now) or not self._has_room(admit):
            return False
        return not self.waiting.items or not (self.waiting.items_of(admit.tenant) or self._core.queued_of(admit.tenant))

    def _has_room(self, admit: ev.Admit) -> bool:
        """Whether the batch may be numbered now. One that is larger than the bound enters when its tenant has nothing numbered
        that waits."""
        return self._core.queued + len(admit.needs) <= self._bounds.numbered_items_max or not self._core.queued_of(admit.tenant)

    def _before(self, event: ev.Event, now: float) -> Iterator[ev.Effect]:
        """What the event does to waiting batches."""
        match event:
            case ev.CancelBatch(batch_id, error):
                admit = self.waiting.get(batch_id)
                if admit is not None and not admit.keyed:
                    self.waiting.drop(admit)
                    yield ev.Refuse(batch_id, error)
            case ev.Tick():
                yield from map(_expired, self.waiting.drop_expired(now))
            case ev.Drain() | ev.DrainEnd():
                for admit in self.waiting:
                    self.waiting.drop(admit)
                    draining = errors.Draining("the sidecar is draining", retry_after=self._bounds.retry_after_seconds)
                    yield ev.Refuse(admit.batch_id, draining)


def _expired(admit: ev.Admit) -> ev.Effect:
    return ev.Refuse(admit.batch_id, errors.DeadlineExceeded("the deadline passed before anything was numbered"))
