"""A report as one page: everything in it, nothing fetched. Needs plotly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

import plotly.graph_objects as go

from ostinato.cli import show
from ostinato.cli.report import COLUMNS, company, name, row, span
from ostinato.v1.sequencer_pb2 import Rate, ReportResponse, Stratum

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 84rem; margin: 2.5rem auto }
body { padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem } p { margin: .3rem 0; color: #56616f }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e8ed; white-space: nowrap }
th { font-weight: 600; color: #56616f } code { font-size: .9em }
.verdict { display: inline-block; margin: .8rem 0; padding: .35rem .9rem; border-radius: 999px; font-weight: 600 }
.calm { background: #e2f4ea; color: #14653a } .alarm { background: #fde4e1; color: #9c1c0e }
"""
COLOURS = ("#2f6fde", "#d9822b", "#2a9d72", "#8e5bd0", "#c23b5a", "#3a8fa3", "#7a7f35", "#5a6675")
CHART = {"displaylogo": False, "responsive": True}


def page(found: ReportResponse) -> str:
    """HTML. Its charts are plotly's, by the ids `by-company`, `by-token` and `by-time`."""
    verdict = "An alarm is up" if found.alarm else "No alarm"
    parts = [
        f"<h1>Divergence</h1><p>Log <code>{escape(found.log_id)}</code>, sidecar <code>{escape(found.writer)}</code>, "
        f"up to entry {found.index}. Intervals: {found.confidence:.4g} confidence.</p>",
        f'<div class="verdict {"alarm" if found.alarm else "calm"}">{verdict}</div>',
        _table("strata", COLUMNS, map(row, found.strata)),
        *_charts([stratum for stratum in found.strata if stratum.per_comparison.trials]),
        *_tables(found),
    ]
    head = f'<meta charset="utf-8"><title>Ostinato: divergence</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _charts(strata: Sequence[Stratum]) -> Iterable[str]:
    """Three, the first of which brings the library."""
    by_company = _rates([(each, [company(c) for c in each.companies], [c.rate for c in each.companies]) for each in strata])
    by_company.update_xaxes(title="runs that the engine held", type="category")
    by_token = _figure("diverged", ",.2%")
    for number, each in enumerate(strata):
        rows = each.token_spans
        by_token.add_scatter(
            x=[r.first for r in rows],
            y=[1 - r.equal_before for r in rows],
            customdata=[[span(r), r.diverged, r.at_risk] for r in rows],
            hovertemplate="tokens %{customdata[0]}: %{customdata[1]} of %{customdata[2]} part here<br>before: %{y}",
            name=name(each),
            line={"shape": "hv", "color": _colour(number)},
        )
    by_token.update_xaxes(title="tokens")
    by_time = _rates(
        [(each, [_moment(t.time_unix_millis) for t in each.times], [t.rate for t in each.times]) for each in strata]
    )
    by_time.update_xaxes(title="time (UTC)", type="date")
    yield _chart("by-company", "By company", "Share that diverged, with its interval.", by_company, library=True)
    yield _chart(
        "by-token", "By first differing token", "Estimated share of answers that have parted before this token.", by_token
    )
    yield _chart("by-time", "Over time", "Share that diverged, with its interval.", by_time)


def _rates(given: Sequence[tuple[Stratum, Sequence[str], Sequence[Rate]]]) -> go.Figure:
    """Rates with their intervals, a colour for each stratum."""
    figure = _figure("diverged", ",.2%")
    for number, (stratum, x, rates) in enumerate(given):
        figure.add_scatter(
            x=x,
            y=[rate.value for rate in rates],
            error_y={
                "type": "data",
                "array": [rate.upper - rate.value for rate in rates],
                "arrayminus": [rate.value - rate.lower for rate in rates],
                "thickness": 1.2,
            },
            customdata=[[rate.events, rate.trials] for rate in rates],
            hovertemplate="%{customdata[0]} of %{customdata[1]} diverged: %{y}",
            mode="markers",
            cliponaxis=False,
            marker={"size": 9, "color": _colour(number)},
            name=name(stratum),
        )
    return figure


def _figure(title: str, form: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=360,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        yaxis={"title": title, "tickformat": form, "rangemode": "tozero"},
        legend={"orientation": "h", "y": -0.25},
        showlegend=True,
        scattermode="group",
    )
    return figure


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _chart(key: str, title: str, text: str, figure: go.Figure, *, library: bool = False) -> str:
    made: str = figure.to_html(full_html=False, include_plotlyjs=library, div_id=key, config=CHART)
    return f"<h2>{title}</h2><p>{text}</p>{made}"


def _tables(found: ReportResponse) -> Iterable[str]:
    worst = [(name(s), w.sampling or "not said", w.rate) for s in found.strata for w in s.samplings if w.rate.events]
    drift = [(name(s), field or "others", str(count)) for s in found.strata for field, count in sorted(s.drift.items())]
    fields = [
        (show.short(each.digest), field, value) for each in found.fingerprints for field, value in sorted(each.fields.items())
    ]
    beside = [("collisions", f"{found.collisions} of {found.collision_checks} checked")]
    beside += [(f"not compared: {show.word(each, 'kind')}, {each.reason}", str(each.count)) for each in found.not_compared]
    worst_rows = [(who, sampling, str(rate.events), str(rate.trials), f"{rate.value:.3%}") for who, sampling, rate in worst]
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
    return f'<div class="scroll"><table id="{key}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _moment(unix_millis: int) -> str:
    return datetime.fromtimestamp(unix_millis / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
