"""The engine between tenants: what one may hold, who goes ahead of whom, and that alone nothing changes."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.events import Need
from sidecar.core.fairness import AdmissionQueue
from sidecar.core.sequencer import Sequencer
from sidecar.core.window import Bounds

MODEL, BLOCKS = b"model", 100


@dataclass
class World:
    """A journal that numbers at once, and an engine of 8 runs and 100 blocks of one token, which makes a token in 10 ms.

    Whatever is submitted is checked: a tenant holds no more than it may, and what goes ahead of a lower sequence passes only
    items of tenants that hold their share.
    """

    share: float
    runs_max: int = 8
    now: float = 0.0
    tenants: dict[int, str] = field(default_factory=dict)
    """By sequence."""
    tokens: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Sequences that the engine has."""
    submitted: list[int] = field(default_factory=list)
    started_at: dict[int, float] = field(default_factory=dict)
    refused: dict[int, errors.OstinatoError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = Bounds(
            queue_items_max=4000,
            window_runs_max=2 * self.runs_max,
            attempts_max=3,
            item_timeout_seconds=1e6,
            numbered_items_max=8,
            tenant_share=self.share,
        )
        self.core = Sequencer(limits)
        self.queue = AdmissionQueue(self.core)
        self.asked: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.ends: list[tuple[float, int, int]] = []
        self.newest = 0
        self.dispatch(ev.Connected(self.runs_max, BLOCKS, 1, MODEL, types_pb2.GRADE_EXACT))

    def ask(self, tenant: str, *tokens: int) -> int:
        """A batch with an item for each count of tokens; its id."""
        batch_id = len(self.asked)
        self.asked[batch_id] = tenant, tokens
        self.dispatch(ev.Admit(batch_id, tuple(Need(count, MODEL) for count in tokens), keyed=False, tenant=tenant))
        return batch_id

    def dispatch(self, event: ev.Event) -> None:
        """The effects of one event are performed before the next event is told."""
        events = deque([event])
        while events:
            for effect in self.queue.step(events.popleft(), self.now):
                events += self.perform(effect)

    def perform(self, effect: ev.Effect) -> Iterator[ev.Event]:
        match effect:
            case ev.AppendAdmission(batch_id):
                tenant, tokens = self.asked[batch_id]
                first = len(self.tenants) + 1
                for sequence, count in enumerate(tokens, first):
                    self.tenants[sequence], self.tokens[sequence] = tenant, count
                    self.waiting.append(sequence)
                yield ev.Numbered(batch_id, first)
            case ev.Submit(run_id, sequence):
                self.check(sequence, ahead=effect.ahead)
                self.waiting.remove(sequence)
                self.held.append(sequence)
                self.submitted.append(sequence)
                self.started_at[sequence] = self.now
                heapq.heappush(self.ends, (self.now + self.tokens[sequence] / 100, sequence, run_id))
            case ev.End(sequence):
                yield ev.Ended((sequence,))
            case ev.Refuse(batch_id, error):
                self.refused[batch_id] = error

    def may(self, sequence: int) -> bool:
        """Whether the item's tenant may hold it too."""
        tenant = self.tenants[sequence]
        mine = [each for each in self.held if self.tenants[each] == tenant]
        wait = {self.tenants[each] for each in self.waiting}
        here = wait | {self.tenants[each] for each in self.held}
        part = min(self.share, 1 / len(here)) if wait - {tenant} else self.share
        blocks = sum(self.tokens[each] for each in mine) + self.tokens[sequence]
        return not mine or (len(mine) < max(1, int(part * self.runs_max)) and blocks <= part * BLOCKS)

    def check(self, sequence: int, *, ahead: bool) -> None:
        passed = [each for each in self.waiting if each < sequence]
        assert ahead == bool(passed)
        if self.share == 1:
            assert not passed
            return
        assert self.may(sequence), "a tenant holds its share at most"
        heads = {self.tenants[each]: each for each in reversed(passed)}
        assert self.tenants[sequence] not in heads, "within a tenant nothing overtakes"
        assert not any(map(self.may, heads.values())), "what may start is not overtaken"
        if not ahead:
            assert sequence > self.newest
            self.newest = sequence

    def run(self, until: float) -> None:
        """Lets the engine work."""
        while self.ends and self.ends[0][0] <= until:
            self.now, sequence, run_id = heapq.heappop(self.ends)
            self.held.remove(sequence)
            self.dispatch(ev.Reported((ev.Started(run_id),)))
            self.dispatch(ev.Reported((ev.Finished(run_id, types_pb2.GRADE_EXACT),)))
        self.now = until


scripts = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, BLOCKS), min_size=1, max_size=12), st.floats(0, 2)), max_size=25
)


@given(scripts, st.sampled_from([0.25, 0.5, 0.875, 1.0]))
def test_only_those_with_their_share_are_overtaken(script: list[tuple[str, list[int], float]], share: float) -> None:
    """Whatever tenants ask, each submission keeps the shares and passes nothing that may start (World asserts both); within a
    tenant the order is that of the sequences, without shares it is for all; and everything is served."""
    world = World(share)
    for tenant, tokens, pause in script:
        world.ask(tenant, *tokens)
        world.run(world.now + pause)
    world.run(world.now + 1e6)

    assert not world.refused
    assert sorted(world.submitted) == list(range(1, len(world.tenants) + 1))
    for tenant in "abc":
        own = [sequence for sequence in world.submitted if world.tenants[sequence] == tenant]
        assert own == sorted(own)
    assert not world.core.shares._holdings
    assert world.core.shares.waiting == 0


def test_a_batch_does_not_hold_up_another_tenant() -> None:
    """A batch of 64 long items fills the part of the engine that its tenant may hold. Another's short one starts at once; in
    one order for all it starts when nearly the whole batch has ended."""
    waited = dict[float, float]()
    for share in (0.875, 1.0):
        world = World(share)
        world.ask("flood", *[12] * 64)
        world.run(0.05)
        world.ask("other", 4)
        world.run(1e6)
        waited[share] = world.started_at[65] - 0.05

    assert waited[0.875] == 0
    assert waited[1.0] > 0.6


def test_tenants_that_wait_share_alike() -> None:
    """While three floods wait, each holds its part of the engine as runs end; a fourth tenant's item is next."""
    world = World(0.875, runs_max=9)
    for number, tenant in enumerate("abc"):
        world.ask(tenant, *[8 + number] * 40)
    world.run(0.6)
    shares = Counter(world.tenants[sequence] for sequence in world.held)
    asked = world.now
    world.ask("d", 2)
    world.run(1e6)

    assert shares == {"a": 3, "b": 3, "c": 3}
    assert world.started_at[121] - asked < 0.1


def test_a_lost_engine_leaves_no_shares_behind() -> None:
    """What ran waits again when the engine is lost, and the next engine takes all of it, in order."""
    world = World(0.5)
    world.ask("a", 10, 10, 10, 10, 10)
    world.ask("b", 10, 10)
    lost = sorted(world.held)
    world.dispatch(ev.Disconnected())
    world.waiting, world.held, world.ends, world.newest = sorted([*world.waiting, *lost]), [], [], 0
    world.dispatch(ev.Connected(8, BLOCKS, 1, MODEL, types_pb2.GRADE_EXACT))
    again = sorted(world.held)
    world.run(1e6)

    assert again == lost
    assert sorted(set(world.submitted)) == list(range(1, 8))
    assert not world.core.shares._holdings
