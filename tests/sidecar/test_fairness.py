"""Fair queueing: the deficit round robin against the textbook's loop, timers, and the admission queue over the sequencer."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.events import Admit, Need
from sidecar.core.fairness import LEAST_SECONDS, MOST_SECONDS, AdmissionQueue, FairQueue, ThroughputEstimator
from sidecar.core.sequencer import Sequencer, Timers
from sidecar.core.window import Bounds

QUANTUM = 10
TOKENS_MAX = 45


def batch(batch_id: int, tenant: str, *tokens: int) -> Admit:
    """With an item for each count of tokens."""
    return Admit(batch_id, tuple(Need(count, b"") for count in tokens), keyed=False, tenant=tenant)


def take(fair: FairQueue[Admit]) -> Admit:
    """The next batch, out of the queue."""
    admit = fair.first()
    assert admit is not None
    fair.take(admit)
    return admit


class Textbook:
    """Turn by turn: the first of the list gets a quantum and serves while it pays, then goes to the end."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Admit]] = {}
        self.saved: dict[str, int] = {}
        self.turns: deque[str] = deque()
        self.serving = ""

    def put(self, admit: Admit) -> None:
        if admit.tenant not in self.waiting:
            self.waiting[admit.tenant], self.saved[admit.tenant] = [], 0
            self.turns.append(admit.tenant)
        self.waiting[admit.tenant].append(admit)

    def first(self) -> Admit | None:
        while self.turns:
            tenant = self.turns[0]
            if self.serving != tenant:
                self.serving = tenant
                self.saved[tenant] += QUANTUM
            if self.waiting[tenant][0].cost <= self.saved[tenant]:
                return self.waiting[tenant][0]
            self.turns.rotate(-1)
            self.serving = ""
        return None

    def take(self) -> Admit:
        admit = self.first()
        assert admit is not None
        self.saved[admit.tenant] -= admit.cost
        self.drop(admit)
        return admit

    def drop(self, admit: Admit) -> None:
        self.waiting[admit.tenant].remove(admit)
        if not self.waiting[admit.tenant]:
            del self.waiting[admit.tenant], self.saved[admit.tenant]
            self.turns.remove(admit.tenant)
            self.serving = "" if self.serving == admit.tenant else self.serving


tenants = st.sampled_from("abcd")
puts = st.tuples(st.just("put"), tenants, st.lists(st.integers(0, TOKENS_MAX // 3), min_size=1, max_size=3))
steps = st.lists(puts | st.tuples(st.just("take")) | st.tuples(st.just("drop"), st.integers(0, 9)), max_size=60)


@given(steps)
def test_the_order_is_the_textbooks(script: Sequence[tuple[object, ...]]) -> None:
    """Whatever comes, goes and is served, the next batch is the one that turn after turn would find, and something is served
    as long as anything waits."""
    fair, book, waiting = FairQueue[Admit](QUANTUM), Textbook(), list[Admit]()
    for batch_id, step in enumerate(script):
        match step:
            case ("put", str(tenant), list(tokens)):
                waiting.append(batch(batch_id, tenant, *tokens))
                fair.put(waiting[-1])
                book.put(waiting[-1])
            case ("take",) if waiting:
                taken = take(fair)
                assert taken == book.take()
                waiting.remove(taken)
            case ("drop", int(which)) if waiting:
                gone = waiting.pop(which % len(waiting))
                fair.drop(gone)
                book.drop(gone)
        assert fair.first() == book.first()
        assert (fair.first() is None) == (not waiting)
        assert fair.items == sum(len(admit.needs) for admit in waiting) == sum(map(fair.items_of, "abcd"))
        assert {admit.batch_id for admit in fair} == {admit.batch_id for admit in waiting}


costs = st.lists(st.integers(1, TOKENS_MAX), min_size=1, max_size=40)


@given(costs, costs, st.integers(0, 40))
def test_of_two_that_wait_neither_is_far_ahead(mine: list[int], theirs: list[int], late: int) -> None:
    """From any moment on at which both wait, for as long as both do, what they got differs by less than a quantum and two of
    the largest batches; and each tenant's batches leave in their order."""
    fair, served = FairQueue[Admit](QUANTUM), {"a": list[int](), "b": list[int]()}
    for batch_id, tokens in enumerate(mine):
        fair.put(batch(batch_id, "a", tokens))
    for _ in range(min(late, len(mine) - 1)):
        take(fair)
    for batch_id, tokens in enumerate(theirs):
        fair.put(batch(1000 + batch_id, "b", tokens))
    while fair.tenants == 2:
        taken = take(fair)
        served[taken.tenant].append(taken.batch_id)
        given = {tenant: sum((mine if n < 1000 else theirs)[n % 1000] for n in done) for tenant, done in served.items()}

        assert abs(given["a"] - given["b"]) < QUANTUM + 2 * TOKENS_MAX
    assert all(done == sorted(done) for done in served.values())


@given(costs)
def test_alone_the_order_is_that_of_arrival(tokens: list[int]) -> None:
    """One tenant is served first come, first served, whatever its batches cost."""
    fair = FairQueue[Admit](QUANTUM)
    for batch_id, count in enumerate(tokens):
        fair.put(batch(batch_id, "", count))

    assert [take(fair).batch_id for _ in tokens] == list(range(len(tokens)))


MOMENTS = st.none() | st.integers(0, 20).map(float)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), MOMENTS), max_size=400))
def test_each_comes_once_when_it_is_due(steps: list[tuple[bool, int, float | None]]) -> None:
    """Whatever is put down, put off and dropped, what is due is what a look at all of them would find, the earliest first."""
    timers, plain = Timers(), dict[int, float]()
    for look, key, moment in steps:
        if look and moment is not None:
            expected = sorted((at, each) for each, at in plain.items() if at <= moment)
            assert list(timers.due(moment)) == [each for _, each in expected]
            plain = {each: at for each, at in plain.items() if at > moment}
        else:
            timers.put(key, moment)
            plain.pop(key, None)
            if moment is not None:
                plain[key] = moment


def test_what_was_put_off_takes_no_room() -> None:
    """However often a few are put off, the timers does not grow."""
    timers = Timers()
    for moment in range(100_000):
        timers.put(moment % 3, float(moment))
    assert len(timers._heap) < 100


MODEL = b"model"
ENGINE = ev.Connected(runs=4, kv_blocks=1 << 20, block_tokens=16, model_digest=MODEL, grade=types_pb2.GRADE_EXACT)


def bounds(queue: int = 1000, own: int = 1000, numbered: int = 8) -> Bounds:
    """A core's limits, its window as large as its engine."""
    return Bounds(queue, 4, attempts_max=3, item_timeout_seconds=1e6, tenant_queue_items_max=own, numbered_items_max=numbered)


@dataclass
class World:
    """An entrance, a journal that numbers at once, and an engine that runs a token in a hundredth of a second."""

    limits: Bounds
    now: float = 0.0
    numbers: dict[int, int] = field(default_factory=dict)
    """First sequence by batch id, in the order of the numbers."""
    refused: dict[int, errors.OstinatoError] = field(default_factory=dict)
    numbered_at: dict[int, float] = field(default_factory=dict)
    started_at: dict[int, float] = field(default_factory=dict)
    """By sequence, in the order of submission."""
    drained: bool = False

    def __post_init__(self) -> None:
        self.core = Sequencer(self.limits)
        self.queue = AdmissionQueue(self.core)
        self._needs: dict[int, tuple[ev.Need, ...]] = {}
        self._tokens: dict[int, int] = {}
        self.runs: list[tuple[float, int]] = []
        self._last, self._largest = 0, 1
        self.dispatch(ENGINE)

    def ask(self, batch_id: int, tenant: str = "", *tokens: int, keyed: bool = False, deadline: float | None = None) -> None:
        """A batch with an item for each count of tokens; without any, one of 10."""
        self._needs[batch_id] = tuple(ev.Need(count, MODEL) for count in tokens or (10,))
        self._largest = max(self._largest, len(self._needs[batch_id]))
        self.dispatch(ev.Admit(batch_id, self._needs[batch_id], keyed, None if keyed else deadline, tenant))

    def dispatch(self, event: ev.Event) -> None:
        for effect in self.queue.step(event, self.now):
            self._perform(effect)
        lost = self.core.window is None  # what the engine had goes back to what waits
        assert lost or self.core.queued <= max(self.limits.numbered_items_max, self._largest), "too many are numbered"

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.AppendAdmission(batch_id):
                first, self._last = self._last + 1, self._last + len(self._needs[batch_id])
                self.numbers[batch_id], self.numbered_at[batch_id] = first, self.now
                self._tokens |= {first + place: need.kv_tokens for place, need in enumerate(self._needs[batch_id])}
                self.dispatch(ev.Numbered(batch_id, first))
            case ev.Refuse(batch_id, error):
                assert batch_id not in self.refused
                assert batch_id not in self.numbers, "refusals come before numbers"
                self.refused[batch_id] = error
            case ev.Submit(run_id, sequence):
                self.started_at.setdefault(sequence, self.now)
                heapq.heappush(self.runs, (self.now + self._tokens[sequence] / 100, run_id))
            case ev.End(sequence):
                self.dispatch(ev.Ended((sequence,)))
            case ev.Drained():
                self.drained = True

    def run(self, until: float) -> None:
        """Lets the engine work."""
        while self.runs and self.runs[0][0] <= until:
            self.now, run_id = heapq.heappop(self.runs)
            self.dispatch(ev.Reported((ev.Started(run_id),)))
            self.dispatch(ev.Reported((ev.Finished(run_id, types_pb2.GRADE_EXACT),)))
        self.now = until


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_hurts_its_own_tenant(seed: int) -> None:
    """One tenant sends 800 items at once, another a third of what the engine can do: of its items 99 in 100 start within a
    second, which the engine needs for what is numbered and in flight. In one queue for all they start after the flood."""
    p99 = dict[int, float]()
    for numbered in (8, 4000):
        chance, world = random.Random(seed), World(bounds(queue=4000, own=4000, numbered=numbered))
        for batch_id in range(800):
            world.ask(batch_id, "flood", chance.randint(5, 15))
        asked = dict[int, float]()
        for batch_id in range(1000, 1200):
            world.run(world.now + chance.expovariate(13))
            asked[batch_id] = world.now
            world.ask(batch_id, "other", chance.randint(5, 15))
        world.run(world.now + 1000)
        p99[numbered] = sorted(world.started_at[world.numbers[batch_id]] - at for batch_id, at in asked.items())[-2]

        assert not world.refused
        assert len(world.numbers) == len(world.started_at) == 1000, f"seed {seed}: all are served"
    assert p99[8] < 1.0, f"seed {seed}: {p99}"
    assert p99[4000] > 5.0, f"seed {seed}: {p99}"


@given(st.lists(st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1)), max_size=30))
def test_alone_nothing_changes(script: list[tuple[list[int], float]]) -> None:
    """Where the numbered are not bounded, every batch is numbered the moment it comes; where they are, in the same order."""
    free, held = World(bounds(numbered=1000)), World(bounds(numbered=2))
    for world in (free, held):
        asked = []
        for batch_id, (tokens, pause) in enumerate(script):
            world.run(world.now + pause)
            asked.append(world.now)
            world.ask(batch_id, "", *tokens)
        if world is free:
            assert list(world.numbered_at.values()) == asked
        world.run(world.now + 1000)
        assert list(world.numbers) == list(range(len(script)))
    assert free.numbers == held.numbers
    assert list(free.started_at) == list(held.started_at)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans(), st.integers(0, 3)), max_size=40))
def test_every_batch_leaves_once(script: list[tuple[str, int, bool, int]]) -> None:
    """Under floods, cancelled calls and passed deadlines each batch is numbered or refused, never both, and within a tenant
    numbers ascend with arrival. (World asserts on every event that no more wait numbered than may.)"""
    world = World(bounds(queue=30, own=12, numbered=4))
    tenants = {batch_id: tenant for batch_id, (tenant, *_) in enumerate(script)}
    for batch_id, (tenant, count, keyed, leaves) in enumerate(script):
        world.ask(batch_id, tenant, *[10] * count, keyed=keyed, deadline=world.now + 0.5)
        if leaves == 0 and batch_id:
            world.dispatch(ev.CancelBatch(batch_id - 1, errors.Cancelled("gone")))
        world.run(world.now + 0.02 * leaves)
        world.dispatch(ev.Tick())
    world.run(world.now + 1000)

    assert sorted([*world.numbers, *world.refused]) == list(range(len(script)))
    assert world.queue.waiting.items == 0
    for tenant in "abc":
        own = [batch_id for batch_id in world.numbers if tenants[batch_id] == tenant]
        assert own == sorted(own)


def test_a_batch_with_room_is_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room a batch is neither queued nor checked twice. One whose deadline has passed is refused without a
    sequence."""
    world = World(bounds())
    checked = list[int]()
    refusal = world.core.refusal

    def noted(admit: Admit, queued: int) -> errors.OstinatoError | None:
        checked.append(admit.batch_id)
        return refusal(admit, queued)

    monkeypatch.setattr(world.core, "refusal", noted)
    monkeypatch.setattr(world.queue.waiting, "put", lambda admit: pytest.fail("queued"))
    for batch_id in range(4):
        world.ask(batch_id)
    world.ask(4, deadline=world.now)

    assert list(world.numbers) == [0, 1, 2, 3]
    assert checked == [0, 1, 2, 3, 4]
    assert {batch_id: error.reason for batch_id, error in world.refused.items()} == {4: "DEADLINE_EXCEEDED"}


def test_who_leaves_before_a_number_leaves_no_trace() -> None:
    """Without a key a caller that goes, or whose deadline passes, burns no number; with a key the batch goes on."""
    world = World(bounds(numbered=1))
    for batch_id in range(6):
        world.ask(batch_id)
    world.ask(6)
    world.ask(7, keyed=True, deadline=0.05)
    world.ask(8, deadline=0.05)
    world.dispatch(ev.CancelBatch(6, errors.Cancelled("gone")))
    world.dispatch(ev.CancelBatch(7, errors.Cancelled("gone")))
    world.now = 0.06
    world.dispatch(ev.Tick())
    world.run(10)

    assert list(world.numbers) == [0, 1, 2, 3, 4, 5, 7]
    assert {batch_id: error.reason for batch_id, error in world.refused.items()} == {6: "CANCELLED", 8: "DEADLINE_EXCEEDED"}


def test_a_full_tenant_is_refused_and_another_is_not() -> None:
    """A tenant's own bound refuses it alone, with a hint; the bound of all refuses every tenant."""
    world = World(bounds(queue=20, own=4, numbered=2))
    for batch_id in range(12):
        world.ask(batch_id, "flood")
    world.ask(20, "other")
    for batch_id in range(30, 60):
        world.ask(batch_id, f"tenant {batch_id}")

    assert [batch_id for batch_id in world.refused if batch_id < 20] == [10, 11]
    assert "of this tenant" in world.refused[10].message
    assert 20 not in world.refused
    assert "of this tenant" not in world.refused[59].message
    assert {type(error) for error in world.refused.values()} == {errors.QueueFull}
    assert all(error.retry_after for error in world.refused.values())


def test_a_batch_larger_than_the_room_has_it_alone() -> None:
    """What is larger than the bound on numbered items waits until none waits, and then is numbered whole."""
    world = World(bounds(numbered=3))
    for batch_id in range(6):
        world.ask(batch_id)
    world.ask(6, "", *[10] * 9)
    world.ask(7)
    assert 6 not in world.numbers
    world.run(10)

    assert list(world.numbers) == list(range(8))


def test_what_waits_outlives_the_engine_but_not_the_drain() -> None:
    """Without an engine nothing is let in or refused that waits already; a drain refuses it all and ends."""
    world = World(bounds(numbered=1))
    for batch_id in range(12):
        world.ask(batch_id, keyed=True)
    world.dispatch(ev.Disconnected())
    world.runs.clear()
    world.ask(12)
    assert {batch_id: error.reason for batch_id, error in world.refused.items()} == {12: "ENGINE_UNAVAILABLE"}
    assert len(world.numbers) == 5
    world.dispatch(ENGINE)
    world.run(world.now + 0.1)
    assert len(world.numbers) > 5
    left = [batch_id for batch_id in range(12) if batch_id not in world.numbers]
    world.dispatch(ev.Drain())
    world.run(10)

    assert {world.refused[batch_id].reason for batch_id in left} == {"DRAINING"}
    assert world.drained


@given(st.integers(1, 300), st.floats(0.001, 30), st.integers(0, 10**6), st.floats(0, 100))
def test_the_hint_follows_the_pace(ended: int, gap: float, queued: int, later: float) -> None:
    """The hint stays within its bounds, grows with the queue and with silence, and is about half the queue's time."""
    pace = ThroughputEstimator(unknown_seconds=1.0)
    assert pace.retry_after(queued, 0.0) == 1.0
    for number in range(ended):
        pace.ended(1, number * gap)
    now = (ended - 1) * gap
    hint = pace.retry_after(queued, now)

    assert LEAST_SECONDS <= hint <= MOST_SECONDS
    assert hint <= pace.retry_after(queued + 100, now)
    assert hint <= pace.retry_after(queued, now + later)


def test_the_hint_is_half_the_queues_time() -> None:
    """At a steady 20 items a second, 400 that wait are a hint of 10 seconds."""
    pace = ThroughputEstimator(unknown_seconds=1.0)
    for number in range(2000):
        pace.ended(1, number / 20)

    assert pace.retry_after(400, 2000 / 20) == pytest.approx(10, rel=0.02)
