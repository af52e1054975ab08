"""`python -m tests.demo.divergence`: a setting that diverges under load, seen by the sidecar, and the default one right after.

All of it is in one journal. The service starts with a 16-bit KV cache, answers the same seeded prompts with more and more of
them at once, and is audited. Then it starts with its defaults, answers the prompts again, and is audited again. The audits come
after the prompts, or they would run beside them: a sidecar restarted with `--audit-rate 1` audits all that was not audited yet.
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
from ostinato.replay import bounded_gather
from ostinato.requests import Sampling
from ostinato.v1 import sequencer_pb2, types_pb2

from service.grade import TEXT
from tests.demo.show import STATE
from tests.pair import ROOT, Pair

NOT_INVARIANT = ("--kv", "f16", "--ubatch", "512")
"""With keys and values of 16 bits llama.cpp sums in another order where other runs make it cut a prompt in other pieces."""
AT_ONCE = (1, 2, 8)
PROMPT_CHARACTERS, NEW_TOKENS = 400, 32
START_SECONDS = 400.0
SHOWN = 2
"""Divergences side by side."""


@dataclass(frozen=True)
class Setting:
    """The answers and the report under one setting of the service."""

    name: str
    model: types_pb2.Model
    first: Sequence[types_pb2.Result]
    later: Sequence[types_pb2.Result]
    report: sequencer_pb2.ReportResponse

    @property
    def twins(self) -> sequencer_pb2.Stratum:
        """Of its fingerprint and grade: what was held against another setting has the lower grade of both."""
        return self._stratum(types_pb2.COMPARISON_KIND_TWIN)

    @property
    def audits(self) -> sequencer_pb2.Stratum:
        """Likewise."""
        return self._stratum(types_pb2.COMPARISON_KIND_AUDIT)

    def _stratum(self, kind: types_pb2.ComparisonKind.ValueType) -> sequencer_pb2.Stratum:
        for stratum in self.report.strata:
            ours = stratum.fingerprint_digest == self.model.fingerprint.digest
            if ours and stratum.kind == kind and stratum.grade == self.model.grade:
                return stratum
        return sequencer_pb2.Stratum()

    @property
    def others(self) -> list[types_pb2.Result]:
        """Answers unlike the first one to their prompt, as the caller sees it."""
        first = {result.output.seed: result.receipt.header.output_digest for result in self.first}
        return [result for result in self.later if result.receipt.header.output_digest != first[result.output.seed]]


def main() -> int:
    """0: everything was as it is said to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.divergence")
    parser.add_argument("--prompts", type=int, default=8, help="different ones")
    parser.add_argument("--rounds", type=int, default=1, help="with each number of them at once")
    parser.add_argument("--chart", type=Path, default=ROOT / ".run" / "divergence.svg", help="file to draw to")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    with Pair(engine="llama", state=STATE) as pair:
        pair.start_service(*NOT_INVARIANT)
        kept = asyncio.run(show(pair, console, args.prompts, args.rounds, args.chart))
        pair.stop()
    return 0 if kept else 1


async def show(pair: Pair, console: Console, prompts: int, rounds: int, chart: Path) -> bool:
    """Whether every promise was kept."""
    loose = await run(pair, console, "f16 keys and values", prompts, rounds)
    again = await replayed_alone(pair, console, loose)
    await asyncio.to_thread(pair.stop)
    pair.start_service()
    default = await run(pair, console, "default", prompts, rounds)
    chart.parent.mkdir(parents=True, exist_ok=True)
    draw(chart, [(each.name, each.twins) for each in (loose, default)])
    console.print(table(loose, default))
    console.print(f"drawn to {chart}")
    promises = {
        "f16: the self-test found it out: best effort": loose.model.grade == types_pb2.GRADE_BEST_EFFORT,
        "f16: answers changed under load": bool(loose.others),
        "f16: the sidecar counted what the caller saw": loose.twins.diverged == len(loose.others),
        "f16: the alarm went up": loose.twins.alarm,
        "f16: audits find it too, without a prompt that comes twice": loose.audits.diverged > 0,
        "f16: run again alone, what had changed is the first answer again": again,
        "default: exact": default.model.grade == types_pb2.GRADE_EXACT,
        "default: nothing changed, and no alarm": not (default.others or default.twins.diverged or default.twins.alarm),
        "default: all audits match": default.audits.matched == len(default.first) + len(default.later),
        "from one to the other: drift, named": set(drift(default)) == {"fingerprint.kv"},
    }
    for promise, kept in promises.items():
        console.print(f"  [green]✓[/] {promise}" if kept else f"  [red]✗ {promise}[/]")
    return all(promises.values())


async def run(pair: Pair, console: Console, name: str, prompts: int, rounds: int) -> Setting:
    """Each prompt alone, then with more and more at once, then all that was answered once more."""
    with console.status(f"{name}: starting, with a self-test"):
        await sidecar(pair)
    async with ostinato.Client(pair.target) as client:
        model = await client.model()
        grade = types_pb2.Grade.Name(model.grade).removeprefix("GRADE_")
        console.print(f"\n[bold]{name}[/]: {grade}: {model.grade_reason}")
        setting = Setting(name, model, await traffic(client, prompts, 1), (), sequencer_pb2.ReportResponse())
        for at_once in AT_ONCE:
            with console.status(f"{name}: {at_once} at once"):
                made = [result for _ in range(rounds) for result in await traffic(client, prompts, at_once)]
            setting = replace(setting, later=[*setting.later, *made], report=await client.report())
            twins = setting.twins
            console.print(
                f"  {at_once} at once: {len(setting.others)} of {len(setting.later)} so far are unlike the first answer;"
                f" evidence 10^{twins.evidence_log10:.1f}{', [red]alarm[/]' if twins.alarm else ''}"
            )
    with console.status(f"{name}: audits"):
        setting = await audited(pair, setting)
    audits = setting.audits
    console.print(f"  audits: {audits.diverged} of {audits.matched + audits.diverged} are unlike the recorded answer")
    return setting


async def audited(pair: Pair, setting: Setting) -> Setting:
    """With a report behind the audits of all that was answered."""
    await sidecar(pair, "--audit-rate", "1", "--audit-patience-seconds", "0")
    wanted = len(setting.first) + len(setting.later)
    async with asyncio.timeout(START_SECONDS), ostinato.Client(pair.target) as client:
        while setting.audits.matched + setting.audits.diverged < wanted:
            await asyncio.sleep(0.2)
            setting = replace(setting, report=await client.report())
    return setting


async def sidecar(pair: Pair, *flags: str) -> None:
    """Started, or started again on the same journal, and connected."""
    if len(pair.programs) > 1:
        await asyncio.to_thread(pair.sidecar.stop)
    started = await asyncio.to_thread(pair.start_sidecar, *flags)
    await asyncio.to_thread(started.wait_for, "engine connected", START_SECONDS)


async def traffic(client: ostinato.Client, prompts: int, at_once: int) -> list[types_pb2.Result]:
    """Every prompt once."""

    async def ask(number: int) -> types_pb2.Result:
        prompt = TEXT[13 * number : 13 * number + PROMPT_CHARACTERS]
        parameters = Sampling(seed=number, temperature=0.8, top_k=40, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
        return (await client.generate(prompt, **parameters)).results[0]

    async def asked() -> AsyncIterator[Coroutine[Any, Any, types_pb2.Result]]:
        for number in range(prompts):
            yield ask(number)

    return [result async for result in bounded_gather(asked(), at_once)]


async def replayed_alone(pair: Pair, console: Console, setting: Setting) -> bool:
    """Some of what changed, run once more with nothing beside it and shown: whether it is the first answer again."""
    first = {result.output.seed: result.receipt.header.output_digest for result in setting.first}
    same = []
    async with ostinato.Client(pair.target) as client:
        for result in setting.others[:SHOWN]:
            async for response in client.replay(result.sequence, alone=True):
                title = headline(response.comparison)
                console.print(f"\n{title}, which {setting.name} made in company, and now alone")
                side_by_side(response)
                same.append(response.comparison.actual_output_digest == first[result.output.seed])
    return bool(same) and all(same)


def drift(setting: Setting) -> list[str]:
    """In what the first answers under this setting were found to differ from those of the one before."""
    ours = [each for each in setting.report.strata if each.fingerprint_digest == setting.model.fingerprint.digest]
    return [name for stratum in ours for name in stratum.drift]


def table(*settings: Setting) -> Table:
    """What the report says of each setting: of twins by company, and of audits."""
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
    """The share that diverged by batch occupancy, for each named setting; SVG, the same bytes for the same numbers."""
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
