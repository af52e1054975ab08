"""`python -m tests.gpu.splits MODEL`: what it costs to cut a decode's attention into more parts, beside LMDeploy's pipeline.

`--attention-splits` is one number for all contexts and batches, or it would know a run's company. More parts serve a long
context alone, fewer a large batch.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.gpu import speed
from tests.gpu.compare import introduce
from tests.gpu.plan import Plan, numbers, say
from tests.gpu.stack import running


async def measure(plan: Plan, splits: tuple[int, ...]) -> Mapping[str, Mapping[str, float]]:
    """Tokens per second by number of parts, and the pipeline's, by cell. Without a self-test."""
    rates: dict[str, Mapping[str, float]] = {}
    for parts in splits:
        flags = (*plan.flags, "--self-test", "off", "--attention-splits", str(parts))
        with plan.part(f"{parts} parts"):
            async with running(plan.model, plan.state, *flags) as stack:
                await introduce(stack, f"{parts} parts")
                rates[str(parts)] = await speed.measure(stack.front, plan, f"{parts} parts")
    with plan.part("bare pipeline"):
        await speed.bare(plan, ("speed",))
    return rates | {name: found for name, found in plan.rates.items() if found}


def table(rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line per cell: tokens per second by number of parts, with their ratios to the pipeline's."""
    bare = rates.get("bare", {})
    lines = [f"{'tokens/s':>14} " + " ".join(f"{name:>16}" for name in rates)]
    for cell in next(iter(rates.values()), {}):
        shown = (
            f"{found[cell]:9.0f}" + (f" ({found[cell] / bare[cell]:.2f})" if cell in bare else "") if cell in found else "-"
            for found in rates.values()
        )
        lines.append(f"{cell:>14} " + " ".join(f"{each:>16}" for each in shown))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.splits")
    parser.add_argument("model", type=Path)
    parser.add_argument("--splits", type=numbers, default=(1, 2, 4, 8))
    parser.add_argument("--batches", type=numbers, default=(1, 64, 256))
    parser.add_argument("--flags", default="", help="more flags of the service, in one text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as state:
        plan = Plan(given.model.resolve(), Path(state), tuple(shlex.split(given.flags)), batches=given.batches)
        rates = asyncio.run(measure(plan, given.splits))
    for line in (*table(rates), *plan.lines, *(f"BAD {text}" for text in plan.bad)):
        say(line)


if __name__ == "__main__":
    main()
