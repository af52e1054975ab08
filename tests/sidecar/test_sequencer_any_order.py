"""The sequencing core through whatever can happen, in any order."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.sequencer import Phase, Sequencer
from sidecar.core.window import Bounds
from tests.sidecar.sequencer_kit import EXACT, SERIAL, Edge, engine, need

DRAINED_FROM = 20
"""The number from which on a drain may come: nothing is admitted after it."""


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: one End for each number, in-order first submissions, a window that holds, and reruns
    that never take what an item waits for."""

    batch_ids = Bundle("batch_ids")

    @initialize(runs=st.integers(1, 4), blocks=st.integers(3, 12), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    def start(self, runs: int, blocks: int, share: float) -> None:
        self.runs, self.blocks = runs, blocks
        self.edge = Edge(Sequencer(Bounds(64, 0, 3, 10.0, reruns_max=4, reruns_share=share)))
        self.numbering: list[tuple[int, int]] = []
        self.waiting_for_disk: list[int] = []
        self.others = [1, 2, 3]
        """Numbers of another writer, whose lease has not run out."""
        self.edge.next_sequence = 4
        self.taken: set[int] = set()
        self.reruns = 0
        self.dispatch(engine(runs=self.runs, blocks=self.blocks))

    def dispatch(self, event: ev.Event) -> None:
        core = self.edge.core
        reports = event.reports if isinstance(event, ev.Reported) else ()
        ended = [core.runs[report.run_id].sequence for report in reports if self.ends_an_item(report)]
        effects = self.edge.dispatch(event)
        first = [effect.sequence for effect in effects[: len(ended)] if isinstance(effect, ev.End)]
        assert first == ended, "what waits for room is submitted after all that was reported"
        for effect in effects:
            assert not isinstance(effect, ev.Fault)
            if isinstance(effect, ev.End):
                self.waiting_for_disk.append(effect.sequence)
            if isinstance(effect, ev.SubmitRerun):
                assert effect.run_id in core.reruns.running
                background = core.reruns.running[effect.run_id].rerun.urgency is not ev.Urgency.VERIFY
                assert not (background and core.waiting)
                assert not background or (core.window is not None and core.window.runs <= core.window.engine.runs)

    def ends_an_item(self, report: ev.Report) -> bool:
        return report.run_id in self.edge.core.runs and not isinstance(report, ev.Started)

    @rule(size=st.integers(1, 40), urgency=st.sampled_from(ev.Urgency), exclusive=st.booleans())
    def rerun(self, size: int, urgency: ev.Urgency, exclusive: bool) -> None:
        self.reruns += 1
        self.dispatch(ev.Rerun(self.reruns, size, urgency, exclusive and urgency is not ev.Urgency.VERIFY))

    @rule(data=st.data())
    def drop_rerun(self, data: st.DataObject) -> None:
        self.dispatch(ev.CancelRerun(data.draw(st.integers(0, self.reruns))))

    @rule(
        target=batch_ids,
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        keyed=st.booleans(),
        at_once=st.booleans(),
    )
    def admit(self, sizes: list[int], keyed: bool, at_once: bool) -> int:
        """`at_once`: the journal commits it, and what waits before it, before anything else happens."""
        self.edge.batch_ids += 1
        self.dispatch(ev.Admit(self.edge.batch_ids, tuple(map(need, sizes)), keyed, 5.0))
        if self.edge.effects and self.edge.effects[-1] == ev.AppendAdmission(self.edge.batch_ids):
            self.numbering.append((self.edge.batch_ids, len(sizes)))
        while at_once and self.numbering:
            self.numbered(*self.numbering.pop(0))
        return self.edge.batch_ids

    @precondition(lambda self: self.numbering)
    @rule(full=st.booleans())
    def commit(self, full: bool) -> None:
        batch_id, count = self.numbering.pop(0)
        if full:
            self.dispatch(ev.NotNumbered(batch_id))
        else:
            self.numbered(batch_id, count)

    def numbered(self, batch_id: int, count: int) -> None:
        first, self.edge.next_sequence = self.edge.next_sequence, self.edge.next_sequence + count
        self.dispatch(ev.Numbered(batch_id, first))

    @rule(count=st.integers(1, 3))
    def another_writer_admits(self, count: int) -> None:
        self.others.extend(range(self.edge.next_sequence, self.edge.next_sequence + count))
        self.edge.next_sequence += count

    @precondition(lambda self: self.others)
    @rule(count=st.integers(1, 3), size=st.integers(1, 40), keyed=st.booleans())
    def take_over(self, count: int, size: int, keyed: bool) -> None:
        """Some of what it left, ascending."""
        taken, self.others = self.others[:count], self.others[count:]
        self.taken.update(taken)
        for sequence in taken:
            self.dispatch(ev.Recovered(sequence, need(size), keyed, 2))

    @precondition(lambda self: self.waiting_for_disk)
    @rule(count=st.integers(1, 3))
    def outcomes_durable(self, count: int) -> None:
        durable, self.waiting_for_disk = self.waiting_for_disk[:count], self.waiting_for_disk[count:]
        self.dispatch(ev.Ended(tuple(durable)))
        assert not self.edge.core.items.keys() & set(durable)

    @rule(batch_id=batch_ids, late=st.booleans())
    def leave(self, batch_id: int, late: bool) -> None:
        self.dispatch(ev.CancelBatch(batch_id, errors.DeadlineExceeded("") if late else errors.Cancelled("")))

    @rule(first=st.integers(1, 30), count=st.integers(0, 5))
    def cancel(self, first: int, count: int) -> None:
        self.dispatch(ev.CancelItems(first, first + count))

    @rule(seconds=st.floats(0, 4))
    def tick(self, seconds: float) -> None:
        self.edge.now += seconds
        self.dispatch(ev.Tick())

    @rule(grade=st.sampled_from([EXACT, SERIAL]))
    def connect(self, grade: types_pb2.Grade.ValueType) -> None:
        if self.edge.core.window is not None:
            self.dispatch(ev.Disconnected())
        self.dispatch(engine(runs=self.runs, blocks=self.blocks, grade=grade))

    @rule()
    def disconnect(self) -> None:
        if self.edge.core.window is not None:
            self.dispatch(ev.Disconnected())

    @rule(data=st.data(), kinds=st.lists(st.sampled_from([ev.Started, ev.Finished, ev.Failed]), min_size=1, max_size=4))
    def engine_says(self, data: st.DataObject, kinds: list[type[ev.Report]]) -> None:
        """Of items and reruns, together, each in an order that the protocol allows."""
        core, reports = self.edge.core, list[ev.Report]()
        started = {run_id: item.phase is Phase.STARTED for run_id, item in core.runs.items()}
        started |= dict.fromkeys(core.reruns.running, True)
        for kind in kinds:
            if not started:
                break
            run_id = data.draw(st.sampled_from(sorted(started)))
            if kind is ev.Failed:
                reports.append(ev.Failed(run_id, errors.EngineFailed("no")))
                del started[run_id]
            elif not started[run_id]:
                reports.append(ev.Started(run_id))
                started[run_id] = True
            elif kind is ev.Finished:
                reports.append(ev.Finished(run_id, EXACT))
                del started[run_id]
        if reports:
            self.dispatch(ev.Reported(tuple(reports)))

    @precondition(lambda self: self.edge.next_sequence > DRAINED_FROM)
    @rule()
    def drain(self) -> None:
        self.dispatch(ev.Drain())

    @invariant()
    def one_end_each(self) -> None:
        sequences = [end.sequence for end in self.edge.ends()]
        assert len(sequences) == len(set(sequences))
        keyed_left = 0 if not self.edge.core.draining else None
        numbered = self.edge.next_sequence - 1
        if keyed_left == 0:
            assert numbered == len(set(sequences) | set(self.edge.core.items) | set(self.others))

    @invariant()
    def an_end_names_the_newest_attempt(self) -> None:
        newest = {submit.sequence: submit.attempt for submit in self.edge.submits()}
        for end in self.edge.ends():
            assert end.attempt == newest.get(end.sequence, 2 if end.sequence in self.taken else 1)

    @invariant()
    def first_submissions_ascend(self) -> None:
        first: dict[int, None] = {}
        for submit in self.edge.submits():
            if submit.sequence not in self.taken:
                first.setdefault(submit.sequence)
        assert list(first) == sorted(first)

    @invariant()
    def what_waits_ascends(self) -> None:
        assert list(self.edge.core.waiting) == sorted(self.edge.core.waiting)

    @invariant()
    def window_holds(self) -> None:
        window = self.edge.core.window
        if window is None:
            return
        running = [i for i in self.edge.core.items.values() if i.phase in (Phase.SUBMITTED, Phase.STARTED)]
        reruns = [each.rerun for each in self.edge.core.reruns.running.values()]
        kv_tokens = [*(item.need.kv_tokens for item in running), *(rerun.kv_tokens for rerun in reruns)]
        assert window.runs == len(kv_tokens) <= window.runs_max
        assert window.blocks == sum(map(window.need, kv_tokens)) <= window.engine.kv_blocks
        assert not any((*(item.quarantined for item in running), *(rerun.exclusive for rerun in reruns))) or len(kv_tokens) == 1

    @invariant()
    def reruns_keep_to_their_share(self) -> None:
        window, reruns = self.edge.core.window, self.edge.core.reruns
        if window is None:
            assert not reruns.running
            assert not reruns.waiting
            return
        held = [each.rerun.kv_tokens for each in reruns.running.values() if each.rerun.urgency is not ev.Urgency.VERIFY]
        if len(held) > 1:
            assert len(held) <= reruns.bounds.reruns_share * window.engine.runs
            assert sum(map(window.need, held)) <= reruns.bounds.reruns_share * window.engine.kv_blocks


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
