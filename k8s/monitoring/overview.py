"""Is it well, and if not, where to look."""

from __future__ import annotations

from k8s.monitoring.board import GRADES, Board, heat_map, lines, number

BOARD = Board("overview", "Objectives, traffic, latency and how full it is.")
CALLS = '{ON,service="ostinato.v1.Generation"}'
BAD_FROM = ((None, "green"), (1, "red"))

BOARD.row(
    "Objectives",
    number(
        "Calls answered",
        "percentunit",
        '1 - sum(slo:ostinato_errors:rate5m{JOB,slo="calls"}) / sum(slo:ostinato_events:rate5m{JOB,slo="calls"})',
        (None, "red"),
        (0.999, "green"),
        about="Of the last five minutes; what callers do wrong does not count.",
    ),
    number(
        "Items completed",
        "percentunit",
        '1 - sum(slo:ostinato_errors:rate5m{JOB,slo="items"}) / sum(slo:ostinato_events:rate5m{JOB,slo="items"})',
        (None, "red"),
        (0.999, "green"),
        about="Of the last five minutes, of those that nobody cancelled.",
    ),
    number(
        "Alerts",
        "none",
        'count(ALERTS{alertname=~"Ostinato.+",alertstate="firing"}) or vector(0)',
        *BAD_FROM,
        about="That fire now.",
    ),
    number(
        "Divergence", "none", "max(ostinato_divergence_alarm{ON})", names={"0": ("none seen", "green"), "1": ("ALARM", "red")}
    ),
    number("Grade", "none", "min(ostinato_engine_grade{ON})", names=GRADES, about="The lowest of the connected engines."),
    number("Engines connected", "none", "sum(ostinato_engine_connected{ON})", (None, "red"), (1, "green")),
    lines(
        "Error budget burn",
        "none",
        ("slo:ostinato_error_budget:burn_rate5m{JOB}", "{{slo}}, 5 minutes"),
        ("slo:ostinato_error_budget:burn_rate1h{JOB}", "{{slo}}, an hour"),
        ("slo:ostinato_error_budget:burn_rate6h{JOB}", "{{slo}}, six hours"),
        about="1 spends the month's budget in a month. 14.4 for an hour, and 6 for six hours, call somebody.",
        width=24,
    ),
)
BOARD.row(
    "Traffic",
    lines(
        "Items",
        "ops",
        ("sum(rate(ostinato_admitted_items_total{ON}[RATE]))", "admitted"),
        ("sum by (outcome, reason) (rate(ostinato_ended_items_total{ON}[RATE]))", "{{outcome}} {{reason}}"),
    ),
    lines(
        "Calls by code",
        "ops",
        (f"sum by (method, code) (rate(ostinato_rpc_handled_total{CALLS}[RATE]))", "{{method}} {{code}}"),
    ),
    lines(
        "Turned away",
        "ops",
        ("sum by (reason) (rate(ostinato_refused_requests_total{ON}[RATE]))", "{{reason}}"),
        ("sum(rate(ostinato_repeated_requests_total{ON}[RATE]))", "answered from the record"),
        about="Before sequencing, by reason; and requests whose key was bound, which are answered and not run.",
    ),
)
BOARD.row(
    "Latency",
    heat_map(
        "To the first token", "s", "ostinato_time_to_first_token_seconds", "From admission, of items that somebody streams."
    ),
    heat_map("Between tokens", "s", "ostinato_between_tokens_seconds"),
    heat_map("Whole items", "s", "ostinato_item_seconds", "From admission to the durable outcome."),
    lines(
        "Whole items, median and 99 %",
        "s",
        ("histogram_quantile(0.5, sum by (le) (rate(ostinato_item_seconds_bucket{ON}[RATE])))", "median"),
        ("histogram_quantile(0.99, sum by (le) (rate(ostinato_item_seconds_bucket{ON}[RATE])))", "99 %"),
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
BOARD.row(
    "How full it is",
    lines(
        "Items that wait or run",
        "none",
        ("sum(ostinato_unnumbered_items{ON})", "wait for a number"),
        ("sum(ostinato_queue_items{ON})", "wait for journal or room"),
        ("sum(ostinato_inflight_items{ON})", "in the engine"),
    ),
    lines(
        "KV blocks",
        "none",
        ("sum(ostinato_inflight_kv_blocks{ON})", "needed at worst"),
        ("sum(ostinato_kv_blocks{ON})", "of the engines limit"),
    ),
    lines(
        "Held for callers",
        "bytes",
        ("ostinato_held_bytes{ON}", "{{instance}}"),
        about="Tokens and answers that wait to be read, or to be written.",
    ),
    lines(
        "Calls lost to slow readers",
        "ops",
        ("sum by (bound) (rate(ostinato_lost_calls_total{ON}[RATE]))", "{{bound}}"),
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
        about="Until the public door's expires.",
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
