"""Replays: exclusive ones, across fingerprints, and at another sidecar."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ostinato.client import Client
from ostinato.replay import replay_against
from ostinato.requests import Sampling
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.kit import Door, eventually, own

MATCH, DIVERGED, INCOMPARABLE = types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED, types_pb2.VERDICT_INCOMPARABLE
ASKED = Sampling(seed=2**64 - 1, temperature=0.0, max_new_tokens=8, ignore_eos=True, logprobs=2)


async def restarted(door: Door, **script: Any) -> None:
    """Restart the service with this script, behind the same sidecar."""
    before = (await door.client.model()).fingerprint
    await asyncio.to_thread(door.pair.service.kill)
    door.pair.start_service("--script", json.dumps(script))

    async def another() -> bool:
        try:
            return (await door.client.model()).fingerprint != before
        except Exception:  # noqa: BLE001  # while nobody is there
            return False

    await eventually(another, "the new service is connected")


async def all_of(source: Any) -> list[sequencer_pb2.ReplayResponse]:
    return [response async for response in source]


async def test_an_exclusive_replay() -> None:
    """A replay under load shows an engine that diverges beside other runs; an exclusive one matches."""
    rule = {"do": "diverge", "at": 3, "purposes": ["REPLAY"], "company": True}
    async with own(delay_seconds=0.002, rules=[rule]) as door:
        stamp = (await door.client.generate(["a", "b", "c", "d"], **ASKED)).stamp
        last = stamp.first_sequence + stamp.count - 1
        stop = asyncio.Event()

        async def background_load() -> None:
            while not stop.is_set():
                await door.client.generate("background_load", max_new_tokens=16, ignore_eos=True)
                await asyncio.sleep(0.02)

        company = asyncio.create_task(background_load())
        beside = await all_of(door.client.replay(stamp.first_sequence, last, concurrency=4))
        alone = await all_of(door.client.replay(stamp.first_sequence, last, alone=True))
        stop.set()
        await company

    assert DIVERGED in {each.comparison.verdict for each in beside}
    assert [each.comparison.verdict for each in alone] == [MATCH] * 4


async def test_items_that_are_passed_over() -> None:
    """Items that have not completed are listed and not run. The counts add up. A divergence comes with the record."""
    rules = [
        {"do": "fail", "at": 0, "sequences": [2, 4]},
        {"do": "diverge", "at": 3, "sequences": [5], "purposes": ["REPLAY"]},
    ]
    async with own(rules=rules) as door:
        results = (await door.client.generate(list("abcdef"), **ASKED)).results
        said = await all_of(door.client.replay(2, 2**64 - 1))
        [record] = await door.client.get(5)
        assert await door.last_sequence() == 6, "a replay takes no number"

    assert {each.total for each in said} == {5}
    assert max(each.seen for each in said) == 5
    assert [sequence for each in said for sequence in each.passed_over] == [2, 4]
    [differing] = [each for each in said if each.HasField("record")]
    assert (differing.comparison.sequence, differing.comparison.first_difference) == (5, 3)
    assert differing.record == record
    assert differing.record.result.output == results[4].output
    assert differing.comparison.actual.token_ids[:3] == results[4].output.token_ids[:3]


async def test_drift_names_its_fields_also_after_a_restart() -> None:
    """After a restart of both programs, a replay and a twin on another device name that field, and the first difference."""
    before, after = {"device": "abacus", "driver": "1"}, {"device": "loom", "threads": "2", "driver": "1"}
    differs = [{"do": "diverge", "at": 3, "sequences": [1], "purposes": ["REPLAY"]}]
    fields = ["fingerprint.device", "fingerprint.threads"]
    async with own(fields=before) as door:
        await door.client.generate("a", **ASKED)
        await restarted(door, fields=after, rules=differs)
        await asyncio.to_thread(door.pair.sidecar.stop)
        await asyncio.to_thread(door.pair.start_sidecar)
        async with Client(door.pair.target) as client:
            await eventually(lambda: bool(door.pair.metrics()["ostinato_engine_connected"]), "the engine is connected")
            twin = (await client.generate("a", **ASKED)).results[0]
            said = await all_of(client.replay(1, 2))
            [record] = await client.get(1)
            payloads = [entry.payload async for entry in client.tail(payloads=True) if entry.header.sequence == twin.sequence]

    first, second = sorted(said, key=lambda each: each.comparison.sequence)
    assert (first.comparison.verdict, list(first.comparison.drift)) == (INCOMPARABLE, fields)
    assert (first.comparison.first_difference, first.record.result.output.seed) == (3, 2**64 - 1)
    assert second.comparison.verdict == MATCH
    assert dict(record.fingerprint.fields).items() >= before.items()
    assert list(sequencer_pb2.CompletedPayload.FromString(payloads[1]).twin.drift) == fields


async def test_another_sidecar_runs_the_record() -> None:
    """A record can be run at another sidecar, where it gets sequences: it matches there, or the drifted fields are named."""
    async with own(fields={"device": "abacus"}) as here, own(fields={"device": "loom"}) as there:
        await here.client.generate(["a", "b"], **ASKED)
        await here.client.generate(["c", "d"], max_new_tokens=5, stop=["zz"], temperature=0.3, top_k=7)
        itself = await all_of(replay_against(here.client, here.client, 1, 2**64 - 1))
        other = await all_of(replay_against(here.client, there.client, 2, 4))
        assert (await here.last_sequence(), await there.last_sequence()) == (8, 3)

    assert {each.comparison.verdict for each in itself} == {MATCH}
    assert sorted(each.comparison.sequence for each in itself) == [1, 2, 3, 4]
    assert {(each.comparison.verdict, *each.comparison.drift) for each in other} == {(INCOMPARABLE, "fingerprint.device")}
    assert not any(each.comparison.HasField("first_difference") for each in other)
