"""The simulated network, where its faults would make the simulation too kind or too slow. Others are found by its seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from ostinato import errors

from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.network import Incoming, Network, Outgoing

PATH = "clients"
DELAY_SECONDS = 0.01


class Line:
    """A caller without a process and a called process that answers every call at once, with one message."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.network = Network(self.loop, random.Random(1), (DELAY_SECONDS, DELAY_SECONDS))
        self.node = Node(self.loop, "called")

    def call(self, *, deadline: float | None = None) -> Outgoing:
        return Outgoing(self.network, PATH, None, lambda: (self.node, self._answer), deadline=deadline)

    def wait(self, seconds: float) -> None:
        async def until() -> None:
            loop = self.loop
            passed = loop.create_future()
            loop.call_later(seconds, passed.set_result, None)
            await passed

        self.loop.run_until_complete(until())

    @staticmethod
    async def _answer(incoming: Incoming) -> None:
        incoming._call.answer(b"answer")


@pytest.fixture(name="line")
def _line() -> Iterator[Line]:
    line = Line()
    yield line
    line.loop.shut()


def test_an_answer_under_way_is_lost_with_its_connection(line: Line) -> None:
    """A connection that breaks behind the end of a handler takes with it the answer that has not arrived."""
    call = line.call()
    line.wait(1.5 * DELAY_SECONDS)

    line.network.reset(PATH)

    with pytest.raises(errors.Disconnected):
        line.loop.run_until_complete(call.read())


@pytest.mark.parametrize("how", ["answered", "cancelled", "deadline", "reset", "died"])
def test_an_ended_call_is_forgotten(line: Line, how: str) -> None:
    """The network keeps no call of which nothing can arrive any more."""
    if how == "died":
        line.node.stop()  # its handler never ends
    call = line.call(deadline=DELAY_SECONDS / 2 if how == "deadline" else None)
    if how == "cancelled":
        call.cancel()
    if how == "reset":
        line.network.reset(PATH)
    if how == "died":
        line.wait(DELAY_SECONDS)
        line.network.died(line.node)
    line.wait(5 * DELAY_SECONDS)

    assert call.ended
    assert line.network.calls == []
