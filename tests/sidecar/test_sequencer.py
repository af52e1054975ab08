"""The sequencing core, event by event. The numbers in the claims are the invariants of `sidecar.core.sequencer`."""

from __future__ import annotations

from ostinato import errors

from sidecar.core import events as ev
from sidecar.core.sequencer import UNATTRIBUTED_CRASHES_MAX, Phase
from tests.sidecar.sequencer_kit import BOUNDS, EXACT, SERIAL, Edge, connected, engine, need, reruns


def test_submission_follows_sequence() -> None:
    """1: first submissions leave in ascending order of sequence, as many as the window holds."""
    edge = connected(runs=2)
    edge.admit(*[need()] * 6)

    assert [submit.sequence for submit in edge.submits()] == [1, 2, 3, 4]

    edge.finish(3)

    assert [submit.sequence for submit in edge.submits()] == [1, 2, 3, 4, 5]


def test_head_is_not_overtaken() -> None:
    """3: a head that waits for KV room is not overtaken by one that would fit."""
    edge = connected(runs=8, blocks=4)
    edge.admit(need(24), need(16), need(8))

    assert [submit.sequence for submit in edge.submits()] == [1]

    edge.finish(1)

    assert [submit.sequence for submit in edge.submits()] == [1, 2, 3]


def test_never_fits_is_refused() -> None:
    """What can never fit is refused by name, before it has a number."""
    error = connected(blocks=4).refused(need(8), need(33))

    assert isinstance(error, errors.InvalidRequest)
    assert error.violations[0].field == "items[1]"


def test_no_engine_no_number() -> None:
    """Without an engine nothing is numbered, and the caller is told when to come back."""
    error = Edge().refused(need())

    assert isinstance(error, errors.EngineUnavailable)
    assert error.retry_after


def test_queue_is_bounded() -> None:
    """A batch that the queue has no room for is refused whole, with a hint when to come back."""
    edge = connected(runs=1)
    edge.admit(*[need()] * 8)
    edge.admit(need(), need())
    error = edge.refused(need())

    assert isinstance(error, errors.QueueFull)
    assert error.retry_after


def test_unearned_grade_is_refused() -> None:
    """5: a grade that the engine has not earned is refused before sequencing."""
    edge = Edge()
    edge.dispatch(engine(grade=SERIAL))

    assert isinstance(edge.refused(need(grade=EXACT)), errors.GradeNotEarned)


def test_lost_grade_fails_the_item() -> None:
    """An item that finished below its required grade fails with GRADE_LOST."""
    edge = connected()
    edge.admit(need(grade=EXACT))
    edge.finish(1, SERIAL)

    assert edge.reason(1) == "GRADE_LOST"


def test_second_attempt_keeps_number_and_order() -> None:
    """4: after a lost engine the same items are submitted again, first, ascending, and only those that had started count."""
    edge = connected(runs=1)
    edge.admit(need(), need(), need(), keyed=True)
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(2)),)))
    edge.dispatch(ev.Disconnected())
    edge.dispatch(engine(runs=2))

    assert [(s.sequence, s.attempt) for s in edge.submits()] == [(1, 1), (2, 1), (1, 1), (2, 2), (3, 1)]


def test_what_waits_is_submitted_after_all_that_was_reported() -> None:
    """Two runs that end in one report both give their room back before an item that waits takes it."""
    edge = connected(runs=1)
    edge.admit(*[need()] * 4)
    made = edge.dispatch(ev.Reported(tuple(ev.Failed(edge.run_of(n), errors.EngineFailed("no")) for n in (1, 2))))

    assert [(type(effect), effect.sequence) for effect in made if isinstance(effect, ev.End | ev.Submit)] == [
        (ev.End, 1),
        (ev.End, 2),
        (ev.Submit, 3),
        (ev.Submit, 4),
    ]


def test_an_attempt_that_never_began_is_not_recorded() -> None:
    """4: an item that ends while it waits to be run again names the attempt that was lost, not the one that was to come."""
    edge = connected()
    edge.admit(need(), keyed=True)
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))
    edge.dispatch(ev.Disconnected())
    edge.dispatch(ev.CancelItems(1, 1))

    assert [end.attempt for end in edge.ends()] == [1]


def test_poison_item_runs_alone_and_is_given_up() -> None:
    """4: from its second loss on an item runs with nothing beside it, and the third loss ends it; others complete."""
    edge = connected(runs=2)
    edge.admit(*[need()] * 3)
    for _ in range(2):
        for sequence in (1, 2, 3):
            edge.dispatch(ev.Reported((ev.Started(edge.run_of(sequence)),)))
        edge.dispatch(ev.Disconnected())
        edge.dispatch(engine(runs=2))
    alone = len(edge.submits())
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))

    assert edge.submits()[alone - 1].sequence == 1
    assert edge.core.window is not None
    assert edge.core.window.runs == 1

    edge.dispatch(ev.Disconnected())
    edge.dispatch(engine(runs=2))

    assert edge.reason(1) == "ATTEMPTS_EXHAUSTED"
    assert [end.attempt for end in edge.ends()] == [BOUNDS.attempts_max]

    edge.finish(2)
    edge.finish(3)

    assert [edge.reason(sequence) for sequence in (2, 3)] == ["COMPLETED", "COMPLETED"]


def test_poison_that_kills_before_it_begins() -> None:
    """4: an item that kills the engine before anything is said to have begun is found: what was held is tried one at a time."""
    edge = connected(runs=4)
    edge.admit(*[need()] * 3)
    poison, engines = 2, 1
    while (item := edge.core.items[poison]).phase is not Phase.ENDING:
        if item.phase is Phase.SUBMITTED:
            engines += 1
            edge.dispatch(ev.Disconnected())
            edge.dispatch(engine(runs=4))
        else:
            edge.finish(edge.submits()[-1].sequence)

    assert edge.reason(poison) == "ATTEMPTS_EXHAUSTED"
    assert engines == 1 + UNATTRIBUTED_CRASHES_MAX + BOUNDS.attempts_max
    assert edge.reason(1) == "COMPLETED"

    edge.finish(3)

    assert edge.reason(3) == "COMPLETED"


def test_unkeyed_caller_frees_the_engine() -> None:
    """An unkeyed caller that goes away ends its items and their runs; a keyed one only detaches."""
    edge = connected(runs=1)
    unkeyed = edge.admit(need(), need(), need())
    keyed = edge.admit(need(), keyed=True)
    edge.dispatch(ev.CancelBatch(keyed, errors.Cancelled("gone")))
    edge.dispatch(ev.CancelBatch(unkeyed, errors.Cancelled("gone")))

    assert [edge.reason(sequence) for sequence in (1, 2, 3)] == ["CANCELLED"] * 3
    assert sum(isinstance(effect, ev.CancelRun) for effect in edge.effects) == 2
    assert edge.submits()[-1].sequence == 4


def test_caller_gone_before_its_numbers() -> None:
    """A caller that goes while its batch is being numbered still gets every number one outcome."""
    edge = connected()
    edge.dispatch(ev.Admit(7, (need(), need()), False))
    edge.dispatch(ev.CancelBatch(7, errors.DeadlineExceeded("late")))
    edge.dispatch(ev.Numbered(7, 1))

    assert [edge.reason(sequence) for sequence in (1, 2)] == ["DEADLINE_EXCEEDED"] * 2
    assert not edge.submits()


def test_waiting_past_the_deadline() -> None:
    """An unkeyed item whose deadline passes in the queue fails; a keyed one stays."""
    edge = connected(runs=1)
    edge.admit(need(), need(), keyed=True)
    edge.admit(need(), deadline=1.0)
    edge.admit(need(), keyed=True, deadline=1.0)
    edge.now = 1.5
    edge.dispatch(ev.Tick())

    assert edge.reason(3) == "DEADLINE_EXCEEDED"
    assert {4}.issubset(edge.core.waiting)


def test_silent_engine() -> None:
    """A run that the engine is silent about past its time is cancelled and fails."""
    edge = connected()
    edge.admit(need())
    edge.now = BOUNDS.item_timeout_seconds + BOUNDS.overdue_seconds
    edge.dispatch(ev.Tick())

    assert edge.reason(1) == "DEADLINE_EXCEEDED"
    assert ev.CancelRun(edge.run_of(1)) in edge.effects


def test_late_events_of_a_cancelled_run() -> None:
    """2: what the engine says of a run after it was cancelled changes nothing."""
    edge = connected()
    edge.admit(need())
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))
    edge.dispatch(ev.CancelItems(1, 1))

    assert edge.dispatch(ev.Reported((ev.Finished(edge.run_of(1), EXACT),))) == []
    assert edge.reason(1) == "CANCELLED"


def test_out_of_protocol() -> None:
    """A run that was never submitted, or finishes before it started, is the service's fault and drops the stream."""
    edge = connected()
    edge.admit(need())

    assert isinstance(edge.dispatch(ev.Reported((ev.Finished(99, EXACT),)))[0], ev.Fault)
    assert isinstance(edge.dispatch(ev.Reported((ev.Finished(edge.run_of(1), EXACT),)))[0], ev.Fault)
    edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))
    assert isinstance(edge.dispatch(ev.Reported((ev.Started(edge.run_of(1)),)))[0], ev.Fault)


def test_another_model_takes_nothing_over() -> None:
    """An item prepared for another model fails with FINGERPRINT_CHANGED instead of running."""
    edge = connected(runs=1)
    edge.admit(need(), keyed=True)
    edge.dispatch(ev.Disconnected())
    edge.dispatch(engine(model=b"other"))

    assert edge.reason(1) == "FINGERPRINT_CHANGED"


def test_recovery() -> None:
    """Recovered items with a key run first, ascending, as further attempts; those without become ABANDONED."""
    edge = Edge(next_sequence=10)
    edge.dispatch(ev.Recovered(4, need(), True, 2))
    edge.dispatch(ev.Recovered(5, need(), False, 2))
    edge.dispatch(ev.Recovered(9, need(), True, 3))
    edge.dispatch(engine())
    edge.admit(need())

    assert edge.reason(5) == "ABANDONED"
    assert [(s.sequence, s.attempt) for s in edge.submits()] == [(4, 2), (9, 3), (10, 1)]


def test_taking_over() -> None:
    """1: what is taken over from another writer goes to its place among what waits, and moves no first submission."""
    edge = connected(runs=1)
    edge.next_sequence = 10
    edge.admit(need(), need(), need())
    edge.admit(need(), need())
    edge.dispatch(ev.Recovered(3, need(), True, 2))
    edge.dispatch(ev.Recovered(4, need(), False, 2))
    for sequence in (10, 11, 3, 12, 13, 14):
        edge.finish(sequence)

    assert edge.reason(4) == "ABANDONED"
    assert [(s.sequence, s.attempt) for s in edge.submits()] == [(10, 1), (11, 1), (3, 2), (12, 1), (13, 1), (14, 1)]


def test_taking_over_while_a_batch_is_numbered() -> None:
    """6: a takeover that is told before a batch with smaller numbers, whose commit was earlier, does not go ahead of it."""
    edge = connected(runs=1)
    edge.admit(need(), need())
    edge.dispatch(ev.Admit(2, (need(), need()), True))
    edge.dispatch(ev.Recovered(12, need(), True, 2))
    edge.dispatch(ev.Numbered(2, 10))
    for sequence in (1, 2, 10, 11, 12):
        edge.finish(sequence)

    assert [s.sequence for s in edge.submits()] == [1, 2, 10, 11, 12]


def test_drain_finishes_and_ends() -> None:
    """5: a drain refuses new batches, finishes what there is, and then says so once."""
    edge = connected(runs=1)
    edge.admit(need(), need(), need())
    edge.dispatch(ev.Drain())

    assert isinstance(edge.refused(need()), errors.Draining)
    for sequence in (1, 2, 3):
        edge.finish(sequence)
    edge.dispatch(ev.Tick())
    assert [type(effect) for effect in edge.effects].count(ev.Drained) == 1


def test_drain_end() -> None:
    """At the end of a drain the unkeyed are ABANDONED, and the keyed are left to the next epoch without an outcome."""
    edge = connected(runs=1)
    edge.admit(need(), need())
    edge.admit(need(), keyed=True)
    edge.dispatch(ev.Drain())
    edge.dispatch(ev.DrainEnd())
    edge.dispatch(ev.Ended((1,)))
    made = edge.dispatch(ev.Ended((2,)))

    assert [edge.reason(sequence) for sequence in (1, 2)] == ["ABANDONED"] * 2
    assert made == [ev.Drained()]
    assert not [end for end in edge.ends() if end.sequence == 3]
    assert edge.effects.count(ev.LeaveToRecovery(3)) == 1


def test_numbered_after_the_drain_ended() -> None:
    """A batch that gets its numbers after the drain ended is abandoned, or left to recovery, but not forgotten."""
    edge = connected()
    edge.dispatch(ev.Admit(1, (need(),), False))
    edge.dispatch(ev.Admit(2, (need(),), True))
    edge.dispatch(ev.Drain())
    edge.dispatch(ev.DrainEnd())
    edge.dispatch(ev.Numbered(1, 1))

    assert edge.reason(1) == "ABANDONED"
    assert edge.dispatch(ev.Numbered(2, 2)) == [ev.LeaveToRecovery(2)]


def test_drain_without_an_engine() -> None:
    """5: a drain whose engine is lost submits nothing a second time and ends at once."""
    edge = connected()
    edge.admit(need())
    edge.admit(need(), keyed=True)
    edge.dispatch(ev.Drain())
    edge.dispatch(ev.Disconnected())
    made = edge.dispatch(ev.Ended((1,)))

    assert made == [ev.Drained()]


def test_a_rerun_alone_has_nothing_beside_it() -> None:
    """It waits until nothing runs or waits, and what comes then waits for its end, items and re-runs alike."""
    edge = connected(runs=4)
    edge.admit(need())
    edge.dispatch(ev.Rerun(1, 8, ev.Urgency.REPLAY, exclusive=True))
    edge.dispatch(ev.Rerun(2, 8, ev.Urgency.REPLAY))

    assert not reruns(edge)
    edge.finish(1)
    assert [effect.rerun_id for effect in reruns(edge)] == [1]

    edge.admit(need())
    assert [submit.sequence for submit in edge.submits()] == [1]
    edge.dispatch(ev.Reported((ev.Finished(reruns(edge)[0].run_id, EXACT),)))
    assert [submit.sequence for submit in edge.submits()] == [1, 2]
    assert [effect.rerun_id for effect in reruns(edge)] == [1, 2]
