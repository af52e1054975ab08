"""The trace of one item, where there are traces: the whole, and in it, one after the other, each wait and each run."""

from __future__ import annotations

from ostinato import enums, tracing
from ostinato.errors import Disconnected, OstinatoError
from ostinato.tracing import OFF, Kind, Span
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2


def run_span(purpose: engine_pb2.Purpose.ValueType, sequence: int) -> Span:
    """Of a second run, from when it is asked for: within what asked for it, or on its own."""
    return tracing.span(enums.word(engine_pb2.Purpose, purpose).lower(), {"ostinato.sequence": sequence}, Kind.CLIENT)


class ItemSpans:
    """Begins with the item's numbers. `caller`: the span of the call that brought it."""

    def __init__(self, header: types_pb2.EntryHeader, payload: sequencer_pb2.AdmittedPayload, caller: Span) -> None:
        self.item = self._part = OFF
        self._running, self._sequence = False, header.sequence
        if not tracing.on():
            return
        self.item = caller.child(
            "item",
            {
                "ostinato.sequence": header.sequence,
                "ostinato.log_id": header.log_id,
                "ostinato.writer": header.writer,
                "ostinato.epoch": header.epoch,
                "ostinato.request_id": payload.request_id,
                "ostinato.seed": str(payload.seed),
            },
        )
        self._part = self.item.child("queue")

    def submitted(self, attempt: int, company: int) -> str:
        """An attempt goes to the engine; the traceparent that goes with it."""
        if self.item is OFF:
            return ""
        self.lost()
        self._part.end()
        if attempt > 1:
            self.item.event("submitted again", {"ostinato.attempt": attempt})
        attributes = {"ostinato.sequence": self._sequence, "ostinato.attempt": attempt, "ostinato.company": company}
        self._part = self.item.child("run", attributes, Kind.CLIENT)
        self._running = True
        return self._part.traceparent

    def lost(self) -> None:
        """The engine is gone; if the item was in it, it waits again."""
        if self._running:
            self._running = False
            self._part.end(Disconnected("the engine was lost"))
            self._part = self.item.child("queue")

    def over(self, error: OstinatoError | None) -> None:
        """Nothing more is done for it but to write down how it ended."""
        self._running = False
        self._part.end(error)

    def ended(self, header: types_pb2.EntryHeader, error: OstinatoError | None) -> None:
        """The outcome is durable."""
        if self.item:
            self.item.note(
                {
                    "ostinato.attempt": header.attempt,
                    "ostinato.outcome": enums.word(types_pb2.EntryKind, header.kind),
                    "ostinato.grade": enums.word(types_pb2.Grade, header.grade),
                    "ostinato.fingerprint": header.fingerprint_digest.hex(),
                }
            )
            self.item.end(error)
