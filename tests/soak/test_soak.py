"""What only shows after a long time."""

from __future__ import annotations

import random

import pytest

from tests.bench.memory import hold
from tests.bench.table import ITEMS
from tests.postgres import Postgres
from tests.soak import chaos, checks, shared
from tests.soak.chaos import Story

MEGABYTES_MAX = 150
ROUNDS, CHAPTER = 200, 10
STOPS, STOP_CHAPTERS = 100, 5

pytestmark = pytest.mark.soak


@pytest.mark.timeout(1800)
async def test_memory_is_bounded() -> None:
    """After a hundred thousand items the sidecar is smaller than 150 MB, and never was larger."""
    before, after = await hold(ITEMS)
    print(f"{before.now:.0f} MB before, {after.now:.0f} MB after {ITEMS:,} items, {after.peak:.0f} MB at most")

    assert after.peak < MEGABYTES_MAX


@pytest.mark.timeout(3600)
async def test_two_hundred_kills() -> None:
    """Service and sidecar killed in turn, two hundred times on one journal: after every tenth all that was promised holds."""
    seed = chaos.seed()
    rng = random.Random(seed)
    with chaos.pair() as pair:
        pair.start()
        story = Story(pair, rng)
        for chapter in range(ROUNDS // CHAPTER):
            faults = await story.chapter(["service", "sidecar"] * (CHAPTER // 2), keyed_share=0.8)
            assert faults == [], f"chapter {chapter}, SOAK_SEED={seed}"
            print(f"chapter {chapter}: {len(story.record.admitted)} items so far, epoch {story.epochs}")
        code = pair.sidecar.stop()
        faults = checks.journal_file(pair.folder / "journal.sqlite")

    assert code == 0
    assert faults == []
    assert story.record.opened == 1 + ROUNDS // 2


@pytest.mark.timeout(3600)
async def test_a_hundred_stops_on_a_shared_log() -> None:
    """Three sidecars are stopped (SIGSTOP) at random moments, a hundred times, on five logs: the others answer, and all
    promises hold."""
    seed = chaos.seed()
    rng, fenced, waits = random.Random(seed), 0, list[float]()
    with Postgres() as server:
        for chapter in range(STOP_CHAPTERS):
            with shared.sidecars(server, rng) as together:
                _, _, faults = await shared.chapter(together, rng, kills=0, pauses=STOPS // STOP_CHAPTERS, crashes=0)
            assert faults == [], f"chapter {chapter}, SOAK_SEED={seed}"
            fenced, waits = fenced + together.fenced, waits + together.waits
            print(f"chapter {chapter}: {len(waits)} stops, {fenced} sidecars fenced; no answer for {max(waits):.2f} s at most")


@pytest.mark.timeout(3600)
async def test_a_hundred_kills_on_a_shared_log() -> None:
    """Three sidecars and their PostgreSQL server killed a hundred times, on ten logs: all promises hold."""
    seed = chaos.seed()
    rng, fenced, items = random.Random(seed), 0, 0
    with Postgres() as server:
        for chapter in range(10):
            with shared.sidecars(server, rng) as together:
                _, record, faults = await shared.chapter(together, rng, kills=6, pauses=2, crashes=2)
            assert faults == [], f"chapter {chapter}, SOAK_SEED={seed}"
            fenced, items = fenced + together.fenced, items + len(record.admitted)
            print(f"chapter {chapter}: {items} items so far, {fenced} sidecars fenced")
