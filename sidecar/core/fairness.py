"""Which batch is numbered next: fair queueing between tenants, in front of the sequencer. Pure.

A sequence is a place in a first-in, first-out queue. So only few numbered items may wait for the engine
(`Bounds.numbered_items_max`), and other batches wait here. A batch that may enter at once is not queued.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

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

    def ended(self, now: float) -> None:
        self._ended, self._at = self._weight(now) + 1.0, now

    def retry_after(self, queued: int, now: float) -> float:
        """Seconds until half of `queued` items have ended at this rate. The engine still has work then."""
        if not self._ended:
            return self._unknown_seconds
        rate = self._weight(now) / MEMORY_SECONDS
        return MOST_SECONDS if queued > 2 * MOST_SECONDS * rate else max(LEAST_SECONDS, queued / (2 * rate))

    def _weight(self, now: float) -> float:
        return self._ended * math.exp(min(0.0, self._at - now) / MEMORY_SECONDS)


def cost(admit: ev.Admit) -> int:
    """Tokens of a batch, prompts and answers at worst; at least 1."""
    return max(1, sum(need.kv_tokens for need in admit.needs))


@dataclass(slots=True, eq=False)
class Lane:
    """The waiting batches of one tenant."""

    tenant: str
    batches: dict[int, ev.Admit] = field(default_factory=dict)
    """By batch id, in order of arrival."""
    items: int = 0
    tokens: int = 0
    """The deficit counter: tokens that the tenant may still use."""

    @property
    def first(self) -> ev.Admit:
        return next(iter(self.batches.values()))

    def turns(self, quantum: int) -> int:
        """Turns until its first batch is paid for, at least one."""
        return max(1, -(-(cost(self.first) - self.tokens) // quantum))


class FairQueue:
    """A deficit round robin over tenants, by tokens.

    Tenants take turns. A turn adds a quantum to a tenant's deficit counter, which is lost when the tenant's lane is empty.

    1. Batches of one tenant leave in order of arrival, unless they are dropped.
    2. Of two tenants that wait, neither gets more than one quantum and two batches ahead of the other.
    """

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: dict[str, Lane] = {}
        """In the order of their turns."""
        self._admits: dict[int, ev.Admit] = {}
        """By batch id."""
        self._deadlines = Timers()
        self._serving: Lane | None = None
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

    def get(self, batch_id: int) -> ev.Admit | None:
        return self._admits.get(batch_id)

    def __iter__(self) -> Iterator[ev.Admit]:
        return (admit for lane in list(self._lanes.values()) for admit in list(lane.batches.values()))

    def put(self, admit: ev.Admit) -> None:
        lane = self._lanes.setdefault(admit.tenant, Lane(admit.tenant))
        assert admit.batch_id not in self._admits
        self._admits[admit.batch_id] = lane.batches[admit.batch_id] = admit
        self._deadlines.put(admit.batch_id, None if admit.keyed else admit.deadline)
        lane.items += len(admit.needs)
        self.items += len(admit.needs)

    def first(self) -> ev.Admit | None:
        """The next batch. It stays the next until it is taken or dropped."""
        if not self._lanes:
            return None
        lane = next(iter(self._lanes.values()))
        if lane is not self._serving or lane.tokens < cost(lane.first):
            lane = self._advance()
        return lane.first

    def take(self) -> ev.Admit:
        """Remove the next batch, which its tenant pays for."""
        admit = self.first()
        assert admit is not None, "something waits"
        self._lanes[admit.tenant].tokens -= cost(admit)
        self.drop(admit)
        return admit

    def drop(self, admit: ev.Admit) -> None:
        """Remove a batch without payment."""
        lane = self._lanes[admit.tenant]
        del self._admits[admit.batch_id], lane.batches[admit.batch_id]
        self._deadlines.put(admit.batch_id, None)
        lane.items -= len(admit.needs)
        self.items -= len(admit.needs)
        if not lane.batches:
            del self._lanes[admit.tenant]

    def drop_expired(self, now: float) -> Iterator[ev.Admit]:
        """Remove the batches whose deadline has passed."""
        for batch_id in self._deadlines.due(now):
            self.drop(admit := self._admits[batch_id])
            yield admit

    def _advance(self) -> Lane:
        """End the present turn, and give turns until a lane can pay: all at once, however many there are."""
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


class AdmissionQueue:
    """Takes the sequencer's events and gives its effects.

    A batch waits only behind another, or while the sequencer has no room for it. It leaves once: to the sequencer, or refused.
    A batch without a key is also refused when its call ends or its deadline passes.
    """

    def __init__(self, core: Sequencer) -> None:
        self._core, self._bounds = core, core.bounds
        self.waiting = FairQueue()
        self.throughput = ThroughputEstimator(core.bounds.retry_after_seconds)

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """The effects of one event, in the order in which they are to be performed."""
        if isinstance(event, ev.Admit) and (self.waiting.items or not self._has_room(event) or event.expired(now)):
            return self._wait(event, now)
        effects = list(self._before(event, now)) if self.waiting.items else []
        if isinstance(event, ev.Ended):
            self.throughput.ended(now)
        effects += self._core.step(event, now)
        while self.waiting.items and self._core.window is not None:
            admit = self.waiting.first()
            if admit is None or not self._has_room(admit):
                break
            if admit.expired(now):
                self.waiting.drop(admit)
                effects.append(_expired(admit))
            else:
                effects += self._core.step(self.waiting.take(), now)
        return effects

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
        if error is None and own and own + len(admit.needs) > most:
            hint = self.throughput.retry_after(own * self.waiting.tenants, now)
            return errors.QueueFull(f"{own} items of this tenant wait, {most} may", retry_after=hint)
        return error

    def _has_room(self, admit: ev.Admit) -> bool:
        """Whether the batch may be numbered now. One that is larger than the bound enters when nothing else is numbered."""
        queued = self._core.queued
        return queued + len(admit.needs) <= self._bounds.numbered_items_max or not queued

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
