"""A sequencing core with the least of an edge around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import events as ev
from sidecar.core.sequencer import Sequencer
from sidecar.core.window import Bounds

MODEL = b"model"
BOUNDS = Bounds(queue_items_max=8, window_runs_max=0, attempts_max=3, item_timeout_seconds=10.0)
EXACT, SERIAL = types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL


def need(tokens: int = 8, *, model: bytes = MODEL, grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED) -> ev.Need:
    return ev.Need(tokens, model, grade)


def engine(*, runs: int = 2, blocks: int = 8, grade: types_pb2.Grade.ValueType = EXACT, model: bytes = MODEL) -> ev.Connected:
    return ev.Connected(runs=runs, kv_blocks=blocks, block_tokens=8, model_digest=model, grade=grade)


@dataclass
class Edge:
    """A core with the least of an edge: numbers come at once, and what was asked for is kept."""

    core: Sequencer = field(default_factory=lambda: Sequencer(BOUNDS))
    now: float = 0.0
    next_sequence: int = 1
    batch_ids: int = 0
    effects: list[ev.Effect] = field(default_factory=list)

    def dispatch(self, event: ev.Event) -> list[ev.Effect]:
        made = self.core.step(event, self.now)
        self.effects.extend(made)
        return made

    def admit(self, *needs: ev.Need, keyed: bool = False, deadline: float | None = None) -> int:
        """The id of a numbered batch."""
        self.batch_ids += 1
        made = self.dispatch(ev.Admit(self.batch_ids, needs, keyed, None if keyed else deadline))
        assert made[0] == ev.AppendAdmission(self.batch_ids)
        first, self.next_sequence = self.next_sequence, self.next_sequence + len(needs)
        self.dispatch(ev.Numbered(self.batch_ids, first))
        return self.batch_ids

    def refused(self, *needs: ev.Need) -> errors.OstinatoError:
        self.batch_ids += 1
        (effect,) = self.dispatch(ev.Admit(self.batch_ids, needs, False))
        assert isinstance(effect, ev.Refuse)
        return effect.error

    def submits(self) -> list[ev.Submit]:
        return [effect for effect in self.effects if isinstance(effect, ev.Submit)]

    def ends(self) -> list[ev.End]:
        return [effect for effect in self.effects if isinstance(effect, ev.End)]

    def run_of(self, sequence: int) -> int:
        return [submit.run_id for submit in self.submits() if submit.sequence == sequence][-1]

    def finish(self, sequence: int, grade: types_pb2.Grade.ValueType = EXACT) -> None:
        self.dispatch(ev.Reported((ev.Started(self.run_of(sequence)),)))
        self.dispatch(ev.Reported((ev.Finished(self.run_of(sequence), grade),)))
        self.dispatch(ev.Ended((sequence,)))

    def reason(self, sequence: int) -> str:
        (end,) = [end for end in self.ends() if end.sequence == sequence]
        return end.error.reason if end.error else "COMPLETED"


def connected(*, runs: int = 2, blocks: int = 8) -> Edge:
    edge = Edge()
    edge.dispatch(engine(runs=runs, blocks=blocks))
    return edge


def reruns(edge: Edge) -> list[ev.SubmitRerun]:
    return [effect for effect in edge.effects if isinstance(effect, ev.SubmitRerun)]
