"""`ostinato report`: how often outputs diverge, as text or as an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from ostinato import install_hint
from ostinato.cli import show
from ostinato.cli.session import FAILED, Session, usage, wrong
from ostinato.v1.sequencer_pb2 import Rate, ReportResponse, Stratum

COLUMNS = (
    *("kind", "grade", "replica", "fingerprint", "compared", "diverged"),
    *("rate", "interval", "per-token", "evidence", "alarm"),
)
WORST = 3
"""Sampling settings with the most divergence that are printed."""


async def report(
    session: Session,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts to this file; needs the extra `report`.", show_default=False)
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of the intervals, above 0 and below 1.")] = 0.95,
) -> int:
    """Shows how often outputs diverged. With confidence intervals, since when, and where; fails while an alarm is up."""
    if not 0 < confidence < 1:
        raise typer.BadParameter("--confidence: must be above 0 and below 1")
    if html is not None:
        try:
            import ostinato.cli.charts  # noqa: F401  # before the call
        except ModuleNotFoundError as error:
            raise wrong(f"--html: {error.name} is missing: {install_hint('report')}") from None
    async with session.client() as client:
        found = await client.report(confidence=confidence, timeout=session.timeout)
    if html is not None:
        with usage("--html"):
            html.write_text(page(found), "utf-8")
    session.print(found, lambda: _print(found))
    return FAILED if found.alarm else 0


def _print(found: ReportResponse) -> None:
    if found.strata:
        show.table(COLUMNS, map(_row, found.strata))
    else:
        show.line("nothing was compared yet")
    for each in found.strata:
        for detail in _details(each):
            show.line(f"{_name(each)}: {show.visible(detail)}")
    show.line(f"collisions: {found.collisions} of {found.collision_checks} checked")
    for reason in found.not_compared:
        show.line(f"not compared: {show.word(reason, 'kind')}, {show.visible(reason.reason)}: {reason.count}")
    show.line(f"intervals: {found.confidence:.4g} confidence; evidence of 100 raises the alarm; up to entry {found.index}")


def _row(given: Stratum) -> tuple[str, ...]:
    """COLUMNS of one stratum."""
    rate, token = given.per_comparison, given.per_token
    return (
        show.word(given, "kind"),
        show.word(given, "grade"),
        "other" if given.other_replica else "same",
        show.short(given.fingerprint_digest),
        str(rate.trials),
        str(rate.events),
        f"{rate.value:.3%}",
        _interval(rate),
        f"{token.value:.1e} ({token.lower:.1e} to {token.upper:.1e})",
        _evidence(given),
        f"UP since {show.moment(given.alarmed.time_unix_millis)}" if given.alarm else "",
    )


def _name(given: Stratum) -> str:
    """Such as `twin, exact, 0123456789ab`."""
    parts = [show.word(given, "kind"), show.word(given, "grade"), show.short(given.fingerprint_digest)]
    return ", ".join([*parts, "other replica"] if given.other_replica else parts)


def _interval(rate: Rate) -> str:
    return f"{rate.lower:.3%} to {rate.upper:.3%}"


def _evidence(given: Stratum) -> str:
    """As a number, or as a power of ten if that is very small or large."""
    return f"{10**given.evidence_log10:.3g}" if abs(given.evidence_log10) < 6 else f"1e{given.evidence_log10:+.0f}"


def _details(given: Stratum) -> Iterator[str]:
    if given.diverged:
        first, last = given.first_diverged, given.last_diverged
        yield (
            f"diverged first at {show.moment(first.time_unix_millis)} (entry {first.index}), "
            f"last at {show.moment(last.time_unix_millis)} (entry {last.index})"
        )
        recent = given.recent
        yield f"of the newest {recent.trials}: {recent.events} diverged, {_interval(recent)}"
        yield "first differing token: " + ", ".join(f"{show.span(each)}: {each.diverged}" for each in given.token_spans)
        yield "batch occupancy: " + ", ".join(f"{show.occupancy(each)}: {_share(each.rate)}" for each in given.companies)
        worst = [each for each in given.samplings if each.rate.events][:WORST]
        yield "worst sampled: " + "; ".join(f"{each.sampling or 'not said'}: {_share(each.rate)}" for each in worst)
    if given.alarmed.index and not given.alarm:
        yield f"the alarm was up, first at {show.moment(given.alarmed.time_unix_millis)}"
    if given.incomparable:
        fields = ", ".join(f"{field or 'others'} {count}" for field, count in sorted(given.drift.items()))
        yield f"incomparable {given.incomparable}: {fields}"


def _share(rate: Rate) -> str:
    return f"{rate.events} of {rate.trials}"


# The page: everything is in the file, without scripts. Only its charts need matplotlib.
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


def page(found: ReportResponse) -> str:
    """A report as HTML. Its charts are SVG, in figures with the ids `by-occupancy` and `by-time`."""
    verdict = "An alarm is up" if found.alarm else "No alarm"
    parts = [
        f"<h1>Divergence</h1><p>Log <code>{escape(found.log_id)}</code>, sidecar <code>{escape(found.writer)}</code>, "
        f"up to entry {found.index}. Intervals: {found.confidence:.4g} confidence.</p>",
        f'<div class="verdict {"alarm" if found.alarm else "calm"}">{verdict}</div>',
        _table("strata", COLUMNS, map(_row, found.strata)),
        *_charts({_name(each): each for each in found.strata if each.per_comparison.trials}, found.confidence),
        *_tables(found),
    ]
    head = f'<meta charset="utf-8"><title>Ostinato: divergence</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _charts(groups: Mapping[str, Stratum], confidence: float) -> Iterable[str]:
    """Each with its numbers below."""
    if not groups:
        return
    from ostinato.cli import charts

    interval = f"its {100 * confidence:.4g} % confidence interval (Wilson's)"
    text = f"Points: the share of comparisons that diverged. Whiskers: {interval}."
    about = f"Batch occupancy: how many runs the engine held. {text}"
    occupancy = [(n, show.occupancy(c), c.rate) for n, s in groups.items() for c in s.companies]
    times = [(n, show.moment(t.time_unix_millis), t.rate) for n, s in groups.items() for t in s.times]
    yield _figure("occupancy", "By batch occupancy", about, charts.svg(charts.by_occupancy, groups), occupancy)
    yield _figure("time", "Over time", text, charts.svg(charts.by_time, groups), times)


def _figure(by: str, title: str, text: str, svg: str, points: Iterable[tuple[str, str, Rate]]) -> str:
    rows = ((n, at, str(rate.events), str(rate.trials), f"{rate.value:.3%}", _interval(rate)) for n, at, rate in points)
    numbers = _table("", ("", by, "diverged", "compared", "rate", "interval"), rows)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    figure = f'<h2>{title}</h2><p>{text}</p><figure id="by-{by}" style="margin: 0">{svg}</figure>'
    return f"{figure}<details><summary>Numbers</summary>{numbers}</details>"


def _tables(found: ReportResponse) -> Iterable[str]:
    tokens = [(_name(s), show.span(each), str(each.diverged)) for s in found.strata for each in s.token_spans]
    worst = [
        (_name(stratum), each.sampling or "not said", str(each.rate.events), str(each.rate.trials), f"{each.rate.value:.3%}")
        for stratum in found.strata
        for each in stratum.samplings
        if each.rate.events
    ]
    drift = [(_name(s), field or "others", str(count)) for s in found.strata for field, count in sorted(s.drift.items())]
    fields = [
        (show.short(each.digest), field, value) for each in found.fingerprints for field, value in sorted(each.fields.items())
    ]
    others = [("collisions", f"{found.collisions} of {found.collision_checks} checked")]
    others += [(f"not compared: {show.word(each, 'kind')}, {each.reason}", str(each.count)) for each in found.not_compared]
    yield "<h2>First differing token</h2>" + _table("tokens", ("", "tokens", "diverged"), tokens)
    yield "<h2>Worst sampled</h2>" + _table("samplings", ("", "sampling", "diverged", "compared", "rate"), worst)
    yield "<h2>Drift</h2>" + _table("drift", ("", "what differed", "incomparable"), drift)
    yield "<h2>Beside</h2>" + _table("beside", ("", ""), others)
    yield "<h2>Fingerprints</h2>" + _table("fingerprints", ("fingerprint", "field", "value"), fields)


def _table(key: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    listed = list(rows)
    if not listed:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in each) + "</tr>" for each in listed)
    identity = f' id="{key}"' if key else ""
    return f'<div class="scroll"><table{identity}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
