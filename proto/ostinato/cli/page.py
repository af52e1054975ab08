"""A report as one HTML page: everything in it, no script, nothing fetched. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ostinato.cli import charts, show
from ostinato.cli.report import COLUMNS, interval, name, occupancy, row, span
from ostinato.v1.sequencer_pb2 import Rate, ReportResponse, Stratum

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 84rem; margin: 2.5rem auto }
body { padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem } p { margin: .3rem 0; color: #56616f }
.scroll { overflow-x: auto } svg { max-width: 100%; height: auto } summary { color: #56616f; cursor: pointer }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e8ed; white-space: nowrap }
th { font-weight: 600; color: #56616f } code { font-size: .9em }
.verdict { display: inline-block; margin: .8rem 0; padding: .35rem .9rem; border-radius: 999px; font-weight: 600 }
.calm { background: #e2f4ea; color: #14653a } .alarm { background: #fde4e1; color: #9c1c0e }
"""
# Letters are drawn as paths, so that a chart looks the same where its font is not installed.
LOOK: Any = {"svg.fonttype": "path", "svg.hashsalt": "ostinato", "font.family": "sans-serif", "font.size": 9}
INCHES = (10.0, 3.4)


def page(found: ReportResponse) -> str:
    """HTML. Its charts are SVG, in figures with the ids `by-occupancy` and `by-time`."""
    verdict = "An alarm is up" if found.alarm else "No alarm"
    parts = [
        f"<h1>Divergence</h1><p>Log <code>{escape(found.log_id)}</code>, sidecar <code>{escape(found.writer)}</code>, "
        f"up to entry {found.index}. Intervals: {found.confidence:.4g} confidence.</p>",
        f'<div class="verdict {"alarm" if found.alarm else "calm"}">{verdict}</div>',
        _table("strata", COLUMNS, map(row, found.strata)),
        *_charts({name(each): each for each in found.strata if each.per_comparison.trials}, found.confidence),
        *_tables(found),
    ]
    head = f'<meta charset="utf-8"><title>Ostinato: divergence</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _charts(groups: Mapping[str, Stratum], confidence: float) -> Iterable[str]:
    """Two, each with its numbers below."""
    if not groups:
        return
    interval_of = f"its {100 * confidence:.4g} % confidence interval (Wilson's)"
    whiskers = f"Points: the share of comparisons that diverged. Whiskers: {interval_of}."
    rates = ("", "occupancy", "diverged", "compared", "rate", "interval")
    said = f"How many runs the engine held. {whiskers}"
    yield _chart("by-occupancy", "By batch occupancy", said, charts.by_occupancy, groups)
    yield _numbers(rates, ((n, occupancy(c), *_rate(c.rate)) for n, s in groups.items() for c in s.companies))
    yield _chart("by-time", "Over time", whiskers, charts.by_time, groups)
    yield _numbers(
        ("", "time", *rates[2:]),
        ((n, show.moment(t.time_unix_millis), *_rate(t.rate)) for n, s in groups.items() for t in s.times),
    )


def _rate(rate: Rate) -> tuple[str, ...]:
    return str(rate.events), str(rate.trials), f"{rate.value:.3%}", interval(rate)


def _chart(
    key: str, title: str, text: str, draw: Callable[[Axes, Mapping[str, Stratum]], None], groups: Mapping[str, Stratum]
) -> str:
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=INCHES, layout="constrained")
        draw(figure.subplots(), groups)
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)", "", written.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f'<h2>{title}</h2><p>{text}</p><figure id="{key}" style="margin: 0">{svg}</figure>'


def _numbers(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"<details><summary>Numbers</summary>{_table('', columns, rows)}</details>"


def _tables(found: ReportResponse) -> Iterable[str]:
    parted = [(name(s), span(each), str(each.diverged)) for s in found.strata for each in s.token_spans]
    worst = [(name(s), w.sampling or "not said", w.rate) for s in found.strata for w in s.samplings if w.rate.events]
    drift = [(name(s), field or "others", str(count)) for s in found.strata for field, count in sorted(s.drift.items())]
    fields = [
        (show.short(each.digest), field, value) for each in found.fingerprints for field, value in sorted(each.fields.items())
    ]
    beside = [("collisions", f"{found.collisions} of {found.collision_checks} checked")]
    beside += [(f"not compared: {show.word(each, 'kind')}, {each.reason}", str(each.count)) for each in found.not_compared]
    worst_rows = [(who, sampling, str(rate.events), str(rate.trials), f"{rate.value:.3%}") for who, sampling, rate in worst]
    yield "<h2>First differing token</h2>" + _table("tokens", ("", "tokens", "diverged"), parted)
    yield "<h2>Worst sampled</h2>" + _table("samplings", ("", "sampling", "diverged", "compared", "rate"), worst_rows)
    yield "<h2>Drift</h2>" + _table("drift", ("", "what differed", "incomparable"), drift)
    yield "<h2>Beside</h2>" + _table("beside", ("", ""), beside)
    yield "<h2>Fingerprints</h2>" + _table("fingerprints", ("fingerprint", "field", "value"), fields)


def _table(key: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    listed = list(rows)
    if not listed:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in each) + "</tr>" for each in listed)
    identity = f' id="{key}"' if key else ""
    return f'<div class="scroll"><table{identity}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
