"""Whether equal inputs get equal outputs, how sure that is, and where they part."""

from __future__ import annotations

from k8s.monitoring.board import Board, bars, limit, lines, number

BOARD = Board("divergence", "Comparisons by kind and grade, with their bounds; evidence; drift; what was not compared.")
PROMISED = 'grade=~"exact|serial"'

BOARD.row(
    "Verdict",
    number(
        "Alarm",
        "none",
        "max(ostinato_divergence_alarm{ON})",
        names={"0": ("none", "green"), "1": ("ALARM", "red")},
        about="1 while the evidence that more than 1 comparison in 1,000 diverges is 100 or more.",
    ),
    number(
        "Broken promises, a day",
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
        about="Of all that was compared.",
    ),
    number(
        "Per token, a day",
        "sci",
        "max(kind_grade:ostinato_divergence_per_token:ratio1d{JOB})",
        about="Divergence per compared token, of the worst kind and grade.",
    ),
    number(
        "Seeds that collide, a day", "none", "sum(increase(ostinato_collisions_total{ON}[1d]))", (None, "green"), (0.5, "red")
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
        about="The same, counted together.",
        width=12,
    ),
)
BOARD.row(
    "Evidence",
    limit(
        lines(
            "Evidence, logarithm",
            "none",
            ("ostinato_divergence_evidence_log10{ON}", "{{kind}} {{grade}}"),
            about="That more than 1 comparison in 1,000 diverges. At 2 it is an alarm; it may be watched all the time.",
        ).min(-3),
        2,
    ),
    bars(
        "First differing token",
        "none",
        "sum by (le) (ostinato_first_difference_token_bucket{ON})",
        "{{le}}",
        about="How many diverged at an index up to this one and above the one before.",
    ),
    lines(
        "Comparisons", "ops", ("sum by (kind, verdict) (rate(ostinato_comparisons_total{ON}[RATE]))", "{{kind}} {{verdict}}")
    ),
    lines(
        "Tokens compared",
        "ops",
        ("sum by (kind, grade) (rate(ostinato_compared_tokens_total{ON}[RATE]))", "{{kind}} {{grade}}"),
    ),
    lines(
        "Unseeded answers",
        "ops",
        ("sum(rate(ostinato_collision_checks_total{ON}[RATE]))", "compared with another seed's"),
        ("sum(rate(ostinato_collisions_total{ON}[RATE]))", "equal to one"),
        about="A collision is two seeds with one answer.",
    ),
    lines(
        "Not compared",
        "ops",
        ("sum by (kind, reason) (rate(ostinato_not_compared_total{ON}[RATE]))", "{{kind}} {{reason}}"),
        about="Second runs that were due and brought no verdict.",
    ),
)
BOARD.row(
    "Change",
    lines(
        "Drift",
        "none",
        ("sum by (kind, field) (ostinato_drift_total{ON})", "{{kind}} {{field}}"),
        about="What could not be compared, by what differed.",
        steps=True,
    ),
    lines(
        "Behind the callers",
        "none",
        ("sum(ostinato_audit_backlog_items{ON})", "audits that wait"),
    ),
)
