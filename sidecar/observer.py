"""What is seen of the work: metrics and log lines. What is found of divergence is counted by `divergence`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from ostinato import enums, errors
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.collisions import choice_of
from sidecar.core.sequencer import Sequencer
from sidecar.journal.model import Head, Sealed, Unfinished
from sidecar.metrics import Metrics
from sidecar.work import Work

log = logging.getLogger(__name__)


class Observer:
    """Sees everything, changes nothing."""

    def __init__(self, metrics: Metrics, not_compared: Callable[[types_pb2.ComparisonKind.ValueType, str], None]) -> None:
        """`not_compared` counts a second run that was due and brought no verdict, by kind and reason."""
        self.metrics, self.not_compared = metrics, not_compared

    def opened(self, head: Head) -> None:
        """The journal is open, in a new epoch."""
        self.metrics.epoch.set(head.epoch)
        self.metrics.last_sequence.set(head.last_sequence)

    def taken_over(self, unfinished: Sequence[Unfinished]) -> None:
        """Another writer's lease has run out, and its items are this one's now."""
        self.metrics.taken_over.inc(len(unfinished))
        log.warning("took over", extra={"writer": unfinished[0].admitted.header.writer, "count": len(unfinished)})

    def watch(self, core: Sequencer, unnumbered: Callable[[], int]) -> None:
        """Read both whenever metrics are. `unnumbered`: items that wait for their numbers."""
        self.metrics.unnumbered.set_function(unnumbered)
        self.metrics.queue.set_function(lambda: core.queued)
        self.metrics.inflight.set_function(lambda: window.runs if (window := core.window) else 0)
        self.metrics.inflight_blocks.set_function(lambda: window.blocks if (window := core.window) else 0)

    def holds(self, count: Callable[[], int]) -> None:
        """Read whenever metrics are: bytes held for callers."""
        self.metrics.held.set_function(count)

    def lost(self, bound: str) -> None:
        """A call, to a slow reader."""
        self.metrics.lost.labels(bound).inc()

    def admitted(self, stamp: types_pb2.Stamp, seconds: float) -> None:
        """`seconds`: from the prepared batch to its numbers."""
        self.metrics.admitted.inc(stamp.count)
        self.metrics.last_sequence.set(stamp.first_sequence + stamp.count - 1)
        self.metrics.admission.observe(seconds, {"sequence": str(stamp.first_sequence)})

    def refused(self, error: errors.OstinatoError) -> None:
        self.metrics.refused.labels(error.reason).inc()
        if isinstance(error, errors.ProtocolViolation):
            self.fault(error)

    def repeated(self) -> None:
        self.metrics.repeated.inc()

    def submitted(self, attempt_of: Work, *, again: bool) -> None:
        if again:
            self.metrics.attempts.inc()
            fields = {"sequence": attempt_of.sequence, "attempt": attempt_of.progress.attempt, **attempt_of.spans.item.ids}
            log.warning("submitted again", extra=fields)
        else:
            self.metrics.submitted.inc()

    def tokens(self, work: Work, count: int, now: float) -> None:
        """Before the work takes the tokens in."""
        if work.first_token_at is None:
            self.metrics.first_token.observe(now - work.admitted_at, _exemplar(work))
        elif count and work.last_tokens_at is not None:
            self.metrics.between_tokens.observe((now - work.last_tokens_at) / count)

    def ended(self, work: Work, sealed: Sealed, result: types_pb2.Result) -> None:
        """The outcome is durable."""
        outcome = enums.word(types_pb2.EntryKind, sealed.header.kind).lower()
        error = errors.from_status(result.status) if result.HasField("status") else None
        self.metrics.ended.labels(outcome, error.reason if error is not None else "").inc()
        self.metrics.item.observe(result.timing.total_micros / 1e6, _exemplar(work))
        fields = {"sequence": work.sequence, "request_id": work.input.request_id, "outcome": outcome, **work.spans.item.ids}
        log.debug("ended", extra=fields)
        work.spans.ended(sealed.header, error)
        if work.collision == sequencer_pb2.COLLISION_FOUND and work.output is not None:
            choice = choice_of(work.input.parameters, work.output)
            log.error(
                "collision: an unseeded answer equals that of another seed",
                extra={
                    "sequence": work.sequence,
                    "tokens": choice.tokens,
                    "distinct_tokens": choice.distinct_tokens,
                    "logprobs_known": choice.logprobs_known,
                    "choice_bits": round(choice.bits, 1),
                },
            )

    def audits_waiting(self, count: int) -> None:
        self.metrics.audit_backlog.set(count)

    def engine(self, description: engine_pb2.DescribeResponse | None) -> None:
        """None: it is not connected any more."""
        self.metrics.fingerprint.clear()
        self.metrics.connected.set(description is not None)
        self.metrics.grade.set(description.model.grade if description else 0)
        self.metrics.kv_blocks.set(description.capacity.kv_blocks if description else 0)
        if description is None:
            log.warning("engine disconnected")
            return
        model = description.model
        digest, grade = model.fingerprint.digest.hex()[:16], enums.word(types_pb2.Grade, model.grade).lower()
        self.metrics.fingerprint.labels(model.engine, model.name, digest, grade).set(1)
        fields = {"engine": model.engine, "model": model.name, "fingerprint": digest, "grade": grade}
        log.info("engine connected", extra=fields)

    def engine_lost(self, works: Iterable[Work]) -> None:
        """It is not connected any more; these were in it."""
        for work in works:
            work.spans.lost()
        self.engine(None)

    def fault(self, error: errors.OstinatoError) -> None:
        self.metrics.faults.labels(error.reason).inc()
        log.error("engine fault", extra={"reason": error.reason, "why": error.message})

    def journal_full(self, full: bool) -> None:
        self.metrics.journal_full.set(full)

    def committed(self, seconds: float, drafts: int, payload_bytes: int) -> None:
        """One transaction of the journal."""
        self.metrics.commit.observe(seconds)
        self.metrics.commit_drafts.observe(drafts)
        self.metrics.journal_bytes.inc(payload_bytes)


def _exemplar(work: Work) -> dict[str, str]:
    return {"sequence": str(work.sequence), **work.spans.item.exemplar}
