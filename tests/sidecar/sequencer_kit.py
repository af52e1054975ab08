"""A sequencing core with the least of an edge around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.item import Bounds
from sidecar.core.sequencer import Sequencer

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
    tickets: int = 0
    effects: list[do.Effect] = field(default_factory=list)

    def tell(self, event: ev.Event) -> list[do.Effect]:
        made = self.core.step(event, self.now)
        self.effects.extend(made)
        return made

    def admit(self, *needs: ev.Need, keyed: bool = False, deadline: float | None = None) -> int:
        """The ticket of a numbered batch."""
        self.tickets += 1
        made = self.tell(ev.Admit(self.tickets, needs, keyed, deadline))
        assert made[0] == do.AppendAdmission(self.tickets)
        first, self.next_sequence = self.next_sequence, self.next_sequence + len(needs)
        self.tell(ev.Numbered(self.tickets, first))
        return self.tickets

    def refused(self, *needs: ev.Need) -> errors.OstinatoError:
        self.tickets += 1
        (effect,) = self.tell(ev.Admit(self.tickets, needs, False))
        assert isinstance(effect, do.Refuse)
        return effect.error

    def submits(self) -> list[do.Submit]:
        return [effect for effect in self.effects if isinstance(effect, do.Submit)]

    def ends(self) -> list[do.End]:
        return [effect for effect in self.effects if isinstance(effect, do.End)]

    def run_of(self, sequence: int) -> int:
        return [submit.run_id for submit in self.submits() if submit.sequence == sequence][-1]

    def finish(self, sequence: int, grade: types_pb2.Grade.ValueType = EXACT) -> None:
        self.tell(ev.Started(self.run_of(sequence)))
        self.tell(ev.Finished(self.run_of(sequence), grade))
        self.tell(ev.Ended(sequence))

    def reason(self, sequence: int) -> str:
        (end,) = [end for end in self.ends() if end.sequence == sequence]
        return end.error.reason if end.error else "COMPLETED"


def connected(*, runs: int = 2, blocks: int = 8) -> Edge:
    edge = Edge()
    edge.tell(engine(runs=runs, blocks=blocks))
    return edge


def reruns(edge: Edge) -> list[do.SubmitRerun]:
    return [effect for effect in edge.effects if isinstance(effect, do.SubmitRerun)]
