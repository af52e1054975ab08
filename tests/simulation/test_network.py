"""The simulated network: a call is known to it as long as anything of the call can still arrive or be lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from ostinato import errors

from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.network import KEEPALIVE_SECONDS, Incoming, Network, Outgoing

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

    def answered_into_a_cut(self) -> Outgoing:
        """A call whose handler has ended, and whose answer is held by a cut."""
        call = self.call()
        self.wait(DELAY_SECONDS)
        self.network.cut(PATH)
        self.wait(2 * DELAY_SECONDS)
        assert call.incoming is not None
        assert call.incoming.over
        assert not call.ended
        return call

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


def test_a_held_answer_arrives_when_the_path_is_healed(line: Line) -> None:
    """An answer that a cut holds is read by its caller after the heal, though its handler had ended before."""
    call = line.answered_into_a_cut()

    line.network.heal(PATH)

    assert line.loop.run_until_complete(call.read()) == b"answer"
    assert line.loop.run_until_complete(call.read()) is None


def test_heal_reaches_every_call(line: Line) -> None:
    """A call that ends in the heal does not hide the next one from it."""
    calls = [line.call() for _ in range(4)]
    line.wait(DELAY_SECONDS)
    line.network.cut(PATH)
    line.wait(2 * DELAY_SECONDS)

    line.network.heal(PATH)

    assert [call.ended for call in calls] == [True] * 4


BREAKS: dict[str, Callable[[Line], object]] = {
    "keepalive": lambda line: line.wait(KEEPALIVE_SECONDS),
    "reset": lambda line: line.network.reset(PATH),
    "died": lambda line: line.network.died(line.node),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_held_answer_is_lost_with_its_connection(line: Line, how: str) -> None:
    """The caller of an answer that a cut holds is told when the connection breaks, though its handler had ended before."""
    call = line.answered_into_a_cut()

    BREAKS[how](line)
    line.wait(2 * DELAY_SECONDS)

    assert call.ended
    with pytest.raises(errors.Disconnected):
        line.loop.run_until_complete(call.read())


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
