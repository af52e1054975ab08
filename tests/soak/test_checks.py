"""The checks themselves: a load that went well passes, and each thing that may go wrong is seen.

What the promises' own checkers see is in tests/simulation/mutations.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ostinato import chain
from ostinato.digest import request_digest
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.simulation.history import Call
from tests.soak import checks
from tests.soak.checks import COMPLETED, Record
from tests.soak.load import Load
from tests.soak.recording import Submission

ADMITTED, OPENED = types_pb2.ENTRY_KIND_ADMITTED, types_pb2.ENTRY_KIND_OPENED
WRITER = "ostinato-0"


class World:
    """Two calls of two items, one after the other: what their clients saw, what the engine got, and what the journal holds."""

    def __init__(self) -> None:
        self.load = Load(lambda: "", iter(()))
        self.lines = [Submission(1, sequence, 1) for sequence in range(1, 5)]
        self.token_ids: dict[int, int] = {}
        """Of the output, by sequence; others have 7."""
        self.headers = [types_pb2.EntryHeader(kind=OPENED, epoch=1)]
        for number in (1, 2):
            request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="a")] * 2, request_id=str(number))
            call = Call(number, number, request, streamed=False, sent=self._step())
            stamp = types_pb2.Stamp(writer=WRITER, epoch=1, first_sequence=2 * number - 1, count=2)
            call.answer(generation_pb2.GenerateResponse(stamp=stamp), self._step())
            self.load.calls.append(call)
            first = stamp.first_sequence
            for kind in (ADMITTED, COMPLETED):
                about = {"kind": kind, "epoch": 1, "attempt": int(kind == COMPLETED), "first_sequence": first, "count": 2}
                self.headers += [types_pb2.EntryHeader(sequence=sequence, **about) for sequence in (first, first + 1)]  # type: ignore[arg-type]

    def faults(self) -> list[str]:
        """Of all checks that need no programs."""
        record, previous = Record(), chain.GENESIS
        for index, header in enumerate(self.headers, 1):
            payload = self._payload(header)
            header.index, header.writer, header.payload_digest = index, WRITER, chain.payload_digest(payload)
            previous = chain.entry_hash(previous, header)
            record.take(sequencer_pb2.Entry(header=header, entry_hash=previous, payload=payload))
        return checks.kept_promises(self.load, record) + checks.submitted(self.lines, record)

    def _step(self) -> int:
        return self.load.history.note(0.0)

    def _payload(self, header: types_pb2.EntryHeader) -> bytes:
        if header.kind == ADMITTED:
            request = self.load.history.calls[0].request
            given = sequencer_pb2.AdmittedPayload(
                request_id=str((header.sequence + 1) // 2), request_digest=request_digest(request)
            )
            return given.SerializeToString()
        output = types_pb2.Output(token_ids=[self.token_ids.get(header.sequence, 7)])
        return sequencer_pb2.CompletedPayload(output=output).SerializeToString() if header.kind == COMPLETED else b""


def test_a_sound_load_passes() -> None:
    """Nothing is wrong where nothing went wrong."""
    assert World().faults() == []


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda world: world.headers.pop(), "promise 2: sequence 4 has 0 outcomes"),
        (lambda world: world.lines.reverse(), "sequence 3 reached the engine behind 4"),
        (lambda world: world.lines.pop(), "attempt 1 completed, None ran last"),
        (lambda world: world.lines.append(Submission(1, 4, 2)), "attempt 1 completed, 2 ran last"),
        (lambda world: world.lines.append(Submission(1, 5, 1)), "sequence 5 ran and was never admitted"),
        (lambda world: world.load.calls.pop(), "sequence 3: is of no client"),
        (lambda world: world.token_ids.update({4: 8}), "equal inputs, other outputs"),
        (lambda world: setattr(world.headers[-1], "kind", checks.ABANDONED), "sequence 4: is ENTRY_KIND_ABANDONED"),
    ],
)
def test_what_goes_wrong_is_seen(damage: Callable[[World], object], seen: str) -> None:
    """Each kind of damage has a fault that names it."""
    world = World()
    damage(world)

    assert any(seen in fault for fault in world.faults()), world.faults()
