"""`ostinato report`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ostinato.cli import show
from ostinato.cli.session import Session
from ostinato.v1.sequencer_pb2 import CompanyShare, Rate, ReportResponse, Stratum, TokenSpan

COLUMNS = (
    *("kind", "grade", "replica", "fingerprint", "compared", "diverged"),
    *("rate", "interval", "per-token", "evidence", "alarm"),
)
WORST = 3
"""Of the ways to sample that are shown for people."""

Html = Annotated[
    Path | None,
    typer.Option("--html", help="Write a page with charts to this file; needs ostinato[report].", show_default=False),
]
Confidence = Annotated[float, typer.Option(help="Of the intervals, above 0 and below 1.")]


async def report(session: Session, html: Html = None, confidence: Confidence = 0.95) -> bool:
    """Shows how often answers diverged, how sure that is, since when, and where; fails while an alarm is up."""
    if not 0 < confidence < 1:
        raise typer.BadParameter("--confidence: must be above 0 and below 1")
    if html is not None:
        _require_page()
    async with session.client() as client:
        found = await client.report(confidence=confidence, timeout=session.timeout)
    if html is not None:
        _write(html, found)
    if session.json:
        show.as_json(found)
    else:
        _print(found)
    return not found.alarm


def _require_page() -> None:
    """Before the sidecar is asked."""
    try:
        import ostinato.cli.page  # noqa: F401
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"--html: {error.name} is missing: pip install 'ostinato[report]'") from None


def _write(html: Path, found: ReportResponse) -> None:
    from ostinato.cli import page

    try:
        html.write_text(page.page(found), "utf-8")
    except OSError as error:
        raise typer.BadParameter(f"--html: {error}") from None


def _print(found: ReportResponse) -> None:
    if found.strata:
        show.table(COLUMNS, map(row, found.strata))
    else:
        show.line("nothing was compared yet")
    for each in found.strata:
        for said in _details(each):
            show.line(f"{name(each)}: {show.visible(said)}")
    show.line(f"collisions: {found.collisions} of {found.collision_checks} checked")
    for lost in found.not_compared:
        show.line(f"not compared: {show.word(lost, 'kind')}, {show.visible(lost.reason)}: {lost.count}")
    show.line(f"intervals: {found.confidence:.4g} confidence; evidence of 100 raises the alarm; up to entry {found.index}")


def row(given: Stratum) -> tuple[str, ...]:
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
        interval(rate),
        f"{token.value:.1e} ({token.lower:.1e} to {token.upper:.1e})",
        evidence(given),
        f"UP since {show.moment(given.alarmed.time_unix_millis)}" if given.alarm else "",
    )


def name(given: Stratum) -> str:
    """What tells it from others, for people: `twin, exact, 0123456789ab`."""
    parts = [show.word(given, "kind"), show.word(given, "grade"), show.short(given.fingerprint_digest)]
    return ", ".join([*parts, "other replica"] if given.other_replica else parts)


def interval(rate: Rate) -> str:
    return f"{rate.lower:.3%} to {rate.upper:.3%}"


def evidence(given: Stratum) -> str:
    """As a number where that says something, else as a power of ten."""
    return f"{10**given.evidence_log10:.3g}" if abs(given.evidence_log10) < 6 else f"1e{given.evidence_log10:+.0f}"


def _details(given: Stratum) -> Iterator[str]:
    """Of what diverged or could not be compared."""
    if given.diverged:
        first, last = given.first_diverged, given.last_diverged
        yield (
            f"diverged first at {show.moment(first.time_unix_millis)} (entry {first.index}), "
            f"last at {show.moment(last.time_unix_millis)} (entry {last.index})"
        )
        recent = given.recent
        yield f"of the newest {recent.trials}: {recent.events} diverged, {interval(recent)}"
        parting = (f"{span(each)}: {each.diverged}" for each in given.token_spans)
        yield "first differing token: " + ", ".join(parting)
        yield "batch occupancy: " + ", ".join(f"{occupancy(each)}: {_share(each.rate)}" for each in given.companies)
        worst = [each for each in given.samplings if each.rate.events][:WORST]
        yield "worst sampled: " + "; ".join(f"{each.sampling or 'not said'}: {_share(each.rate)}" for each in worst)
    if given.alarmed.index and not given.alarm:
        yield f"the alarm was up, first at {show.moment(given.alarmed.time_unix_millis)}"
    if given.incomparable:
        fields = ", ".join(f"{field or 'others'} {count}" for field, count in sorted(given.drift.items()))
        yield f"incomparable {given.incomparable}: {fields}"


def span(given: TokenSpan | CompanyShare) -> str:
    """`4` or `4-7`."""
    return str(given.first) if given.first == given.last else f"{given.first}-{given.last}"


def occupancy(given: CompanyShare) -> str:
    """Runs that the engine held: `1 run`, `4-7 runs`; `not known` where the comparison has no record of it."""
    return span(given) + (" run" if given.last == 1 else " runs") if given.last else "not known"


def _share(rate: Rate) -> str:
    return f"{rate.events} of {rate.trials}"
