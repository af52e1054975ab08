"""`python -m tests.gpu MODEL`: whether TurboMind is exact on this host, and what that costs."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

from tests.gpu import doctored, parts, prefix, scoreboard, shapes, speed, worth
from tests.gpu.crash import crash
from tests.gpu.gap import gap
from tests.gpu.grammars import grammars
from tests.gpu.plan import Plan, names, numbers, say

PARTS = (
    "exact", "restart", "prefix", "stock", "crash", "evict", "speed", "worth", "path", "gap", "grammars", "sabotage",
    "scoreboard",
)  # fmt: skip
OTHER_DTYPES = ("exact", "stock")
"""Parts that run for dtypes other than the first."""
SHARE = ("--cache-fraction", "0.2")
"""Of the GPU's memory, for each of several services at once."""


async def check(plan: Plan, chosen: set[str]) -> None:
    """The chosen parts, with as few starts as possible."""
    with_speed, with_worth, with_path = "speed" in chosen, "worth" in chosen, "path" in chosen
    if "exact" in chosen or "restart" in chosen:
        with plan.part("exact"):
            await parts.exact(plan, with_path=with_path and plan.sidecar)
    if chosen & {"restart", "speed", "worth", "path"} and not plan.late():
        with plan.part("restart, speed"):
            await parts.second(plan, with_speed=with_speed, with_worth=with_worth, with_path=with_path)
    if "prefix" in chosen and not plan.late():
        with plan.part("prefix"):
            await prefix.prefix(plan)
    if chosen & {"stock", "speed"} and not plan.late():
        with plan.part("stock"):
            await parts.stock(plan, compare="stock" in chosen, with_speed=with_speed)
    measured = [part for part in ("speed", "worth") if part in chosen]
    if measured and plan.engine == "turbomind" and not plan.late():
        with plan.part("bare pipeline"):
            await speed.bare(plan, measured)
    if "gap" in chosen and plan.engine == "turbomind" and not plan.late():
        with plan.part("gap"):
            await gap(plan)
    if "grammars" in chosen and plan.engine != "scripted" and not plan.late():
        with plan.part("grammars"):
            await grammars(plan)
    plan.lines += [*speed.table(plan.rates), *worth.table(plan.rates)]
    paths = plan.rates.get("path", {})
    if paths.keys() == {"whole", "direct"}:
        plan.lines.append(f"path     whole / direct = {paths['whole'] / paths['direct']:.3f}")


async def check_all(plan: Plan, chosen: set[str], dtypes: tuple[str, ...], shape: str) -> list[Plan]:
    """The first dtype alone, because its speed is measured. Then at once the parts without speeds: crash, other dtypes, and
    sabotage, of a model of `shape` if one is named."""
    first, *others = [plan.anew("--dtype", dtype) for dtype in dtypes] or [plan.anew()]
    await check(first, chosen)
    share = SHARE if plan.engine == "turbomind" else ()
    crashed = replace(first, flags=(*share, *first.flags), lines=[], bad=[])
    others = [replace(other, flags=(*share, *other.flags)) for other in others]
    evicted = replace(first, lines=[], bad=[])
    scored = replace(crashed, lines=[], bad=[])
    sabotaged = replace(plan.anew(), flags=(*share, *plan.flags))
    rest: list[Awaitable[None]] = [check(other, chosen & set(OTHER_DTYPES)) for other in others]
    if "crash" in chosen:
        rest.append(_crash(crashed))
    if "scoreboard" in chosen and plan.engine == "turbomind":
        rest.append(_scoreboard(scored))
    if "evict" in chosen and plan.engine == "turbomind":
        rest.append(_evict(evicted))
    if "sabotage" in chosen:
        rest.append(_sabotage(sabotaged, shape))
    await asyncio.gather(*rest)
    return [each for each in (first, crashed, evicted, *others, sabotaged, scored) if each is first or each.lines or each.bad]


async def _crash(plan: Plan) -> None:
    if not plan.late():
        with plan.part("crash, replay"):
            await crash(plan)


async def _scoreboard(plan: Plan) -> None:
    if not plan.late():
        with plan.part("scoreboard"):
            await scoreboard.part(plan)


async def _evict(plan: Plan) -> None:
    if not plan.late():
        with plan.part("eviction"):
            await prefix.evict(plan)


async def _sabotage(plan: Plan, shape: str) -> None:
    if plan.late():
        return
    with plan.part("sabotage"):
        making = await shapes.begin(shape, plan.model, plan.state) if shape else None
        try:
            if making is not None:
                plan.model = await making.ready()
            await parts.sabotage(plan)
        finally:
            if making is not None:
                await making.remove()
        if plan.engine == "turbomind" and not plan.late():
            await doctored.check(plan)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", type=names, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--digest-only", action="store_true", help="one line: all targets alone, and what made them")
    parser.add_argument(
        "--dtypes", type=names, default=(), help="such as bfloat16,float16: all parts in the first, a few in others"
    )
    parser.add_argument(
        "--shape", default="", help=f"of the model that is sabotaged, of {','.join(shapes.SHAPES)}; none: MODEL"
    )
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--totals", type=numbers, default=(64, 128, 256))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--seconds", type=float, default=900.0, help="begin nothing new after so long")
    parser.add_argument("--state", type=Path, help="kept from call to call; else a new one")
    parser.add_argument("--no-sidecar", action="store_true", help="ask the service alone, where that can be")
    parser.add_argument("--engine", default="turbomind", help="another one, to try the check itself")
    parser.add_argument("--flags", default="", help="more flags of the service, in one text: --flags='--context-tokens 16384'")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as folder:
        plan = Plan(
            model=given.model.resolve(),
            state=given.state or Path(folder),
            flags=tuple(shlex.split(given.flags)),
            engine=given.engine,
            targets=given.targets,
            totals=given.totals,
            trials=given.trials,
            batches=given.batches,
            sidecar=not given.no_sidecar,
            deadline=began + given.seconds,
        )
        if given.digest_only:
            asyncio.run(parts.digest_only(plan))
            plans = [plan]
        else:
            plans = asyncio.run(check_all(plan, set(given.parts), given.dtypes, given.shape))
    for each in plans:
        say(f"\n==== {each.model.name} {' '.join(each.flags)}")
        for line in (*each.lines, *(f"BAD      {text}" for text in each.bad)):
            say(line)
    bad = sum(len(each.bad) for each in plans)
    say(f"{bad} not as they should be" if bad else "all as it should be")
    say(f"seconds  in all: {time.monotonic() - began:.0f}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
