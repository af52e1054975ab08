"""A failing seed with as few faults and jobs as will do, and the command that repeats it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.coverage import coverage
from tests.simulation.plan import plan_of
from tests.simulation.promises import broken
from tests.simulation.world import simulate

ROOT = Path(__file__).parents[2]
SHRINK_SECONDS = 20.0
"""Of real time, spent on one failing seed."""


def run_seed(seed: int) -> tuple[int, dict[int, list[str]], list[str]]:
    """The seed, what it broke, and what it saw."""
    history = simulate(plan_of(seed))
    return seed, broken(history), sorted(coverage(history))


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A seed, and what may be left out of it."""

    seed: int
    faults: frozenset[int] = frozenset()
    jobs: frozenset[int] = frozenset()


def shrunk(seed: int, promises: frozenset[int]) -> Shrunk:
    """Leave out one thing after the other, as long as one of these promises is still broken."""
    plan, best = plan_of(seed), Shrunk(seed)
    until = time.monotonic() + SHRINK_SECONDS
    candidates = [("faults", place) for place in range(len(plan.faults))] + [("jobs", place) for place in range(len(plan.jobs))]
    for what, place in candidates:
        if time.monotonic() > until:
            break
        faults = best.faults | {place} if what == "faults" else best.faults
        jobs = best.jobs | {place} if what == "jobs" else best.jobs
        if promises & set(broken(simulate(plan.without(faults=faults, jobs=jobs)))):
            best = Shrunk(seed, faults, jobs)
    return best


def command(what: Shrunk) -> str:
    """Repeats it from the repository's root, with this Python, on the commit that it was found on."""
    python = Path(sys.executable)
    program = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    parts = [f"{shlex.quote(str(program))} -m tests.simulation --seed {what.seed}"]
    for name, places in (("faults", what.faults), ("jobs", what.jobs)):
        if places:
            parts.append(f"--without-{name} {','.join(map(str, sorted(places)))}")
    return f"PYTHONPATH=.:proto {' '.join(parts)}  # commit {commit()}"


def commit() -> str:
    """What is checked out, as git names it; with a mark where something was changed since."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"
