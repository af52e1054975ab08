"""Sidecars that share a log: real processes, one PostgreSQL server, and kills."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AbstractContextManager

import pytest

from ostinato.client import Client
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.kit import numbered
from tests.postgres import Postgres
from tests.soak import chaos, shared
from tests.soak.checks import ABANDONED, COMPLETED, Record
from tests.soak.recording import RecordedPair
from tests.waiting import eventually

SLOW = json.dumps({"rules": [{"do": "delay", "at": 1, "seconds": 0.7}]})
HANGING = json.dumps({"rules": [{"do": "hang", "at": 1, "attempts": [1]}]})
"""Every run makes one token, and no more before its second attempt."""


def started(url: str, script: str) -> AbstractContextManager[list[RecordedPair]]:
    return shared.pairs_on(url, "a", "b", script=script, lease_seconds=0.5)


async def test_a_key_is_one_key_everywhere(postgres: Postgres) -> None:
    """A key that one sidecar works on is joined at another one, unary and streamed, and answered alike, byte for byte; an
    equal input of another sidecar is a twin."""
    url = postgres.url(postgres.schema())
    with started(url, SLOW) as (a, b):
        async with Client(a.target) as at_a, Client(b.target) as at_b:
            asked = asyncio.create_task(at_a.generate(["x", "y"], seed=1, key="k"))
            await numbered(at_b, 2)
            joined = asyncio.create_task(at_b.generate(["x", "y"], seed=1, key="k"))
            events = [event async for event in at_b.stream(["x", "y"], seed=1, key="k")]
            first, second = await asked, await joined
            other = await at_b.generate("x", seed=1)
            heads = [await at_a.head(), await at_b.head()]
            entries = [entry async for entry in at_a.tail(payloads=True)]

    assert [result.SerializeToString(deterministic=True) for result in first.results] == [
        result.SerializeToString(deterministic=True) for result in second.results
    ]
    assert second.stamp == first.stamp
    assert second.stamp.writer == "a"
    assert [event.finished for event in events if event.HasField("finished")] == list(first.results)
    assert events[0].admitted.repeated_key
    assert other.results[0].sequence == 3
    assert other.results[0].receipt.header.writer == "b"
    twin = sequencer_pb2.CompletedPayload.FromString(entries[-1].payload).twin
    assert (twin.expected_sequence, twin.expected_writer, twin.verdict) == (1, "a", types_pb2.VERDICT_MATCH)
    assert heads[0].entry_hash == heads[1].entry_hash
    assert {head.log_id for head in heads} == {first.stamp.log_id}


async def test_a_dead_sidecar_is_taken_over(postgres: Postgres) -> None:
    """When a dead sidecar's lease has expired, another one runs its keyed items under the same numbers and answers the
    callers that wait there; an unkeyed one is ABANDONED. When the first one restarts, nothing is left to do."""
    url = postgres.url(postgres.schema())
    with started(url, HANGING) as (a, b):
        async with Client(a.target) as at_a, Client(b.target) as at_b:
            asked = asyncio.create_task(at_a.generate(["x", "y"], key="k"))
            await numbered(at_b, 2)
            unkeyed = asyncio.create_task(at_a.generate("z"))
            await numbered(at_b, 3)
            joined = asyncio.create_task(at_b.generate(["x", "y"], key="k"))
            await eventually(lambda: b.metrics()["ostinato_repeated_requests_total"] == 1, "it waits for the same answer")
            await asyncio.to_thread(a.sidecar.kill)
            answer = await joined
            asked.cancel()  # at one that does not come back, it would try for a minute
            await asyncio.gather(asked, unkeyed, return_exceptions=True)
            record = await Record().read(at_b)
            again = await asyncio.to_thread(a.start_sidecar)
            epoch = again.wait_for("listening")["epoch"]
        metrics = b.metrics()

    assert [(result.sequence, result.attempt) for result in answer.results] == [(1, 2), (2, 2)]
    assert answer.stamp.writer == "a"
    assert metrics["ostinato_taken_over_items_total"] == 3
    assert {number: outcome.kind for number, outcome in record.outcomes.items()} == {1: COMPLETED, 2: COMPLETED, 3: ABANDONED}
    assert {outcome.writer for outcome in record.outcomes.values()} == {"b"}
    assert epoch == "3"


@pytest.mark.timeout(180)
async def test_promises_hold_while_sidecars_die(postgres: Postgres) -> None:
    """Three sidecars, six clients that send keyed batches to any of them, kill -9 of sidecars and of the server, and a sidecar
    that stands still past its lease: numbers are gapless, every item has one outcome, what was acknowledged is there, no
    attempt ran twice, and the chain verifies."""
    rng = random.Random(chaos.seed())
    with shared.sidecars(postgres, rng) as together:
        load, record, faults = await shared.chapter(together, rng, kills=1, pauses=1, crashes=1)

    assert faults == []
    assert len({header.writer for header in record.admitted.values()}) == 3
    assert any(call.repeated for call in load.calls)
