"""Deficit round robin against the textbook's loop, and what it promises two tenants that both wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.events import Admit, Need
from sidecar.core.fairness import FairQueue, cost

QUANTUM = 10
TOKENS_MAX = 45


def batch(batch_id: int, tenant: str, *tokens: int) -> Admit:
    """Of items with so many tokens."""
    return Admit(batch_id, tuple(Need(count, b"") for count in tokens), keyed=False, tenant=tenant)


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
            if cost(self.waiting[tenant][0]) <= self.saved[tenant]:
                return self.waiting[tenant][0]
            self.turns.rotate(-1)
            self.serving = ""
        return None

    def take(self) -> Admit:
        admit = self.first()
        assert admit is not None
        self.saved[admit.tenant] -= cost(admit)
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
    fair, book, waiting = FairQueue(QUANTUM), Textbook(), list[Admit]()
    for batch_id, step in enumerate(script):
        match step:
            case ("put", str(tenant), list(tokens)):
                waiting.append(batch(batch_id, tenant, *tokens))
                fair.put(waiting[-1])
                book.put(waiting[-1])
            case ("take",) if waiting:
                taken = fair.take()
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
    fair, served = FairQueue(QUANTUM), {"a": list[int](), "b": list[int]()}
    for batch_id, tokens in enumerate(mine):
        fair.put(batch(batch_id, "a", tokens))
    for _ in range(min(late, len(mine) - 1)):
        fair.take()
    for batch_id, tokens in enumerate(theirs):
        fair.put(batch(1000 + batch_id, "b", tokens))
    while fair.tenants == 2:
        taken = fair.take()
        served[taken.tenant].append(taken.batch_id)
        given = {tenant: sum((mine if n < 1000 else theirs)[n % 1000] for n in done) for tenant, done in served.items()}

        assert abs(given["a"] - given["b"]) < QUANTUM + 2 * TOKENS_MAX
    assert all(done == sorted(done) for done in served.values())


@given(costs)
def test_alone_the_order_is_that_of_arrival(tokens: list[int]) -> None:
    """One tenant is served first come, first served, whatever its batches cost."""
    fair = FairQueue(QUANTUM)
    for batch_id, count in enumerate(tokens):
        fair.put(batch(batch_id, "", count))

    assert [fair.take().batch_id for _ in tokens] == list(range(len(tokens)))
