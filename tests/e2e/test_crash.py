"""Programs killed, and told to stop, in the middle of a load; the checks are those of `tests.soak.checks`."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import pytest

from ostinato import errors
from ostinato.client import Client

from tests.e2e.kit import eventually
from tests.soak import chaos, checks
from tests.soak.chaos import Story
from tests.soak.checks import ABANDONED, COMPLETED, Record
from tests.soak.load import Load, jobs
from tests.soak.recording import RecordedPair

SLOW = json.dumps({"rules": [{"do": "delay", "at": 1, "seconds": 0.25}, {"do": "delay", "at": 2, "seconds": 0.25}]})
"""Every run takes half a second, most of it between its tokens."""


@pytest.fixture
def rng() -> random.Random:
    """Its seed is printed where a test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


async def story(rng: random.Random, kills: Sequence[str]) -> Story:
    """One chapter with these kills, in which nothing was wrong."""
    with chaos.pair() as pair:
        pair.start()
        told = Story(pair, rng)
        assert await told.chapter(kills) == []
        return told


async def test_a_killed_sidecar_loses_nothing(rng: random.Random) -> None:
    """After kill -9 and restart, numbers go on, keyed items complete one attempt later, others are ABANDONED, and every
    acknowledged answer is there."""
    told = await story(rng, ["sidecar"] * 4)

    outcomes, admitted = told.record.outcomes, told.record.admitted
    assert {outcome.kind for outcome in outcomes.values()} == {COMPLETED, ABANDONED}
    assert [
        sequence
        for sequence, outcome in outcomes.items()
        if outcome.kind == COMPLETED and outcome.attempt != 1 + outcome.epoch - admitted[sequence].epoch
    ] == []
    assert any(outcome.attempt > 1 for outcome in outcomes.values() if outcome.kind == COMPLETED)
    assert any(call.repeated for call in told.load.calls)


async def test_a_killed_service_is_not_noticed(rng: random.Random) -> None:
    """After kill -9 of the service no call is lost: streams go on behind what they had, and equal inputs have equal answers."""
    told = await story(rng, ["service"] * 4)

    assert {outcome.kind for outcome in told.record.outcomes.values()} == {COMPLETED}
    assert {type(call.error) for call in told.load.calls} <= {type(None), errors.EngineUnavailable}
    assert sum(call.restarts for call in told.load.calls) == 0
    assert any(outcome.attempt > 1 for outcome in told.record.outcomes.values())


async def test_both_may_die(rng: random.Random) -> None:
    """Kills of both at once, and of one before the other is back, lose nothing either."""
    told = await story(rng, rng.sample(["both", "both", "sidecar", "service"], 4))

    assert told.record.opened == told.epochs == 4


async def test_ten_kills_in_turn(rng: random.Random) -> None:
    """Service and sidecar killed in turn, ten times on one journal under clients of which most have keys: all that was promised
    holds, and the file verifies."""
    with chaos.pair() as pair:
        pair.start()
        told = Story(pair, rng)
        faults = await told.chapter(["service", "sidecar"] * 5, keyed_share=0.8)
        code = await asyncio.to_thread(pair.sidecar.stop)
        faults += checks.journal_file(pair.folder / "journal.sqlite")

    assert faults == []
    assert (code, told.record.opened) == (0, 6)


async def under_way(load: Load) -> None:
    """Until somebody has numbers, and no answer yet."""
    await eventually(lambda: any(call.stamp is not None and not call.complete for call in load.calls), "work is under way")


async def answered(load: Load, calls: int) -> None:
    """Until one is that came behind the first so many calls."""
    await eventually(lambda: any(call.complete for call in load.calls[calls:]), "clients carry on")


async def test_a_sidecar_that_is_told_to_stop_finishes_first(rng: random.Random) -> None:
    """SIGTERM under load: what was admitted completes in its first attempt and reaches its callers, nothing new gets a number,
    and the program exits with 0; clients carry on with the next one."""
    with RecordedPair(service=["--script", SLOW]) as pair:
        pair.start()
        load = Load(lambda: pair.target, jobs(rng, "drain"))
        running = asyncio.create_task(load.run(chaos.CLIENTS))
        await under_way(load)
        code = await asyncio.to_thread(pair.sidecar.stop)
        before = len(load.calls)
        await asyncio.to_thread(pair.start_sidecar)
        await answered(load, before)
        load.stop()
        await running
        async with Client(pair.target) as client:
            record = await Record().read(client)
            faults = await checks.kept(load.calls, client)
        faults += checks.numbers(record) + checks.calls(load.calls, record) + checks.real_time(load.calls)
        faults += checks.results(load.calls) + checks.submitted(pair.submissions(), record)

    assert faults == []
    assert code == 0
    assert {outcome.kind for outcome in record.outcomes.values()} == {COMPLETED}
    assert {outcome.attempt for outcome in record.outcomes.values()} == {1}
    # While it drains, while nobody listens, and while the next one is not connected yet.
    refusals = {errors.Draining, errors.Disconnected, errors.EngineUnavailable}
    assert {type(call.error) for call in load.calls if call.error is not None} <= refusals


async def test_a_service_that_is_told_to_stop_loses_nothing(rng: random.Random) -> None:
    """SIGTERM of the service under load: it exits with 0, callers are refused or answered, and every item completes."""
    with RecordedPair(service=["--script", SLOW, "--drain-seconds", "0.5"]) as pair:
        pair.start()
        load = Load(lambda: pair.target, jobs(rng, "drain"))
        running = asyncio.create_task(load.run(chaos.CLIENTS))
        await under_way(load)
        code = await asyncio.to_thread(pair.service.stop)
        before = len(load.calls)
        pair.start_service()
        await answered(load, before)
        load.stop()
        await running
        async with Client(pair.target) as client:
            record = await Record().read(client)
        faults = checks.numbers(record) + checks.calls(load.calls, record) + checks.results(load.calls)
        faults += checks.kinds(load.calls, record) + checks.submitted(pair.submissions(), record)

    assert faults == []
    assert code == 0
    assert {outcome.kind for outcome in record.outcomes.values()} == {COMPLETED}
    assert {type(call.error) for call in load.calls} <= {type(None), errors.EngineUnavailable}
