"""`python -m tests.gpu MODEL`: whether TurboMind is exact on this host, and what that costs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from tests.gpu import doctored, parts, prefix, scoreboard, shapes, speed, worth
from tests.gpu.crash import crash
from tests.gpu.gap import gap
from tests.gpu.grammars import grammars
from tests.gpu.plan import Plan, arguments, conclude, names, numbers, plan_of
from tests.gpu.traffic import NEW_TOKENS

PARTS = (
    "exact", "restart", "prefix", "stock", "crash", "evict", "speed", "worth", "path", "gap", "grammars", "sabotage",
    "scoreboard",
)  # fmt: skip
OTHER_DTYPES = ("exact", "stock")
"""Parts that run for dtypes other than the first."""
SHARE = ("--cache-fraction", "0.2")
"""Of the GPU's memory, for each of several services at once."""


async def part(plan: Plan, title: str, work: Callable[[Plan], Awaitable[None]], *, wanted: object = True) -> None:
    """A part, if it is wanted and there is time."""
    if wanted and not plan.late():
        with plan.part(title):
            await work(plan)


async def check(plan: Plan, chosen: set[str]) -> None:
    """The chosen parts, with as few starts as possible."""
    with_speed, with_worth, with_path = (name in chosen for name in ("speed", "worth", "path"))
    measured = [name for name in ("speed", "worth") if name in chosen and plan.engine == "turbomind"]
    first = partial(parts.exact, with_path=with_path and plan.sidecar)
    await part(plan, "exact", first, wanted=chosen & {"exact", "restart"})
    second = partial(parts.second, with_speed=with_speed, with_worth=with_worth, with_path=with_path)
    await part(plan, "restart, speed", second, wanted=chosen & {"restart", "speed", "worth", "path"})
    await part(plan, "prefix", prefix.prefix, wanted="prefix" in chosen)
    stock = partial(parts.stock, compare="stock" in chosen, with_speed=with_speed)
    await part(plan, "stock", stock, wanted=chosen & {"stock", "speed"})
    await part(plan, "bare pipeline", partial(speed.bare, parts=measured), wanted=measured)
    await part(plan, "gap", gap, wanted="gap" in chosen and plan.engine == "turbomind")
    await part(plan, "grammars", grammars, wanted="grammars" in chosen and plan.engine == "turbomind")
    plan.lines += [*speed.table(plan.rates), *worth.table(plan.rates)]
    paths = plan.rates.get("path", {})
    if paths.keys() == {"whole", "direct"}:
        plan.lines.append(f"path     whole / direct = {paths['whole'] / paths['direct']:.3f}")


async def check_all(plan: Plan, chosen: set[str], dtypes: tuple[str, ...], shape: str) -> list[Plan]:
    """The first dtype alone, because its speed is measured. Then at once the parts without speeds: crash, other dtypes, and
    sabotage, of a model of `shape` if one is named."""
    first, *others = [plan.anew("--dtype", dtype) for dtype in dtypes] or [plan.anew()]
    await check(first, chosen)
    turbomind = plan.engine == "turbomind"
    share = SHARE if turbomind else ()
    others = [replace(other, flags=(*share, *other.flags)) for other in others]
    beside = replace(first, flags=(*share, *first.flags))
    crashed, scored, evicted = (replace(each, lines=[], bad=[]) for each in (beside, beside, first))
    sabotaged = replace(plan.anew(), flags=(*share, *plan.flags))
    await asyncio.gather(
        *(check(other, chosen & set(OTHER_DTYPES)) for other in others),
        part(crashed, "crash, replay", crash, wanted="crash" in chosen),
        part(scored, "scoreboard", scoreboard.part, wanted="scoreboard" in chosen and turbomind),
        part(evicted, "eviction", prefix.evict, wanted="evict" in chosen and turbomind),
        part(sabotaged, "sabotage", partial(sabotage, shape=shape), wanted="sabotage" in chosen),
    )
    return [each for each in (first, crashed, evicted, *others, sabotaged, scored) if each is first or each.lines or each.bad]


async def sabotage(plan: Plan, shape: str) -> None:
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
    parser = arguments("python -m tests.gpu")
    parser.set_defaults(targets=64, totals=(64, 128, 256), new_tokens=NEW_TOKENS, seconds=900.0)
    parser.add_argument("--parts", type=names, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--digest-only", action="store_true", help="one line: all targets alone, and what made them")
    parser.add_argument(
        "--dtypes", type=names, default=(), help="such as bfloat16,float16: all parts in the first, a few in others"
    )
    parser.add_argument(
        "--shape", default="", help=f"of the model that is sabotaged, of {','.join(shapes.SHAPES)}; none: MODEL"
    )
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--no-sidecar", action="store_true", help="ask the service alone, where that can be")
    given, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as folder:
        plan = replace(plan_of(given, folder), trials=given.trials, batches=given.batches, sidecar=not given.no_sidecar)
        if given.digest_only:
            asyncio.run(parts.digest_only(plan))
            plans = [plan]
        else:
            plans = asyncio.run(check_all(plan, set(given.parts), given.dtypes, given.shape))
    sys.exit(conclude(began, *plans))


if __name__ == "__main__":
    main()
