"""The dashboards: overview, divergence, order and engine."""

from __future__ import annotations

from k8s.monitoring.panels import GRADES, Board, bars, heat_map, limit, lines, number, quantile, rate, rows, total

OVERVIEW = Board("overview", "Objectives, traffic, latency and how full it is.")
CALLS = '{ON,service="ostinato.v1.Generation"}'
BAD_FROM = ((None, "green"), (1, "red"))
STAGES = (
    (total("unnumbered_items"), "wait for a number"),
    (total("queue_items"), "wait for journal or room"),
    (total("inflight_items"), "in the engine"),
)

OVERVIEW.row(
    "Objectives",
    number(
        "Calls answered",
        "percentunit",
        '1 - sum(slo:ostinato_errors:rate5m{JOB,slo="calls"}) / sum(slo:ostinato_events:rate5m{JOB,slo="calls"})',
        (None, "red"),
        (0.999, "green"),
        about="In the last five minutes, without the callers' own errors.",
    ),
    number(
        "Items completed",
        "percentunit",
        '1 - sum(slo:ostinato_errors:rate5m{JOB,slo="items"}) / sum(slo:ostinato_events:rate5m{JOB,slo="items"})',
        (None, "red"),
        (0.999, "green"),
        about="In the last five minutes, without cancelled items.",
    ),
    number(
        "Alerts",
        "none",
        'count(ALERTS{alertname=~"Ostinato.+",alertstate="firing"}) or vector(0)',
        *BAD_FROM,
        about="Alerts that are firing.",
    ),
    number("Divergence", "none", "max(ostinato_divergence_alarm{ON})", names={"0": ("none", "green"), "1": ("ALARM", "red")}),
    number("Grade", "none", "min(ostinato_engine_grade{ON})", names=GRADES, about="The lowest of the connected engines."),
    number("Engines connected", "none", total("engine_connected"), (None, "red"), (1, "green")),
    lines(
        "Error budget burn",
        "none",
        ("slo:ostinato_error_budget:burn_rate5m{JOB}", "{{slo}}, 5 minutes"),
        ("slo:ostinato_error_budget:burn_rate1h{JOB}", "{{slo}}, an hour"),
        ("slo:ostinato_error_budget:burn_rate6h{JOB}", "{{slo}}, six hours"),
        about="1 spends the month's budget in a month. 14.4 for an hour, and 6 for six hours, raise an alert.",
        width=24,
    ),
)
OVERVIEW.row(
    "Traffic",
    lines(
        "Items",
        "ops",
        (rate("admitted_items_total"), "admitted"),
        (rate("ended_items_total", "outcome, reason"), "{{outcome}} {{reason}}"),
    ),
    lines(
        "Calls by code",
        "ops",
        (f"sum by (method, code) (rate(ostinato_rpc_handled_total{CALLS}[RATE]))", "{{method}} {{code}}"),
    ),
    lines(
        "Refused requests",
        "ops",
        (rate("refused_requests_total", "reason"), "{{reason}}"),
        (rate("repeated_requests_total"), "answered from the record"),
        about="Refused before sequencing, by reason; and requests with a known key, which are answered from the record.",
    ),
)
OVERVIEW.row(
    "Latency",
    heat_map("To the first token", "s", "ostinato_time_to_first_token_seconds", "From admission, of streamed items."),
    heat_map("Between tokens", "s", "ostinato_between_tokens_seconds"),
    heat_map("Whole items", "s", "ostinato_item_seconds", "From admission to the durable outcome."),
    lines(
        "Whole items, median and 99 %",
        "s",
        (quantile(0.5, "item_seconds"), "median"),
        (quantile(0.99, "item_seconds"), "99 %"),
        about="Each exemplar names a sequence: `ostinato get SEQUENCE`.",
        exemplars=True,
    ),
    lines(
        "99 % within five minutes, by instance",
        "s",
        ('instance:ostinato_time_to_first_token_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} first token"),
        ('instance:ostinato_between_tokens_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} between tokens"),
        ('instance:ostinato_item_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} item"),
        ('instance:ostinato_admission_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} admission"),
    ),
    lines(
        "Calls, 99 %",
        "s",
        (
            f"histogram_quantile(0.99, sum by (method, le) (rate(ostinato_rpc_handling_seconds_bucket{CALLS}[RATE])))",
            "{{method}}",
        ),
    ),
)
OVERVIEW.row(
    "Load",
    lines("Items that wait or run", "none", *STAGES),
    lines("KV blocks", "none", (total("inflight_kv_blocks"), "needed at worst"), (total("kv_blocks"), "of the engines limit")),
    lines(
        "Held for callers",
        "bytes",
        ("ostinato_held_bytes{ON}", "{{instance}}"),
        about="Tokens and answers that wait to be read, or to be written.",
    ),
    lines(
        "Calls lost to slow readers",
        "ops",
        (rate("lost_calls_total", "bound"), "{{bound}}"),
        about="SLOW_READER, by the bound that was reached: of the call, its tenant, all, or the time to read.",
    ),
    lines("Memory", "bytes", ("process_resident_memory_bytes{ON}", "{{job}} {{instance}}")),
    lines("CPU", "none", ("rate(process_cpu_seconds_total{ON}[RATE])", "{{job}} {{instance}}"), about="Cores in use."),
    lines("Open files", "none", ("process_open_fds{ON}", "{{job}} {{instance}}")),
    number(
        "Certificate",
        "s",
        "min((ostinato_tls_certificate_expiry_timestamp_seconds{ON} > 0) - time())",
        (None, "red"),
        (604800, "green"),
        about="Until the certificate of the public address expires.",
        width=4,
    ),
    number(
        "Credentials unusable",
        "none",
        'sum(increase(ostinato_credential_reloads_total{ON,outcome="unusable"}[1d]))',
        *BAD_FROM,
        about="Changed files that could not be read, within a day.",
        width=4,
    ),
)

DIVERGENCE = Board("divergence", "Comparisons by kind and grade, with their bounds; evidence; drift; what was not compared.")
PROMISED = 'grade=~"exact|serial"'

DIVERGENCE.row(
    "Verdict",
    number(
        "Alarm",
        "none",
        "max(ostinato_divergence_alarm{ON})",
        names={"0": ("none", "green"), "1": ("ALARM", "red")},
        about="1 while the evidence that more than 1 comparison in 1,000 diverges is 100 or more.",
    ),
    number(
        "Diverged at exact or serial, a day",
        "none",
        f"sum(kind_grade:ostinato_diverged:increase1d{{JOB,{PROMISED}}}) or vector(0)",
        (None, "green"),
        (0.5, "red"),
        about="Comparisons that diverged at grade exact or serial.",
    ),
    number("Compared, a day", "short", "sum(kind_grade:ostinato_comparisons:increase1d{JOB})"),
    number(
        "Diverged, a day",
        "percentunit",
        "sum(kind_grade:ostinato_diverged:increase1d{JOB}) / sum(kind_grade:ostinato_comparisons:increase1d{JOB})",
        about="Share of all comparisons.",
    ),
    number(
        "Per token, a day",
        "sci",
        "max(kind_grade:ostinato_divergence_per_token:ratio1d{JOB})",
        about="Divergence per compared token, of the worst kind and grade.",
    ),
    number(
        "Collisions of seeds, a day", "none", "sum(increase(ostinato_collisions_total{ON}[1d]))", (None, "green"), (0.5, "red")
    ),
    lines(
        "Newest 1,000 of each sidecar",
        "percentunit",
        ("ostinato_divergence_rate{ON}", "{{kind}} {{grade}}"),
        ("ostinato_divergence_rate_lower{ON}", "{{kind}} {{grade}} lower"),
        ("ostinato_divergence_rate_upper{ON}", "{{kind}} {{grade}} upper"),
        about="Share that diverged, with its bounds of 95 %.",
        width=12,
    ),
    lines(
        "A day of all sidecars",
        "percentunit",
        ("kind_grade:ostinato_divergence:ratio1d{JOB}", "{{kind}} {{grade}}"),
        ("kind_grade:ostinato_divergence:lower1d{JOB}", "{{kind}} {{grade}} lower"),
        ("kind_grade:ostinato_divergence:upper1d{JOB}", "{{kind}} {{grade}} upper"),
        about="Share that diverged, over all sidecars.",
        width=12,
    ),
)
DIVERGENCE.row(
    "Evidence",
    limit(
        lines(
            "Evidence, logarithm",
            "none",
            ("ostinato_divergence_evidence_log10{ON}", "{{kind}} {{grade}}"),
            about="That more than 1 comparison in 1,000 diverges. 2 raises the alarm. May be read at any time.",
        ).min(-3),
        2,
    ),
    bars(
        "First differing token",
        "none",
        "sum by (le) (ostinato_first_difference_token_bucket{ON})",
        "{{le}}",
        about="Comparisons that diverged at an index up to this one and above the one before.",
    ),
    lines("Comparisons", "ops", (rate("comparisons_total", "kind, verdict"), "{{kind}} {{verdict}}")),
    lines("Tokens compared", "ops", (rate("compared_tokens_total", "kind, grade"), "{{kind}} {{grade}}")),
    lines(
        "Unseeded answers",
        "ops",
        (rate("collision_checks_total"), "compared with those of other seeds"),
        (rate("collisions_total"), "equal to one"),
        about="A collision: two seeds gave the same answer.",
    ),
    lines(
        "Not compared",
        "ops",
        (rate("not_compared_total", "kind, reason"), "{{kind}} {{reason}}"),
        about="Second runs that were due and gave no verdict.",
    ),
)
DIVERGENCE.row(
    "Drift and audits",
    lines(
        "Drift",
        "none",
        ("sum by (kind, field) (ostinato_drift_total{ON})", "{{kind}} {{field}}"),
        about="Incomparable runs, by what differed.",
        steps=True,
    ),
    lines("Audits that wait", "none", (total("audit_backlog_items"), "audits")),
)

ORDER = Board("order", "Sequences, epochs, the journal's commits and the engine's window.")

ORDER.row(
    "Sequence",
    number("Newest sequence", "none", "max(ostinato_last_sequence{ON})"),
    number("Epoch", "none", "max(ostinato_epoch{ON})", about="Increases at every start of a sidecar."),
    number(
        "Waiting items",
        "none",
        f"{total('unnumbered_items')} + {total('queue_items')}",
        about="Items that wait for a sequence, the journal or room in the engine.",
    ),
    number("In the engine", "none", total("inflight_items")),
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
        (rate("admitted_items_total"), "numbered"),
        (rate("submitted_items_total"), "submitted"),
        (rate("attempts_total"), "submitted again"),
        (rate("ended_items_total"), "ended"),
        (rate("taken_over_items_total"), "taken over"),
    ),
    lines("Newest sequence over time", "none", ("ostinato_last_sequence{ON}", "{{instance}}")),
    lines("Epoch over time", "none", ("ostinato_epoch{ON}", "{{instance}}"), steps=True),
)
ORDER.row(
    "Journal",
    heat_map("Commit time", "s", "ostinato_journal_commit_seconds", "One transaction each."),
    heat_map("Batches and outcomes in a commit", "none", "ostinato_journal_commit_drafts"),
    lines(
        "Commit time, median and 99 %",
        "s",
        ('instance:ostinato_journal_commit_seconds:quantile5m{ON,quantile="0.5"}', "{{instance}} median"),
        ('instance:ostinato_journal_commit_seconds:quantile5m{ON,quantile="0.99"}', "{{instance}} 99 %"),
        about="Over five minutes.",
    ),
    lines(
        "Journal writes",
        "ops",
        (rate("journal_commit_seconds_count"), "commits"),
        (rate("journal_commit_drafts_sum"), "batches and outcomes"),
    ),
    lines("Payload", "Bps", (rate("journal_payload_bytes_total"), "written")),
    lines(
        "Admission",
        "s",
        (quantile(0.5, "admission_seconds"), "median"),
        (quantile(0.99, "admission_seconds"), "99 %"),
        about="From a prepared batch to its durable numbers. Each exemplar names a batch's first sequence.",
        exemplars=True,
    ),
)
ORDER.row(
    "Window",
    lines("Items by stage", "none", *STAGES, width=6),
    lines(
        "Share of the KV blocks",
        "percentunit",
        (f"{total('inflight_kv_blocks')} / ({total('kv_blocks')} > 0)", "needed at worst"),
        width=6,
    ),
    lines(
        "Streams to the engine",
        "none",
        (total("engine_connected"), "sidecars connected"),
        (total("service_streams"), "open at the services"),
        ("sum by (reason) (increase(ostinato_service_streams_refused_total{ON}[RATE]))", "refused {{reason}}"),
        ("sum by (reason) (increase(ostinato_engine_faults_total{ON}[RATE]))", "dropped {{reason}}"),
        width=6,
        steps=True,
    ),
    heat_map("Events in a message", "none", "ostinato_service_frame_events", "From the service to the sidecar.", 6),
)

ENGINE = Board("engine", "Tokens, runs, KV cache, grade and fingerprint.")
GPU = "TurboMind only."

ENGINE.row(
    "Engine",
    number("Grade held", "none", "min(ostinato_service_grade{ON})", names=GRADES),
    number(
        "Self-test", "s", "max(ostinato_service_self_test_seconds{ON})", about="Duration of the self-test behind this grade."
    ),
    number("Generated", "ops", rate("engine_generated_tokens_total"), about="Tokens a second."),
    number("Runs in flight", "none", total("engine_runs_in_flight")),
    number(
        "Fingerprints connected",
        "none",
        "count(count by (fingerprint) (ostinato_engine_info{ON}))",
        (None, "green"),
        (2, "orange"),
        about="More than one gives different answers.",
    ),
    number("KV capacity", "none", 'sum(ostinato_engine_capacity{ON,of="kv_blocks"})'),
    rows("Fingerprints as the sidecars see them", "ostinato_engine_info{ON}"),
    rows("Fingerprints as the services report them", "ostinato_service_fingerprint_info{ON}"),
)
ENGINE.row(
    "Work",
    lines(
        "Tokens",
        "ops",
        (rate("engine_generated_tokens_total"), "generated"),
        (rate("engine_prompt_tokens_total"), "of prompts"),
        (rate("engine_cached_prompt_tokens_total"), "of prompts, from the prefix cache"),
    ),
    lines(
        "Prefix cache",
        "percentunit",
        (f"{rate('engine_cached_prompt_tokens_total')} / {rate('engine_prompt_tokens_total')}", "of prompt tokens"),
        about="Share of prompt tokens that were not computed again.",
    ),
    lines(
        "Runs",
        "none",
        (total("engine_runs_in_flight"), "in flight"),
        (total("engine_runs_queued"), "queued"),
        ('sum(ostinato_engine_capacity{ON,of="runs"})', "at once limit"),
    ),
    lines("Ended", "ops", (rate("engine_runs_total", "purpose, end"), "{{purpose}} {{end}}")),
    heat_map("Whole runs", "s", "ostinato_engine_run_seconds", "From submission to the end, of those that finished."),
    heat_map("To the first token", "s", "ostinato_engine_first_token_seconds", "From submission, of streamed runs."),
    heat_map("Between tokens", "s", "ostinato_engine_between_tokens_seconds", "Of streamed runs."),
    heat_map("Queue", "s", "ostinato_engine_queue_seconds", "From submission to start."),
    lines(
        "Grade",
        "none",
        ("ostinato_engine_grade{ON}", "{{instance}} connected"),
        ("ostinato_service_grade{ON}", "{{instance}} held"),
        about="3 exact, 2 serial, 1 best effort, 0 not connected.",
        steps=True,
    ),
    lines(
        "KV blocks",
        "none",
        (total("inflight_kv_blocks"), "needed at worst"),
        ('sum(ostinato_engine_capacity{ON,of="kv_blocks"})', "held limit"),
    ),
)
ENGINE.row(
    "TurboMind",
    lines("KV cache in use", "percentunit", ("ostinato_engine_kv_usage_ratio{ON}", "{{instance}}"), about=GPU),
    lines("Steps", "ops", ("rate(ostinato_engine_steps_total{ON}[RATE])", "{{instance}}"), about=GPU),
    lines(
        "Overrides",
        "ops",
        (rate("engine_override_calls_total", "override"), "{{override}}"),
        (total("engine_override_plans_total"), "products planned"),
        (total("engine_override_uncovered_total"), "products uncovered"),
        (total("engine_override_corrected_total"), "resumes corrected"),
        (total("engine_preemptions_total"), "runs preempted"),
        about=f"Calls that an override served. Uncovered products and preempted runs must stay 0. {GPU}",
    ),
)

BOARDS = (OVERVIEW, DIVERGENCE, ORDER, ENGINE)
