"""What runs have come across. A promise that no run has tried is not known to hold."""

from __future__ import annotations

from collections.abc import Iterator

from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from tests.simulation.history import History

EXPECTED = frozenset(
    {
        "COMPLETED", "FAILED", "CANCELLED", "ABANDONED", "AUDITED", "ATTEMPTS_EXHAUSTED", "FINGERPRINT_CHANGED",
        "ENGINE_FAILED", "refused: DRAINING", "refused: ENGINE_UNAVAILABLE", "refused: GRADE_NOT_EARNED",
        "refused: INVALID_REQUEST", "refused: JOURNAL_FULL", "refused: KEY_REUSED", "refused: QUEUE_FULL",
        "lost: DISCONNECTED", "lost: DEADLINE_EXCEEDED", "an answer by key, again", "a second attempt in one epoch",
        "a second attempt in a later epoch", "a stream that was joined", "a sidecar that was replaced",
        "a replaced sidecar that came back", "a takeover", "a takeover beside what runs", "a service that was fenced off",
        "a re-run", "a message lost with its connection",
    }
)  # fmt: skip
"""What some hundred seeds have to show."""


def coverage(history: History) -> frozenset[str]:
    return frozenset(_sights(history))


def _sights(history: History) -> Iterator[str]:
    for entry in history.disk:
        yield types_pb2.EntryKind.Name(entry.header.kind).removeprefix("ENTRY_KIND_")
        if entry.header.kind == types_pb2.ENTRY_KIND_FAILED:
            yield sequencer_pb2.EndedPayload.FromString(entry.payload).reason
    for call in history.calls:
        if call.error is not None:
            yield f"{'lost' if call.error.reason in ('DISCONNECTED', 'DEADLINE_EXCEEDED') else 'refused'}: {call.error.reason}"
        if call.afterwards and call.complete:
            yield "an answer by key, again"
        if call.repeated and call.tokens:
            yield "a stream that was joined"
    epochs = {entry.header.sequence: entry.header.epoch for entry in history.disk if entry.header.sequence}
    for one in history.submissions:
        if one.purpose != engine_pb2.PURPOSE_PRIMARY:
            yield "a re-run"
        elif one.attempt > 1:
            yield f"a second attempt in {'one' if one.epoch == epochs.get(one.sequence) else 'a later'} epoch"
    if history.taken:
        yield "a takeover"
    for one in history.submissions:
        newer = history.taken.get(one.sequence, one.step) < one.step
        if newer and any(other.sequence > one.sequence and other.step < one.step for other in history.submissions):
            yield "a takeover beside what runs"
    yield from history.coverage
