"""The sidecar's metrics, by name. Base units, no colons, no sequence in a label. Divergence has `divergence.numbers`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ostinato.errors import ProtocolViolation

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

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"ostinato_{name}", text, labels, buckets=buckets, registry=registry)

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
        self.held = gauge("held_bytes", "Bytes held for callers: they wait to be read, or to be written.")
        self.lost = counter("lost_calls", "Calls lost to slow readers, by the bound that was reached.", "bound")
        for bound in ("call", "tenant", "all", "time"):
            self.lost.labels(bound)
        self.last_sequence = gauge("last_sequence", "The newest sequence given out.")
        self.epoch = gauge("epoch", "This writer's incarnation.")
        # time
        self.admission = histogram("admission_seconds", "From a prepared batch to its durable numbers.", LATENCY)
        self.first_token = histogram("time_to_first_token_seconds", "From admission, where somebody streams.", LATENCY)
        self.between_tokens = histogram("between_tokens_seconds", "Between the tokens of one item, streamed.", BETWEEN)
        self.item = histogram("item_seconds", "From admission to the durable outcome.", LATENCY)
        # journal
        self.commit = histogram("journal_commit_seconds", "One transaction.", COMMIT)
        self.commit_drafts = histogram("journal_commit_drafts", "Batches and outcomes in one transaction.", COUNTS)
        self.journal_bytes = counter("journal_payload_bytes", "Bytes of payload made durable.")
        self.journal_full = gauge("journal_full", "1 while new work is refused for want of room, or of a database.")
        # engine
        self.connected = gauge("engine_connected", "1 while the engine stream is up.")
        self.grade = gauge("engine_grade", "3 EXACT, 2 SERIAL, 1 BEST_EFFORT, 0 not connected.")
        self.fingerprint = gauge("engine_info", "1 for the connected engine.", "engine", "model", "fingerprint", "grade")
        self.faults = counter("engine_faults", "What the service said and must not; the stream is dropped.", "reason")
        self.faults.labels(ProtocolViolation.reason)  # the first one is to be an increase
        # second runs; their verdicts are counted from the journal
        self.audit_backlog = gauge("audit_backlog_items", "Items that were chosen for an audit and wait for it.")
