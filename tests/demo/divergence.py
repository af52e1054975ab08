"""`python -m tests.demo.divergence`: a setting that diverges under load, as the sidecar reports it, and then the default.

The service runs with a 16-bit KV cache and gets the same seeded prompts at increasing concurrency. Then a sidecar that restarts
with `--audit-rate 1` audits all items: during the load audits would change the batch occupancy. The same follows with the
service's defaults, on the same journal.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ostinato
from ostinato.cli import charts
from ostinato.cli.show import headline, side_by_side
from ostinato.digest import output_digest
from ostinato.replay import bounded_gather
from ostinato.requests import Sampling
from ostinato.v1 import sequencer_pb2, types_pb2

from service.cases import TEXT
from tests.demo.show import STATE
from tests.pair import ROOT, Pair

NOT_INVARIANT = ("--kv", "f16", "--ubatch", "512")
"""With 16-bit keys and values, sums depend on how llama.cpp cuts a prompt, which depends on the batch."""
AT_ONCE = (1, 2, 8)
PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 8, 400, 32
START_SECONDS = 400.0
SHOWN = 2
"""Divergences that are shown side by side."""


@dataclass(frozen=True)
class Setting:
    """The results under one setting of the service."""

    name: str
    model: types_pb2.Model
    first: Sequence[types_pb2.Result]
    later: Sequence[types_pb2.Result]
    report: sequencer_pb2.ReportResponse

    @property
    def twins(self) -> sequencer_pb2.Stratum:
        """Twins with its fingerprint and grade. (Comparisons with another setting have the lower grade of both.)"""
        return self._stratum(types_pb2.COMPARISON_KIND_TWIN)

    @property
    def audits(self) -> sequencer_pb2.Stratum:
        return self._stratum(types_pb2.COMPARISON_KIND_AUDIT)

    def _stratum(self, kind: types_pb2.ComparisonKind.ValueType) -> sequencer_pb2.Stratum:
        for stratum in self.report.strata:
            ours = stratum.fingerprint_digest == self.model.fingerprint.digest
            if ours and stratum.kind == kind and stratum.grade == self.model.grade:
                return stratum
        return sequencer_pb2.Stratum()

    @property
    def others(self) -> list[types_pb2.Result]:
        """Answers that differ from the first one to their prompt, from the caller's view."""
        first = {result.output.seed: output_digest(result.output) for result in self.first}
        return [result for result in self.later if output_digest(result.output) != first[result.output.seed]]


def main() -> int:
    """0 if every check below has passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.divergence")
    parser.add_argument("--chart", type=Path, default=ROOT / ".run" / "divergence.svg", help="file to draw to")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    with Pair(engine="llama", state=STATE) as pair:
        pair.start_service(*NOT_INVARIANT)
        kept = asyncio.run(show(pair, console, args.chart))
        pair.stop()
    return 0 if kept else 1


async def show(pair: Pair, console: Console, chart: Path) -> bool:
    """Whether every check has passed."""
    f16 = await run(pair, console, "f16 keys and values")
    again = await replayed_alone(pair, console, f16)
    await asyncio.to_thread(pair.stop)
    pair.start_service()
    default = await run(pair, console, "default")
    chart.parent.mkdir(parents=True, exist_ok=True)
    draw(chart, [(each.name, each.twins) for each in (f16, default)])
    console.print(table(f16, default))
    console.print(f"drawn to {chart}")
    checks = {
        "f16: the self-test gives grade BEST_EFFORT": f16.model.grade == types_pb2.GRADE_BEST_EFFORT,
        "f16: answers differ under load": bool(f16.others),
        "f16: the sidecar has counted the divergences that the caller saw": f16.twins.diverged == len(f16.others),
        "f16: the alarm is up": f16.twins.alarm,
        "f16: audits find it too, without a repeated prompt": f16.audits.diverged > 0,
        "f16: an exclusive replay gives the first answer again": again,
        "default: the self-test gives grade EXACT": default.model.grade == types_pb2.GRADE_EXACT,
        "default: no answer differs, and no alarm": not (default.others or default.twins.diverged or default.twins.alarm),
        "default: all audits match": default.audits.matched == len(default.first) + len(default.later),
        "the drift between both is named": set(drift(default)) == {"fingerprint.kv", "fingerprint.prefix_cache"},
    }
    for check, passed in checks.items():
        console.print(f"  [green]✓[/] {check}" if passed else f"  [red]✗ {check}[/]")
    return all(checks.values())


async def run(pair: Pair, console: Console, name: str) -> Setting:
    """Run the prompts at increasing concurrency, then audit all items."""
    with console.status(f"{name}: starting, with a self-test"):
        await sidecar(pair)
    async with ostinato.Client(pair.target) as client:
        model = await client.model()
        grade = types_pb2.Grade.Name(model.grade).removeprefix("GRADE_")
        console.print(f"\n[bold]{name}[/]: {grade}: {model.grade_reason}")
        setting = Setting(name, model, await traffic(client, 1), (), sequencer_pb2.ReportResponse())
        for at_once in AT_ONCE:
            with console.status(f"{name}: {at_once} at once"):
                made = await traffic(client, at_once)
            setting = replace(setting, later=[*setting.later, *made], report=await client.report())
            twins = setting.twins
            console.print(
                f"  {at_once} at once: {len(setting.others)} of {len(setting.later)} so far differ from the first answer;"
                f" evidence 10^{twins.evidence_log10:.1f}{', [red]alarm[/]' if twins.alarm else ''}"
            )
    with console.status(f"{name}: audits"):
        setting = await audited(pair, setting)
    audits = setting.audits
    console.print(f"  audits: {audits.diverged} of {audits.matched + audits.diverged} differ from the recorded answer")
    return setting


async def audited(pair: Pair, setting: Setting) -> Setting:
    """The setting with a report after the audits of all items."""
    await sidecar(pair, "--audit-rate", "1", "--audit-patience-seconds", "0")
    wanted = len(setting.first) + len(setting.later)
    async with asyncio.timeout(START_SECONDS), ostinato.Client(pair.target) as client:
        while setting.audits.matched + setting.audits.diverged < wanted:
            await asyncio.sleep(0.2)
            setting = replace(setting, report=await client.report())
    return setting


async def sidecar(pair: Pair, *flags: str) -> None:
    """Start or restart the sidecar on the same journal, and wait for the engine."""
    if len(pair.programs) > 1:
        await asyncio.to_thread(pair.sidecar.stop)
    started = await asyncio.to_thread(pair.start_sidecar, *flags)
    await asyncio.to_thread(started.wait_for, "engine connected", START_SECONDS)


async def traffic(client: ostinato.Client, at_once: int) -> list[types_pb2.Result]:
    """Run every prompt once."""

    async def ask(number: int) -> types_pb2.Result:
        prompt = TEXT[13 * number : 13 * number + PROMPT_CHARACTERS]
        parameters = Sampling(seed=number, temperature=0.8, top_k=40, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
        return (await client.generate(prompt, **parameters)).results[0]

    async def asked() -> AsyncIterator[Coroutine[Any, Any, types_pb2.Result]]:
        for number in range(PROMPTS):
            yield ask(number)

    return [result async for result in bounded_gather(asked(), at_once)]


async def replayed_alone(pair: Pair, console: Console, setting: Setting) -> bool:
    """Replay some diverged items exclusively, and show them. Whether they give the first answer again."""
    first = {result.output.seed: output_digest(result.output) for result in setting.first}
    same = []
    async with ostinato.Client(pair.target) as client:
        for result in setting.others[:SHOWN]:
            async for response in client.replay(result.sequence, alone=True):
                title = headline(response.comparison)
                console.print(f"\n{title}, with {setting.name}, beside other runs and alone")
                side_by_side(response)
                same.append(response.comparison.actual_output_digest == first[result.output.seed])
    return bool(same) and all(same)


def drift(setting: Setting) -> list[str]:
    """The fields that drifted from the previous setting."""
    ours = [each for each in setting.report.strata if each.fingerprint_digest == setting.model.fingerprint.digest]
    return [name for stratum in ours for name in stratum.drift]


def table(*settings: Setting) -> Table:
    """The report of each setting: twins by batch occupancy, and audits."""
    made = Table(title="\nWhat the sidecar reports of twins, and of audits", title_justify="left", title_style="bold")
    for name in ("setting", "runs in the engine", "diverged", "of", "share", "95 % bounds"):
        made.add_column(name, justify="left" if name == "setting" else "right")
    for setting in settings:
        for company in setting.twins.companies:
            span = f"{company.first}" if company.first == company.last else f"{company.first} to {company.last}"
            made.add_row(setting.name, span, *rate(company.rate))
        made.add_row(setting.name, "all", *rate(setting.twins.per_comparison))
        made.add_row(setting.name, "per token", *rate(setting.twins.per_token))
        made.add_row(setting.name, "audits", *rate(setting.audits.per_comparison))
        made.add_section()
    return made


def draw(path: Path, settings: Sequence[tuple[str, sequencer_pb2.Stratum]]) -> None:
    """Write an SVG with the share that diverged by batch occupancy. Equal numbers give equal bytes."""
    groups = {f"{name}: {each.diverged} of {each.matched + each.diverged} diverged": each for name, each in settings}
    with mpl.rc_context(charts.LOOK):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        charts.by_occupancy(axes, groups)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def rate(given: sequencer_pb2.Rate) -> tuple[str, ...]:
    bounds = f"{given.lower:.2%} to {given.upper:.2%}"
    return str(given.events), str(given.trials), f"{given.value:.2%}", bounds


if __name__ == "__main__":
    sys.exit(main())
