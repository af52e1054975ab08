"""What is seen of the work: metrics, log lines and spans. Verdicts are counted by `divergence`.

One call for each event: it counts, logs, and moves the item's spans on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ostinato import enums, errors, tracing
from ostinato.errors import ProtocolViolation
from ostinato.tracing import OFF, Span
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2

from sidecar.collisions import choice_of
from sidecar.core.sequencer import Sequencer
from sidecar.item import ActiveItem
from sidecar.journal.model import Head, Sealed, Unfinished

log = logging.getLogger(__name__)

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COMMIT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """One set for one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ostinato_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"ostinato_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ostinato_{name}", text, buckets=buckets, registry=registry)

        # order
        self.admitted = counter("admitted_items", "Items that got a sequence.")
        self.refused = counter("refused_requests", "Requests turned away before sequencing.", "reason")
        self.ended = counter("ended_items", "Items with a durable outcome.", "outcome", "reason")
        self.repeated = counter("repeated_requests", "Requests whose idempotency key was bound: answered, never run again.")
        self.submitted = counter("submitted_items", "Items handed to the engine, each counted at its first time.")
        self.attempts = counter("attempts", "Submissions to the engine beyond an item's first.")
        self.unnumbered = gauge("unnumbered_items", "Items that wait for a number.")
        self.taken_over = counter("taken_over_items", "Items of other writers, finished here because their lease had run out.")
        self.queue = gauge("queue_items", "Items that wait for the journal or for room.")
        self.inflight = gauge("inflight_items", "Runs that the engine holds, second runs included.")
        self.inflight_blocks = gauge("inflight_kv_blocks", "KV blocks that those may need at worst.")
        self.kv_blocks = gauge("kv_blocks", "KV blocks of the connected engine.")
        # the same load, under the names that inference gateways and autoscalers read from vLLM
        self.waiting = Gauge("vllm:num_requests_waiting", "Items that wait, in the engine too.", registry=registry)
        self.running = Gauge("vllm:num_requests_running", "Runs that the engine computes.", registry=registry)
        self.kv_usage = Gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use at worst, 0 to 1.", registry=registry)
        self.held = gauge("held_bytes", "Bytes held for callers: they wait to be read, or to be written.")
        self.lost = counter("lost_calls", "Calls lost to slow readers, by the bound that was reached.", "bound")
        for bound in ("call", "tenant", "all", "time"):
            self.lost.labels(bound)
        self.last_sequence = gauge("last_sequence", "The newest sequence given out.")
        self.epoch = gauge("epoch", "This writer's incarnation.")
        # time
        self.admission = histogram("admission_seconds", "From a prepared batch to its durable numbers.", LATENCY)
        self.first_token = histogram("time_to_first_token_seconds", "From admission, of streamed items.", LATENCY)
        self.between_tokens = histogram("between_tokens_seconds", "Between the tokens of one item, streamed.", BETWEEN)
        self.item = histogram("item_seconds", "From admission to the durable outcome.", LATENCY)
        # journal
        self.commit = histogram("journal_commit_seconds", "One transaction.", COMMIT)
        self.commit_drafts = histogram("journal_commit_drafts", "Batches and outcomes in one transaction.", COUNTS)
        self.journal_bytes = counter("journal_payload_bytes", "Bytes of payload made durable.")
        self.journal_full = gauge("journal_full", "1 while new work is refused for want of room, or of a database.")
        self.mark_shares_disk = gauge(
            "mark_shares_disk", "1 if the high-water mark is on the journal's file system, and would be lost with it."
        )
        self.damaged = counter("journal_damaged_reads", "Reads of a record that is not what was written.")
        # witness
        self.witness_failures = counter("witness_failures", "Signed heads that could not be given to the witness.")
        self.witnessed_index = gauge("witnessed_index", "The newest entry of which the witness has the signed head.")
        self.witness_lag = gauge("witness_lag_seconds", "How long there have been entries that the witness has no head of.")
        self.witnessed_forks = counter("witnessed_forks", "Heads of other logs that contradict one that is recorded here.")
        # engine
        self.connected = gauge("engine_connected", "1 while the engine stream is up.")
        self.grade = gauge("engine_grade", "3 EXACT, 2 SERIAL, 1 BEST_EFFORT, 0 not connected.")
        self.fingerprint = gauge("engine_info", "1 for the connected engine.", "engine", "model", "fingerprint", "grade")
        self.faults = counter("engine_faults", "What the service said and must not; the stream is dropped.", "reason")
        self.faults.labels(ProtocolViolation.reason)  # the first one is to be an increase
        # second runs; their verdicts are counted from the journal
        self.audit_backlog = gauge("audit_backlog_items", "Sampled items that wait for their audit.")


class Observer:
    """Sees everything, and changes nothing but the spans of items."""

    def __init__(self, metrics: Metrics, not_compared: Callable[[types_pb2.ComparisonKind.ValueType, str], None]) -> None:
        """`not_compared` counts a second run that was due and brought no verdict, by kind and reason."""
        self.metrics, self.not_compared = metrics, not_compared
        self._behind_since: float | None = None
        metrics.witness_lag.set_function(lambda: time.monotonic() - since if (since := self._behind_since) is not None else 0)
        self._ended = cache(lambda kind, reason: metrics.ended.labels(_word(kind), reason))  # `labels` is slow

    # ---- a request

    def asked(self, request: generation_pb2.GenerateRequest) -> None:
        """In the span of its call."""
        if tracing.tracer is not None:
            tracing.current().note({"ostinato.request_id": request.request_id, "ostinato.items": len(request.items)})

    def numbered(self, stamp: types_pb2.Stamp, *, repeated: bool) -> None:
        """In the span of its call."""
        if tracing.tracer is not None:
            about = {"ostinato.sequence": stamp.first_sequence, "ostinato.epoch": stamp.epoch}
            tracing.current().note({**about, "ostinato.repeated_key": repeated})

    def refused(self, error: errors.OstinatoError) -> None:
        self.metrics.refused.labels(error.reason).inc()
        if isinstance(error, ProtocolViolation):
            self.fault(error)

    def admitted(self, stamp: types_pb2.Stamp, seconds: float) -> None:
        """`seconds`: from the prepared batch to its sequences."""
        self.metrics.admitted.inc(stamp.count)
        self.metrics.last_sequence.set(stamp.first_sequence + stamp.count - 1)
        self.metrics.admission.observe(seconds, {"sequence": str(stamp.first_sequence)})

    # ---- an item

    def activated(self, item: ActiveItem, caller: Span) -> None:
        """It has a sequence. `caller`: the span of its call."""
        if tracing.tracer is not None:
            header = item.admitted
            attributes: tracing.Attributes = {
                "ostinato.sequence": header.sequence,
                "ostinato.log_id": header.log_id,
                "ostinato.writer": header.writer,
                "ostinato.epoch": header.epoch,
                "ostinato.request_id": item.input.request_id,
                "ostinato.seed": str(item.input.seed),
            }
            item.span = caller.child("item", attributes)
            item.stage = item.span.child("queue")

    def submitted(self, item: ActiveItem, attempt: int, *, again: bool) -> str:
        """The traceparent that goes with the submission."""
        if again:
            self.metrics.attempts.inc()
            log.warning("submitted again", extra={"sequence": item.sequence, "attempt": attempt, **item.span.ids})
        else:
            self.metrics.submitted.inc()
        if item.span is OFF:
            return ""
        item.stage.end()
        if attempt > 1:
            item.span.event("submitted again", {"ostinato.attempt": attempt})
        attributes = {"ostinato.sequence": item.sequence, "ostinato.attempt": attempt, "ostinato.company": item.company}
        item.stage = item.span.child("run", attributes, "CLIENT")
        return item.stage.traceparent

    def tokens(self, item: ActiveItem, count: int, now: float) -> None:
        """Before the item takes the tokens."""
        if item.first_token_at is None:
            self.metrics.first_token.observe(now - item.admitted_at, _exemplar(item))
        elif count and item.last_tokens_at is not None:
            self.metrics.between_tokens.observe((now - item.last_tokens_at) / count)

    def recording(self, item: ActiveItem, error: errors.OstinatoError | None) -> None:
        """Its run has ended, and its outcome is to become durable."""
        item.stage.end(error)
        item.stage = item.span.child("journal")

    def recorded(self, item: ActiveItem, sealed: Sealed, result: types_pb2.Result, *, last: bool) -> None:
        """The outcome is durable. `last`: of those in its commit. Exemplars are slow, and a bucket keeps only its newest."""
        error = errors.from_status(result.status) if result.HasField("status") else None
        self._ended(sealed.header.kind, error.reason if error is not None else "").inc()
        self.metrics.item.observe(result.timing.total_micros / 1e6, _exemplar(item) if last else None)
        if log.isEnabledFor(logging.DEBUG):
            fields = {"sequence": item.sequence, "request_id": item.input.request_id, **item.span.ids}
            log.debug("ended", extra={**fields, "outcome": _word(sealed.header.kind)})
        if item.span is not OFF:
            item.stage.end()
            header = sealed.header
            item.span.note(
                {
                    "ostinato.attempt": header.attempt,
                    "ostinato.outcome": enums.word(types_pb2.EntryKind, header.kind),
                    "ostinato.grade": enums.word(types_pb2.Grade, header.grade),
                    "ostinato.fingerprint": header.fingerprint_digest.hex(),
                }
            )
            item.span.end(error)
        if item.collision == sequencer_pb2.COLLISION_FOUND and item.output is not None:
            self._collision(item, item.output)

    def _collision(self, item: ActiveItem, output: types_pb2.Output) -> None:
        choice = choice_of(item.input.parameters, output)
        log.error(
            "collision: an unseeded answer equals that of another seed",
            extra={
                "sequence": item.sequence,
                "tokens": choice.tokens,
                "distinct_tokens": choice.distinct_tokens,
                "logprobs_known": choice.logprobs_known,
                "choice_bits": round(choice.bits, 1),
            },
        )

    def deferred(self, item: ActiveItem) -> None:
        """It is left to the next epoch."""
        item.stage.end(item.deferred)
        item.span.end(item.deferred)

    # ---- the engine

    def engine(self, description: engine_pb2.DescribeResponse | None) -> None:
        """None: it is disconnected."""
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

    def engine_lost(self, items: Iterable[ActiveItem]) -> None:
        """These were in it, and wait again."""
        for item in items:
            item.stage.end(errors.Disconnected("the engine was lost"))
            item.stage = item.span.child("queue")
        self.engine(None)

    def fault(self, error: errors.OstinatoError) -> None:
        self.metrics.faults.labels(error.reason).inc()
        log.error("engine fault", extra={"reason": error.reason, "why": error.message})

    # ---- the journal, the process

    def opened(self, head: Head) -> None:
        """The journal is open, in a new epoch."""
        self.metrics.epoch.set(head.epoch)
        self.metrics.last_sequence.set(head.last_sequence)

    def taken_over(self, unfinished: Sequence[Unfinished]) -> None:
        """Another writer's lease has expired, and its items are now this one's."""
        self.metrics.taken_over.inc(len(unfinished))
        log.warning("took over", extra={"writer": unfinished[0].admitted.header.writer, "count": len(unfinished)})

    def committed(self, seconds: float, drafts: int, payload_bytes: int) -> None:
        """One transaction of the journal."""
        self.metrics.commit.observe(seconds)
        self.metrics.commit_drafts.observe(drafts)
        self.metrics.journal_bytes.inc(payload_bytes)

    def witness_behind(self) -> None:
        """There are entries of which the witness has no head."""
        if self._behind_since is None:
            self._behind_since = time.monotonic()

    def witnessed(self, index: int) -> None:
        """The witness has a head of this entry."""
        self._behind_since = None
        self.metrics.witnessed_index.set(index)

    def forked(self, head: types_pb2.SignedHead) -> None:
        """Another log has signed two entries of one index."""
        self.metrics.witnessed_forks.inc()
        log.error("a witnessed log has two histories", extra={"log_id": head.log_id, "index": head.last_index})

    def witness_failed(self, error: Exception) -> None:
        self.metrics.witness_failures.inc()
        log.warning("the witness did not take a head", extra={"why": str(error) or type(error).__name__})

    def mark_shares_disk(self, mark: Path) -> None:
        self.metrics.mark_shares_disk.set(1)
        log.warning(
            "the high-water mark is on the journal's file system, and would be lost with it: name another with --high-water",
            extra={"path": str(mark)},
        )

    def damaged(self, why: str) -> None:
        self.metrics.damaged.inc()
        log.error("a record is damaged: look at the journal with verify", extra={"why": why})

    def watch(self, core: Sequencer, unnumbered: Callable[[], int], held_bytes: Callable[[], int]) -> None:
        """Read these whenever metrics are read. `unnumbered`: items that wait for a sequence."""
        self.metrics.unnumbered.set_function(unnumbered)
        self.metrics.queue.set_function(lambda: core.queued)
        self.metrics.inflight.set_function(lambda: window.runs if (window := core.window) else 0)
        self.metrics.inflight_blocks.set_function(lambda: window.blocks if (window := core.window) else 0)
        self.metrics.waiting.set_function(
            lambda: unnumbered() + core.queued + (window.runs - window.running if (window := core.window) else 0)
        )
        self.metrics.running.set_function(lambda: window.running if (window := core.window) else 0)
        self.metrics.kv_usage.set_function(lambda: window.blocks / window.engine.kv_blocks if (window := core.window) else 0)
        self.metrics.held.set_function(held_bytes)

    def lost(self, bound: str) -> None:
        """A call was lost to a slow reader."""
        self.metrics.lost.labels(bound).inc()


def run_span(purpose: engine_pb2.Purpose.ValueType, sequence: int) -> Span:
    """The span of a second run, from when it is asked for."""
    return tracing.span(enums.word(engine_pb2.Purpose, purpose).lower(), {"ostinato.sequence": sequence}, "CLIENT")


def _word(kind: types_pb2.EntryKind.ValueType) -> str:
    return enums.word(types_pb2.EntryKind, kind).lower()


def _exemplar(item: ActiveItem) -> dict[str, str]:
    return {"sequence": str(item.sequence), **item.span.exemplar}
