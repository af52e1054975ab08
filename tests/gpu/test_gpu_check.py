"""The check itself, with the scripted engine: it must find what is wrong, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import doctored, prefix, scoreboard, worth
from tests.gpu.speed import table
from tests.gpu.traffic import KINDS, SECOND, targets
from tests.pair import ROOT

QUIET: dict[str, object] = {"runs": 8}
LOUD = QUIET | {"rules": [{"do": "diverge", "at": 3, "purposes": ["REPLAY"], "company": True}]}
PARTS = ["--targets", "16", "--totals", "4,16", "--trials", "1", "--batches", "1,4", "--no-sidecar"]


def check(script: dict[str, object], folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = f"--script {shlex.quote(json.dumps(script))}"
    command = [sys.executable, "-m", "tests.gpu", str(folder), "--engine", "scripted", f"--flags={flags}", *PARTS, *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_an_engine_whose_answers_know_their_company_is_found_out(tmp_path: Path) -> None:
    """An engine that diverges only beside other runs, and passes its self-test, ends the check with exit code 1 and the
    count."""
    done = check(LOUD, tmp_path, "--parts", "exact")

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^BAD +exact: [1-9]\d*\+0 of 16 diverged among 4$", done.stdout, re.MULTILINE), done.stdout


def test_prompts_that_begin_alike_are_held_against_those_alone(tmp_path: Path) -> None:
    """An engine that diverges beside other runs fails conversations, ladder and followers of cancelled prompts."""
    code = (
        "import asyncio, sys; from pathlib import Path; from tests.gpu import prefix; from tests.gpu.plan import Plan;"
        f"plan = Plan(Path('.'), Path({str(tmp_path)!r}), ('--script', {json.dumps(LOUD | {'runs': 64})!r}), 'scripted');"
        "asyncio.run(prefix.prefix(plan, prefix.Size(conversations=3, turns=2, rounds=1, few=True)));"
        "print('\\n'.join(f'BAD {each}' for each in plan.bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    found = re.findall(r"^BAD prefix: ([a-z ,1]+?) [1-9]\d*\+0 of ", done.stdout, re.MULTILINE)

    assert found == ["ladder together, round 1", "conversations, round 1", "behind cancelled producers"], (
        done.stdout + done.stderr
    )


def test_an_exact_engine_passes(tmp_path: Path) -> None:
    """Alone, in batches, in another process: one digest, exit code 0."""
    done = check(QUIET, tmp_path, "--parts", "exact,restart")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all as it should be" in done.stdout


@pytest.mark.parametrize("count", [16, 64])
def test_targets_are_of_every_kind_and_the_same_at_every_call(count: int) -> None:
    """All kinds are compared in every run, and two runs ask the same."""
    first, second = targets(count), targets(count)

    assert [(ask.name, ask.item.SerializeToString(deterministic=True)) for ask in first] == [
        (ask.name, ask.item.SerializeToString(deterministic=True)) for ask in second
    ]
    assert {ask.name.partition(" ")[2] for ask in first} == KINDS.keys()
    assert all(bool(ask.follows) == ask.name.endswith(SECOND) for ask in first)


@pytest.mark.parametrize(
    ("exact", "bare"),
    [
        ({"1": 100.0, "8": 50.0}, {"1": 50.0, "8": 100.0}),
        ({"1": 100.0, "1 streamed": 900.0}, {"1": 100.0, "1 streamed": 100.0}),
    ],
)
def test_the_table_takes_geometric_means(exact: dict[str, float], bare: dict[str, float]) -> None:
    """The mean of twice as fast and half as fast is equally fast. Cells of streams are not in it, because the pipeline
    detokenises there."""
    assert table({"exact": exact, "bare": bare})[-1].split() == ["speed", "geom.", "mean", "-", "1.000"]


def test_the_worth_of_a_prefix_cache_stands_beside_the_pipelines() -> None:
    """A cell that one of the two lacks is left out."""
    lines = worth.table({"exact worth": {worth.SHARED: 70.0, worth.TURNS: 5.0}, "bare worth": {worth.SHARED: 100.0}})

    assert [line.split()[1:] for line in lines] == [
        ["shared", "prompt", "70.0", "100.0", "requests/s", "EXACT/bare", "0.700"],
    ]


def test_prompts_that_begin_alike_have_every_rest() -> None:
    """Whole blocks and a token more or less, as far as the context has room."""
    asks = {ask.name: list(ask.item.token_ids.ids) for ask in prefix.ladder(4096)}
    rests = {len(ids) % 64 for ids in asks.values()}

    assert rests == set(range(64))
    assert asks["rung 129"] == asks["rung 1538"][:129]
    assert (
        max(map(len, asks.values())) + prefix.NEW_TOKENS <= 4096 < max(len(a.item.token_ids.ids) for a in prefix.ladder(16384))
    )
    assert {ask.name for ask in prefix.ladder(4096, few=True)} < asks.keys()


def test_a_scoreboard_has_the_control_beside_each_test() -> None:
    """A test that the control did not run has an empty cell."""
    row = ("vLLM", "needle", 1275, 0)

    assert (
        scoreboard.table({("vLLM", "needle"): row}, {("vLLM", "needle"): (*row[:3], 7)})[-1]
        == "| vLLM needle | 1,275 | 0 | 7 |"
    )
    assert scoreboard.table({("vLLM", "needle"): row}, {})[-1] == "| vLLM needle | 1,275 | 0 |  |"


@pytest.mark.parametrize(
    ("fault", "reason", "classes", "found"),
    [
        ("places", "", [0, -1, 1, 0, 0], True),
        ("places", "", [0, 0, 1, 0, 0], False),
        ("places", "", [0, -1, 1, 0, 2], False),
        ("pieces", "TurboMind computed a prompt of 2176 tokens in 3 pieces, not 2", [0, 0, 0, 0, 0], True),
        ("pieces", "", [0, 0, 0, 0, 0], False),
    ],
)
def test_a_fault_that_the_proofs_do_not_find_fails_the_check(fault: str, reason: str, classes: list[int], found: bool) -> None:
    """A doctored override must be found at its trials, and nowhere else."""
    excluded = [str(each) for each in classes if each]
    told = {"grade": "GRADE_BEST_EFFORT" if reason else "GRADE_EXACT", "reason": reason, "classes": classes}

    assert (not doctored.wrong(fault, told | {"excluded": excluded})) is found
