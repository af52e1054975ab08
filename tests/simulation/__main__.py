"""`python -m tests.simulation`: seeds by the thousand, or one that failed, again.

Prints what every failing seed broke and the command that repeats it, made shorter where fewer faults and jobs break the same.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.simulation.plan import Plan, plan_of
from tests.simulation.promises import broken
from tests.simulation.shrink import command, run_seed, shrunk
from tests.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Break the promises of docs/order.md.")
    parser.add_argument("--seeds", type=int, default=3000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone, and what happened in it")
    parser.add_argument("--without-faults", default="", metavar="0,3,4", help="leave these of its faults out")
    parser.add_argument("--without-jobs", default="", metavar="0,3,4", help="leave these of its jobs out")
    parser.add_argument("--trace", action="store_true", help="with --seed: every step")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.seed is not None:
        plan = plan_of(given.seed).without(faults=_places(given.without_faults), jobs=_places(given.without_jobs))
        return _one(plan, given.trace)
    return _many(range(given.first, given.first + given.seeds), given.workers)


def _places(text: str) -> frozenset[int]:
    return frozenset(int(place) for place in text.split(",") if place)


def _one(plan: Plan, trace: bool) -> int:
    history = simulate(plan, trace=True)
    for fault in plan.faults:
        print(f"{fault.at:7.3f}  {fault.name}, {fault.seconds} s")
    for line in (history.trace or []) if trace else []:
        print(line[:200])
    found = broken(history)
    for number, faults in found.items():
        print(f"promise {number} is broken:", *faults, sep="\n  ")
    print(f"digest {history.digest}, {history.step} steps, {len(history.calls)} calls, {len(history.disk)} entries")
    return 1 if found else 0


def _many(seeds: range, workers: int) -> int:
    started, failures, seen = time.monotonic(), 0, Counter[str]()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count, (seed, found, sighted) in enumerate(pool.imap_unordered(run_seed, seeds, chunksize=8), 1):
            seen.update(sighted)
            if found:
                failures += 1
                print(_report(seed, found), flush=True)
            if count % 500 == 0:
                print(f"{count} seeds, {failures} broke a promise, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{len(seeds)} seeds from {seeds.start} on, {failures} broke a promise, {time.monotonic() - started:.0f} s. They saw:"
    )
    for name, times in sorted(seen.items()):
        print(f"  {times:6}  {name}")
    return 1 if failures else 0


def _report(seed: int, found: dict[int, list[str]]) -> str:
    faults = [f"  promise {number}: {fault}" for number, all_ in found.items() for fault in itertools.islice(all_, 3)]
    return "\n".join([f"seed {seed} broke {sorted(found)}:", *faults, f"  repeat: {command(shrunk(seed, frozenset(found)))}"])


if __name__ == "__main__":
    sys.exit(main())
