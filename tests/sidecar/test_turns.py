"""Turns between tenants for long work."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors

from sidecar.turns import TurnQueue


@dataclass
class Calls:
    """A queue, and the calls in it. A call that has its place waits until it is told to end."""

    queue: TurnQueue
    begun: list[int] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    calls: list[tuple[str, asyncio.Task[None], asyncio.Event]] = field(default_factory=list)

    def ask(self, tenant: str, cost: int = 10_000) -> None:
        number, gate = len(self.calls), asyncio.Event()

        async def call() -> None:
            async with self.queue.place(tenant, cost):
                self.begun.append(number)
                await gate.wait()
            self.ended.add(number)

        self.calls.append((tenant, asyncio.create_task(call()), gate))

    def held(self) -> list[int]:
        return [number for number in self.begun if not self.calls[number][1].done()]

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "end", "leave"]), st.sampled_from("abc"), st.integers(0, 9)), max_size=40),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
)
def test_the_places_are_shared(script: list[tuple[str, str, int]], bounds: tuple[int, int]) -> None:
    """Whatever callers do, no more are prepared than there are places, none of a tenant above its own; no place stays free for
    which a request waits; a tenant's requests begin in their order, unless their callers leave; and none is forgotten."""
    places, own = bounds

    async def run() -> None:
        made = Calls(TurnQueue(places, own, 100))
        for what, tenant, which in script:
            if what == "ask":
                made.ask(tenant)
            elif made.calls:
                _, task, gate = made.calls[which % len(made.calls)]
                task.cancel() if what == "leave" else gate.set()
            await made.settle()
            held = Counter(made.calls[number][0] for number in made.held())
            waits = {each for number, (each, task, _) in enumerate(made.calls) if number not in made.begun and not task.done()}
            assert held.total() <= places
            assert all(count <= own for count in held.values())
            assert held.total() == places or all(held[each] == own for each in waits)
        for _, _, gate in made.calls:
            gate.set()
        await asyncio.gather(*(task for _, task, _ in made.calls), return_exceptions=True)
        for tenant in "abc":
            mine = [number for number in made.begun if made.calls[number][0] == tenant]
            assert mine == sorted(mine)
        assert made.ended == {number for number, (_, task, _) in enumerate(made.calls) if not task.cancelled()}
        assert not (made.queue._held or made.queue._turns or made.queue._waiting.items)

    asyncio.run(run())


async def test_a_flood_of_long_requests_waits_for_itself() -> None:
    """While a tenant floods, another's long request begins at once; of two floods that wait, each gets the same bytes; above
    its bound a tenant is refused with a hint, and another is not."""
    made = Calls(TurnQueue(2, 1, 20))
    for _ in range(21):
        made.ask("flood", 400_000)
    await made.settle()
    made.ask("other", 5_000)
    await made.settle()
    begun = list(made.begun)
    with pytest.raises(errors.QueueFull, match="of this tenant") as refused:
        async with made.queue.place("flood", 1):
            pass
    for _, task, _ in made.calls:
        task.cancel()
    await asyncio.gather(*(task for _, task, _ in made.calls), return_exceptions=True)

    assert begun == [0, 21]
    assert refused.value.retry_after
