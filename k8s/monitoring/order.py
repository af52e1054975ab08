"""What is numbered, written and handed on, and how quickly."""

from __future__ import annotations

from k8s.monitoring.board import Board, heat_map, lines, number

BOARD = Board("order", "Sequences, epochs, the journal's commits and the window to the engine.")
P99 = "histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{ON}}[RATE])))"

BOARD.row(
    "Sequence",
    number("Newest sequence", "none", "max(ostinato_last_sequence{ON})"),
    number("Epoch", "none", "max(ostinato_epoch{ON})", about="Rises at every start of a sidecar."),
    number(
        "Wait",
        "none",
        "sum(ostinato_unnumbered_items{ON}) + sum(ostinato_queue_items{ON})",
        about="Items, for numbers, the journal or room.",
    ),
    number("In the engine", "none", "sum(ostinato_inflight_items{ON})"),
    number("Journal room", "none", "max(ostinato_journal_full{ON})", names={"0": ("room", "green"), "1": ("FULL", "red")}),
    number(
        "Abandoned, a day",
        "none",
        'sum(increase(ostinato_ended_items_total{ON,outcome="abandoned"}[1d])) or vector(0)',
        (None, "green"),
        (1, "orange"),
    ),
    lines(
        "Sequences",
        "ops",
        ("sum(rate(ostinato_admitted_items_total{ON}[RATE]))", "numbered"),
        ("sum(rate(ostinato_submitted_items_total{ON}[RATE]))", "submitted"),
        ("sum(rate(ostinato_attempts_total{ON}[RATE]))", "submitted again"),
        ("sum(rate(ostinato_ended_items_total{ON}[RATE]))", "ended"),
        ("sum(rate(ostinato_taken_over_items_total{ON}[RATE]))", "taken over"),
    ),
    lines("Newest sequence over time", "none", ("ostinato_last_sequence{ON}", "{{instance}}")),
    lines("Epoch over time", "none", ("ostinato_epoch{ON}", "{{instance}}"), steps=True),
)
BOARD.row(
    "Journal",
    heat_map("Commit time", "s", "ostinato_journal_commit_seconds", "One transaction each."),
    heat_map("Batches and outcomes in a commit", "none", "ostinato_journal_commit_drafts"),
    lines(
        "Commit time, median and 99 %",
        "s",
        ('instance:ostinato_journal_commit_seconds:quantile5m{ON,quantile="0.5"}', "{{instance}} median"),
        ('instance:ostinato_journal_commit_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} 99 %"),
        about="Within five minutes.",
    ),
    lines(
        "Journal writes",
        "ops",
        ("sum(rate(ostinato_journal_commit_seconds_count{ON}[RATE]))", "commits"),
        ("sum(rate(ostinato_journal_commit_drafts_sum{ON}[RATE]))", "batches and outcomes"),
    ),
    lines("Payload", "Bps", ("sum(rate(ostinato_journal_payload_bytes_total{ON}[RATE]))", "written")),
    lines(
        "Admission",
        "s",
        (P99.format(share=0.5, metric="ostinato_admission_seconds"), "median"),
        (P99.format(share=0.99, metric="ostinato_admission_seconds"), "99 %"),
        about="From a prepared batch to its durable numbers. Each exemplar names a batch's first sequence.",
        exemplars=True,
    ),
)
BOARD.row(
    "Window",
    lines(
        "Items by stage",
        "none",
        ("sum(ostinato_unnumbered_items{ON})", "wait for a number"),
        ("sum(ostinato_queue_items{ON})", "wait for journal or room"),
        ("sum(ostinato_inflight_items{ON})", "in the engine"),
        width=6,
    ),
    lines(
        "Share of the KV blocks",
        "percentunit",
        ("sum(ostinato_inflight_kv_blocks{ON}) / (sum(ostinato_kv_blocks{ON}) > 0)", "needed at worst"),
        width=6,
    ),
    lines(
        "Streams to the engine",
        "none",
        ("sum(ostinato_engine_connected{ON})", "sidecars connected"),
        ("sum(ostinato_service_streams{ON})", "open at the services"),
        ("sum by (reason) (increase(ostinato_service_streams_refused_total{ON}[RATE]))", "refused {{reason}}"),
        ("sum by (reason) (increase(ostinato_engine_faults_total{ON}[RATE]))", "dropped {{reason}}"),
        width=6,
        steps=True,
    ),
    heat_map("Events in a message", "none", "ostinato_service_frame_events", "From the service to the sidecar.", 6),
)
