"""The checks themselves: a load that went well passes, and each thing that may go wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from ostinato import chain, errors
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.soak import checks
from tests.soak.checks import COMPLETED, Record
from tests.soak.load import Call, Job
from tests.soak.recording import Submission

ADMITTED, OPENED = types_pb2.ENTRY_KIND_ADMITTED, types_pb2.ENTRY_KIND_OPENED
LOG, WRITER = "0" * 32, "w"


class World:
    """Two jobs of two items, one after the other: what their clients saw, what the engine got, and what the journal holds."""

    def __init__(self) -> None:
        self.calls = [self._call(number, first, keyed=number == 1) for number, first in enumerate((1, 3))]
        self.lines = [Submission(1, sequence, 1) for sequence in range(1, 5)]
        self.token_ids: dict[int, int] = {}
        """Of the output, by sequence; others have 7."""
        self.headers = [types_pb2.EntryHeader(kind=OPENED)]
        for call in self.calls:
            self.headers += [self._admitted(call, position) for position in range(2)]
        self.headers += [types_pb2.EntryHeader(kind=COMPLETED, sequence=sequence, attempt=1) for sequence in range(1, 5)]

    def faults(self) -> list[str]:
        """Of all checks that need no programs."""
        record = Record()
        previous, index = chain.GENESIS, count(1)
        for header in self.headers:
            header.index = header.index or next(index)
            header.log_id, header.writer = LOG, WRITER
            entry = sequencer_pb2.Entry(header=header, entry_hash=chain.entry_hash(previous, header))
            if payload := self._payload(header):
                entry.payload = payload
                entry.header.payload_digest = chain.payload_digest(entry.payload)
                entry.entry_hash = chain.entry_hash(previous, entry.header)
            previous = entry.entry_hash
            record.take(entry)
        found = checks.numbers(record) + checks.calls(self.calls, record) + checks.kinds(self.calls, record)
        return found + checks.real_time(self.calls) + checks.reproduced(record) + checks.submitted(self.lines, record)

    def _call(self, number: int, first: int, *, keyed: bool) -> Call:
        request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="a")] * 2, idempotency_key="k" if keyed else "")
        stamp = types_pb2.Stamp(log_id=LOG, writer=WRITER, first_sequence=first, count=2)
        return Call(Job(number, request, streamed=False), f"{number}", 10.0 * number, stamp, 10.0 * number + 1)

    def _admitted(self, call: Call, position: int) -> types_pb2.EntryHeader:
        assert call.stamp is not None
        first = call.stamp.first_sequence
        return types_pb2.EntryHeader(kind=ADMITTED, sequence=first + position, first_sequence=first, count=2)

    def _payload(self, header: types_pb2.EntryHeader) -> bytes:
        if header.kind == ADMITTED:
            return sequencer_pb2.AdmittedPayload(request_id="0" if header.first_sequence == 1 else "1").SerializeToString()
        output = types_pb2.Output(token_ids=[self.token_ids.get(header.sequence, 7)])
        return sequencer_pb2.CompletedPayload(output=output).SerializeToString() if header.kind == COMPLETED else b""


def test_a_sound_load_passes() -> None:
    """Nothing is wrong where nothing went wrong."""
    assert World().faults() == []


def _refused(world: World) -> None:
    world.calls[0].error = errors.QueueFull("full")
    world.calls[0].stamp = None


def _another_stamp(world: World) -> None:
    assert world.calls[0].stamp is not None
    world.calls[0].stamp.first_sequence = 3


def _overtaken(world: World) -> None:
    world.calls[0].sent_at = world.calls[1].acknowledged_at + 1


def _other_output(world: World) -> None:
    world.token_ids[4] = 8


def _abandoned(world: World) -> None:
    world.headers[-1].kind = checks.ABANDONED


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda world: world.headers.pop(), "sequence 4 has no outcome"),
        (lambda world: world.headers.append(world.headers[-1]), "sequence 4 has two outcomes"),
        (lambda world: world.headers.pop(2), "not 1 to n"),
        (lambda world: setattr(world.headers[3], "index", 9), "index: 9 after 3"),
        (lambda world: setattr(world.headers[3], "sequence", 5), "outside its batch"),
        (lambda world: world.lines.reverse(), "sequence 3 reached the engine behind 4"),
        (lambda world: world.lines.pop(), "attempt 1 completed, None ran last"),
        (lambda world: world.lines.append(Submission(1, 4, 2)), "attempt 1 completed, 2 ran last"),
        (lambda world: world.lines.append(Submission(1, 5, 1)), "sequence 5 ran and was never admitted"),
        (lambda world: world.calls.pop(), "call 1: is of no client"),
        (_refused, "call 0: was refused"),
        (_another_stamp, "call 0: was told 3, the journal says 1"),
        (_overtaken, "sequence 1 was sent after 3 had been acknowledged"),
        (_other_output, "equal inputs, other outputs"),
        (_abandoned, "sequence 4: is ENTRY_KIND_ABANDONED"),
    ],
)
def test_what_goes_wrong_is_seen(damage: Callable[[World], object], seen: str) -> None:
    """Each kind of damage has a fault that names it."""
    world = World()
    damage(world)

    assert any(seen in fault for fault in world.faults()), world.faults()
