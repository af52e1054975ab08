"""Programs killed, and told to stop, in the middle of a load; the checks are those of `tests.soak.checks`."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import generation_pb2

from tests.e2e.conftest import eventually
from tests.pair import Pair
from tests.soak import chaos, checks
from tests.soak.chaos import Story
from tests.soak.checks import ABANDONED, COMPLETED, Record
from tests.soak.load import Load, jobs
from tests.soak.recording import RecordedPair

SLOW = json.dumps({"rules": [{"do": "delay", "at": 1, "seconds": 0.25}, {"do": "delay", "at": 2, "seconds": 0.25}]})
"""Every run takes half a second, most of it between its tokens."""
HANGING = json.dumps({"rules": [{"do": "hang", "at": 1, "attempts": [1]}]})
"""Every run makes one token, and no more before its second attempt."""
GENERATION = "ostinato.v1.Generation"


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
        assert pair.sidecar is not None
        code = await asyncio.to_thread(pair.sidecar.stop)
        faults += checks.journal_file(pair.folder / "journal.sqlite")

    assert faults == []
    assert (code, told.record.opened) == (0, 6)


async def test_attempts_are_counted() -> None:
    """Second attempts show in the results, in the metrics, and as recovery comparisons that all match."""
    with Pair(service=["--script", HANGING]) as pair:
        pair.start()
        async with Client(pair.target) as client:
            events: list[generation_pb2.GenerateEvent] = []
            async for event in client.stream(["a", "b", "c"], max_new_tokens=20, ignore_eos=True, seed=7):
                events.append(event)
                begun = {run.sequence for each in events for run in each.tokens.runs}
                if len(begun) == 3 and pair.service is not None and len(pair.programs) == 2:
                    await asyncio.to_thread(pair.service.kill)
                    pair.start_service()
            verdict = 'ostinato_comparisons_total{grade="exact",kind="recovery",replica="same",verdict="match"}'
            await eventually(lambda: pair.metrics().get(verdict) == 3, "the verdicts are durable")
            metrics = pair.metrics()

        assert [event.finished.attempt for event in events if event.HasField("finished")] == [2, 2, 2]
        assert not any(event.HasField("restarted") for event in events)
        assert metrics["ostinato_attempts_total"] == 3
        assert metrics['ostinato_compared_tokens_total{grade="exact",kind="recovery"}'] >= 3


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
        assert pair.sidecar is not None
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


async def _unfinished(client: Client, count: int) -> None:
    async with asyncio.timeout(30):
        while (await client.head()).unfinished != count:
            await asyncio.sleep(0.01)


async def test_health_says_so_before_anybody_is_refused() -> None:
    """While it drains, a caller that is refused with DRAINING and a time to come back finds the sidecar NOT_SERVING."""
    held = {"rules": [{"do": "hang", "sequences": [1]}]}
    with Pair(service=["--script", json.dumps(held)]) as pair:
        pair.start()
        async with Client(pair.target) as client, grpc.aio.insecure_channel(pair.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=GENERATION)
            while (await health.Check(request)).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
            work = asyncio.create_task(client.generate("held"))
            await _unfinished(client, 1)
            assert pair.sidecar is not None
            stopping = asyncio.create_task(asyncio.to_thread(pair.sidecar.stop))
            refusal: errors.OstinatoError | None = None
            while refusal is None:
                try:
                    await client.generate("another", max_new_tokens=1)
                except errors.OstinatoError as error:
                    refusal = error
            after = await health.Check(request)
            await client.cancel(1)
            await work
            code = await stopping

        assert isinstance(refusal, errors.Draining)
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refusal.retry_after
        assert after.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert code == 0


async def test_a_drain_ends_in_time() -> None:
    """When the drain's time is over, unkeyed items are ABANDONED and their callers told; keyed ones go on in the next epoch."""
    with Pair(service=["--script", HANGING], sidecar=["--drain-seconds", "0.3"]) as pair:
        pair.start()
        async with Client(pair.target) as client:
            unkeyed = asyncio.create_task(client.generate("a", ignore_eos=True))
            keyed = asyncio.create_task(client.generate("b", ignore_eos=True, key="mine"))
            await _unfinished(client, 2)
            assert pair.sidecar is not None
            code = await asyncio.to_thread(pair.sidecar.stop)
            await asyncio.to_thread(pair.start_sidecar)
            abandoned = (await unkeyed).results[0]
            await asyncio.wait({keyed})
            if isinstance(keyed.exception(), errors.Draining | errors.Disconnected):  # the start took longer than its retries
                keyed = asyncio.create_task(client.generate("b", ignore_eos=True, key="mine"))
            completed = (await keyed).results[0]
            record = await Record().read(client)

        assert code == 0
        assert abandoned.status.code == grpc.StatusCode.ABORTED.value[0]
        assert (completed.HasField("output"), completed.attempt) == (True, 2)
        kinds = {sequence: outcome.kind for sequence, outcome in record.outcomes.items()}
        assert kinds == {abandoned.sequence: ABANDONED, completed.sequence: COMPLETED}


async def test_a_service_that_is_told_to_stop_loses_nothing(rng: random.Random) -> None:
    """SIGTERM of the service under load: it exits with 0, callers are refused or answered, and every item completes."""
    with RecordedPair(service=["--script", SLOW, "--drain-seconds", "0.5"]) as pair:
        pair.start()
        load = Load(lambda: pair.target, jobs(rng, "drain"))
        running = asyncio.create_task(load.run(chaos.CLIENTS))
        await under_way(load)
        assert pair.service is not None
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
