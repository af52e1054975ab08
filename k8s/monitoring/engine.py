"""What runs, what it has earned, and how fast it is."""

from __future__ import annotations

from k8s.monitoring.board import GRADES, Board, heat_map, lines, number, rows

BOARD = Board("engine", "Tokens, runs, KV cache, grade and fingerprint.")
GPU = "Only TurboMind says it."

BOARD.row(
    "What runs",
    number("Grade held", "none", "min(ostinato_service_grade{ON})", names=GRADES),
    number(
        "Self-test", "s", "max(ostinato_service_self_test_seconds{ON})", about="How long the one took that this grade rests on."
    ),
    number("Generated", "ops", "sum(rate(ostinato_engine_generated_tokens_total{ON}[RATE]))", about="Tokens a second."),
    number("Runs in flight", "none", "sum(ostinato_engine_runs_in_flight{ON})"),
    number(
        "Fingerprints connected",
        "none",
        "count(count by (fingerprint) (ostinato_engine_info{ON}))",
        (None, "green"),
        (2, "orange"),
        about="More than one gives more than one answer.",
    ),
    number("KV capacity", "none", 'sum(ostinato_engine_capacity{ON,of="kv_blocks"})'),
    rows("Fingerprints as the sidecars see them", "ostinato_engine_info{ON}", width=12),
    rows("Fingerprints as the services report them", "ostinato_service_fingerprint_info{ON}", width=12),
)
BOARD.row(
    "Work",
    lines(
        "Tokens",
        "ops",
        ("sum(rate(ostinato_engine_generated_tokens_total{ON}[RATE]))", "generated"),
        ("sum(rate(ostinato_engine_prompt_tokens_total{ON}[RATE]))", "of prompts"),
        ("sum(rate(ostinato_engine_cached_prompt_tokens_total{ON}[RATE]))", "of prompts, from the prefix cache"),
    ),
    lines(
        "Prefix cache",
        "percentunit",
        (
            "sum(rate(ostinato_engine_cached_prompt_tokens_total{ON}[RATE]))"
            " / sum(rate(ostinato_engine_prompt_tokens_total{ON}[RATE]))",
            "of prompt tokens",
        ),
        about="Share of prompt tokens that were not computed again.",
    ),
    lines(
        "Runs",
        "none",
        ("sum(ostinato_engine_runs_in_flight{ON})", "in flight"),
        ("sum(ostinato_engine_runs_queued{ON})", "queued"),
        ('sum(ostinato_engine_capacity{ON,of="runs"})', "at once limit"),
    ),
    lines("Ended", "ops", ("sum by (purpose, end) (rate(ostinato_engine_runs_total{ON}[RATE]))", "{{purpose}} {{end}}")),
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
        ("sum(ostinato_inflight_kv_blocks{ON})", "needed at worst"),
        ('sum(ostinato_engine_capacity{ON,of="kv_blocks"})', "held limit"),
    ),
)
BOARD.row(
    "TurboMind",
    lines("KV cache in use", "percentunit", ("ostinato_engine_kv_usage_ratio{ON}", "{{instance}}"), about=GPU),
    lines("Steps", "ops", ("rate(ostinato_engine_steps_total{ON}[RATE])", "{{instance}}"), about=GPU),
    lines(
        "Overrides",
        "ops",
        ("sum by (override) (rate(ostinato_engine_override_calls_total{ON}[RATE]))", "{{override}}"),
        ("sum(ostinato_engine_override_plans_total{ON})", "products planned"),
        ("sum(ostinato_engine_override_uncovered_total{ON})", "products uncovered"),
        ("sum(ostinato_engine_override_corrected_total{ON})", "resumes corrected"),
        ("sum(ostinato_engine_preemptions_total{ON})", "runs taken out"),
        about=f"Calls that an override served. What is uncovered or taken out must stay 0. {GPU}",
    ),
)
