"""Runs without a number beside those that have one. The numbers in the claims are those of `sidecar.core.reruns`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ostinato import errors

from sidecar.core import events as ev
from sidecar.core.sequencer import Sequencer
from tests.sidecar.sequencer_kit import BOUNDS, EXACT, Edge, connected, engine, need

VERIFY, REPLAY, BACKGROUND = ev.Urgency.VERIFY, ev.Urgency.REPLAY, ev.Urgency.BACKGROUND


def shared(share: float, *, runs: int = 4, blocks: int = 64) -> Edge:
    """An engine of which reruns may hold this share."""
    edge = Edge(Sequencer(replace(BOUNDS, reruns_share=share)))
    edge.dispatch(engine(runs=runs, blocks=blocks))
    return edge


def begun(edge: Edge) -> list[int]:
    """The reruns that were submitted, in order."""
    return [effect.rerun_id for effect in edge.effects if isinstance(effect, ev.SubmitRerun)]


def run_of(edge: Edge, rerun_id: int) -> int:
    return next(e.run_id for e in edge.effects if isinstance(e, ev.SubmitRerun) and e.rerun_id == rerun_id)


def lost(edge: Edge) -> dict[int, str]:
    """Why reruns were lost."""
    return {effect.rerun_id: effect.error.reason for effect in edge.effects if isinstance(effect, ev.RerunLost)}


def test_reruns_wait_behind_items() -> None:
    """2: a rerun begins when no item waits and the engine has a run free, and is lost with the engine."""
    edge = connected(runs=1)
    edge.admit(need(), need(), need())
    edge.dispatch(ev.Rerun(1, 8, BACKGROUND))
    edge.dispatch(ev.Rerun(2, 8, BACKGROUND))
    edge.finish(1)
    edge.finish(2)

    assert begun(edge) == []

    edge.finish(3)

    assert begun(edge) == [1]

    edge.dispatch(ev.Disconnected())

    assert lost(edge) == {1: "ENGINE_UNAVAILABLE", 2: "ENGINE_UNAVAILABLE"}


def test_a_verification_takes_over_the_room_of_its_item() -> None:
    """1: told before the end of the first run, it goes before the head that waits for the same room."""
    edge = connected(runs=8, blocks=4)
    edge.admit(need(24), need(16), need(8))
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))
    edge.dispatch(ev.Rerun(1, 24, VERIFY))

    assert begun(edge) == []

    edge.dispatch(ev.Reported((ev.Finished(edge.run_of(1), EXACT),)))

    assert begun(edge) == [1]
    assert [submit.sequence for submit in edge.submits()] == [1]

    edge.dispatch(ev.Reported((ev.Finished(run_of(edge, 1), EXACT),)))

    assert [submit.sequence for submit in edge.submits()] == [1, 2, 3]


def test_a_large_head_is_not_kept_waiting_by_small_reruns() -> None:
    """2: while the head waits for KV room no rerun begins, small as it may be."""
    edge = shared(1.0, runs=8, blocks=4)
    edge.admit(need(16), need(32))
    edge.dispatch(ev.Rerun(1, 8, REPLAY))

    assert begun(edge) == []

    edge.finish(1)

    assert [submit.sequence for submit in edge.submits()] == [1, 2]
    assert begun(edge) == []


def test_the_urgent_go_first() -> None:
    """4: a replay that came later begins before audits that wait, and of equals the older begins first."""
    edge = shared(0.25)
    for rerun_id, urgency in enumerate([BACKGROUND, BACKGROUND, BACKGROUND, REPLAY], start=1):
        edge.dispatch(ev.Rerun(rerun_id, 8, urgency))
    for rerun_id in (1, 4, 2):
        edge.dispatch(ev.Reported((ev.Finished(run_of(edge, rerun_id), EXACT),)))

    assert begun(edge) == [1, 4, 2, 3]


@pytest.mark.parametrize(
    ("share", "tokens", "together"), [(0.25, 8, 1), (0.5, 8, 2), (1.0, 8, 4), (0.0, 8, 1), (0.5, 256, 1), (0.5, 400, 1)]
)
def test_reruns_keep_to_their_share(share: float, tokens: int, together: int) -> None:
    """3: this many begin together, of an engine with 4 runs and 64 blocks of 8 tokens; one always may."""
    edge = shared(share)
    for rerun_id in range(1, 7):
        edge.dispatch(ev.Rerun(rerun_id, tokens, BACKGROUND))

    assert begun(edge) == [*range(1, together + 1)]


def test_waiting_reruns_are_bounded() -> None:
    """The bound for each urgency: what is above it is lost at once, and verifications are bounded by their items."""
    edge = Edge(Sequencer(replace(BOUNDS, reruns_max=2)))
    edge.dispatch(engine(runs=1))
    edge.admit(need(), need(), need())
    for rerun_id in range(1, 4):
        edge.dispatch(ev.Rerun(rerun_id, 8, BACKGROUND))
        edge.dispatch(ev.Rerun(10 + rerun_id, 8, REPLAY))
        edge.dispatch(ev.Rerun(20 + rerun_id, 8, VERIFY))

    assert lost(edge) == {3: "QUEUE_FULL", 13: "QUEUE_FULL"}


def test_replays_of_tenants_take_turns() -> None:
    """4: of two tenants whose replays wait, the next is of the one with fewer running; alone it is the order of arrival."""
    edge = Edge(Sequencer(replace(BOUNDS, reruns_share=0.5, tenant_share=0.9)))
    edge.dispatch(engine(runs=4))
    for rerun_id in range(1, 9):
        edge.dispatch(ev.Rerun(rerun_id, 8, REPLAY, tenant="flood"))
    edge.dispatch(ev.Rerun(9, 8, REPLAY, tenant="other"))
    for rerun_id in (1, 2, 9):
        edge.dispatch(ev.Reported((ev.Finished(run_of(edge, rerun_id), EXACT),)))

    assert begun(edge) == [1, 2, 9, 3, 4]


def test_a_tenants_replays_leave_room_for_others() -> None:
    """5: a tenant's replays may fill a fourth of the places; without tenants all."""
    for share, full in ((0.9, True), (1.0, False)):
        edge = Edge(Sequencer(replace(BOUNDS, reruns_max=8, tenant_share=share)))
        edge.dispatch(engine(runs=1))
        for rerun_id in range(1, 4):
            edge.dispatch(ev.Rerun(rerun_id, 8, REPLAY, tenant="flood"))

        assert edge.core.reruns.room("flood") is not full
        assert edge.core.reruns.room("other")


def test_reruns_leave_what_no_tenant_may_hold() -> None:
    """3: with shares, reruns do not take the room that is kept for another tenant's item."""
    edge = Edge(Sequencer(replace(BOUNDS, reruns_share=1.0, tenant_share=0.75)))
    edge.dispatch(engine(runs=4))
    for rerun_id in range(1, 5):
        edge.dispatch(ev.Rerun(rerun_id, 8, BACKGROUND))
    edge.admit(need())

    assert begun(edge) == [1, 2, 3]
    assert [submit.sequence for submit in edge.submits()] == [1]


def test_no_engine_no_rerun() -> None:
    """Without an engine, in a drain, or where it can never fit, a rerun is lost at once with the reason."""
    edge = Edge()
    edge.dispatch(ev.Rerun(1, 8, REPLAY))
    edge.dispatch(engine(blocks=1))
    edge.dispatch(ev.Rerun(2, 9, REPLAY))
    edge.dispatch(ev.Drain())
    edge.dispatch(ev.Rerun(3, 8, VERIFY))

    assert lost(edge) == {1: "ENGINE_UNAVAILABLE", 2: "ENGINE_FAILED", 3: "DRAINING"}


def test_a_silent_engine() -> None:
    """A rerun that the engine is silent about past its time is cancelled and lost, and its room is free again."""
    edge = shared(0.25)
    edge.dispatch(ev.Rerun(1, 8, BACKGROUND))
    edge.dispatch(ev.Rerun(2, 8, BACKGROUND))
    edge.now = BOUNDS.item_timeout_seconds + BOUNDS.overdue_seconds
    edge.dispatch(ev.Tick())

    assert lost(edge) == {1: "DEADLINE_EXCEEDED"}
    assert ev.CancelRun(run_of(edge, 1)) in edge.effects
    assert begun(edge) == [1, 2]


def test_a_dropped_rerun() -> None:
    """One that is cancelled leaves the queue, or the engine."""
    edge = shared(0.25)
    edge.dispatch(ev.Rerun(1, 8, BACKGROUND))
    edge.dispatch(ev.Rerun(2, 8, BACKGROUND))
    edge.dispatch(ev.Rerun(3, 8, BACKGROUND))
    edge.dispatch(ev.CancelRerun(2))
    edge.dispatch(ev.CancelRerun(1))

    assert begun(edge) == [1, 3]
    assert ev.CancelRun(run_of(edge, 1)) in edge.effects
    assert lost(edge) == {}


def test_late_events_of_a_dropped_rerun() -> None:
    """An event of a rerun that was cancelled is not a fault of the service."""
    edge = shared(0.25)
    edge.dispatch(ev.Rerun(1, 8, BACKGROUND))
    edge.dispatch(ev.CancelRerun(1))

    assert edge.dispatch(ev.Reported((ev.Failed(run_of(edge, 1), errors.EngineFailed("late")),))) == []
