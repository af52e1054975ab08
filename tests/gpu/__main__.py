"""`python -m tests.gpu MODEL`: is TurboMind exact here, and at what price?"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tests.gpu import parts, whole
from tests.gpu.parts import Plan, say

PARTS = ("exact", "stock", "restart", "sabotage", "crash", "speed", "path")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


async def check(plan: Plan, chosen: set[str]) -> list[str]:
    """The parts that were chosen, in an order that starts the service as rarely as possible; lines for the table."""
    lines: list[str] = []
    rates: dict[str, dict[str, float]] = {}
    with_speed = "speed" in chosen
    if "exact" in chosen or with_speed:
        found, rates["exact"] = await parts.exact(plan, with_speed=with_speed)
        lines += found
    if ("stock" in chosen or with_speed) and not plan.late():
        found, rates["stock"] = await parts.stock(plan, with_speed=with_speed, compare="stock" in chosen)
        lines += found
    if "restart" in chosen and not plan.late():
        lines += await parts.restart(plan)
    if "sabotage" in chosen and not plan.late():
        lines += await parts.sabotage(plan)
    if "crash" in chosen and not plan.late():
        lines += await whole.crash(plan)
    if "path" in chosen and not plan.late():
        lines += await whole.path(plan)
    for key in rates.get("exact", {}):
        ours, theirs = rates["exact"][key], rates.get("stock", {}).get(key)
        against = f" / {theirs:.0f} = {ours / theirs:.2f}" if theirs else ""
        lines.append(f"speed    {key:>13}: {ours:.0f}{against} tokens/s")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--totals", type=numbers, default=(64, 128, 256))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--seconds", type=float, default=480.0, help="begin nothing new after so long")
    parser.add_argument("--state", type=Path, help="kept from call to call; else a new one")
    parser.add_argument("--sidecar", action="store_true", help="ask through a sidecar (needs apsw)")
    parser.add_argument("--engine", default="turbomind", help="another one, to try the check itself")
    parser.add_argument("--flags", default="", help="more flags of the service, in one text: --flags='--context-tokens 16384'")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as folder:
        plan = Plan(
            model=given.model.resolve(),
            state=given.state or Path(folder),
            flags=tuple(shlex.split(given.flags)),
            targets=given.targets,
            totals=given.totals,
            trials=given.trials,
            batches=given.batches,
            sidecar=given.sidecar,
            engine=given.engine,
            deadline=began + given.seconds,
        )
        lines = asyncio.run(check(plan, set(given.parts.split(","))))
    say(f"\n==== {plan.model.name} {' '.join(plan.flags)}, {time.monotonic() - began:.0f} s")
    for line in (*lines, *(f"BAD      {text}" for text in plan.bad)):
        say(line)
    say("all as it should be" if not plan.bad else f"{len(plan.bad)} not as they should be")
    sys.exit(1 if plan.bad else 0)


if __name__ == "__main__":
    main()
