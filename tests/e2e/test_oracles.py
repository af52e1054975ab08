"""A rival: a tenant who knows how everything is computed, and wants to know what another tenant asks. It learns nothing.

Each attack tests guesses, the right one among them, against what the rival is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostinato import chain, digest, errors
from ostinato.client import Client
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.kit import asked, numbered, tenants
from tests.pair import Pair

SECRET, GUESSES = "the merger", ("the weather", "the merger", "the match")
CLOCKS_MILLIS = 3_000
"""How well the rival knows the victim's time."""


@dataclass(frozen=True)
class Callers:
    """Two tenants, and the admin, at a sidecar."""

    rival: Client
    victim: Client
    admin: Client
    pair: Pair


@asynccontextmanager
async def callers(folder: Path, *flags: str, delay_seconds: float = 0.0) -> AsyncIterator[Callers]:
    with tenants(folder, "rival", "acme", sidecar=flags, delay_seconds=delay_seconds) as at:
        async with at.client("rival") as rival, at.client("acme") as victim, at.client("ops") as admin:
            yield Callers(rival, victim, admin, at.pair)


def inputs(given: sequencer_pb2.AdmittedPayload, seeds: Sequence[int]) -> Iterator[sequencer_pb2.AdmittedPayload]:
    """What the victim may have been admitted with, as the rival was: the scripted engine's tokens are the text's bytes."""
    for prompt in GUESSES:
        for seed in seeds:
            guess = sequencer_pb2.AdmittedPayload()
            guess.CopyFrom(given)
            guess.token_ids[:] = [*given.token_ids[: len(given.token_ids) - len("x")], *prompt.encode()]
            guess.seed, guess.tenant = seed, "acme"
            guess.request_digest = digest.request_digest(asked(prompt, max_new_tokens=8))
            yield guess


async def test_a_receipts_previous_hash_tests_no_guess(tmp_path: Path) -> None:
    """The entry before a tenant's own is another tenant's. Its hash covers digests of the prompt, and shows none of it."""
    async with callers(tmp_path, delay_seconds=0.05) as here:
        before = (await here.rival.generate("x", max_new_tokens=8)).results[0]
        around = asyncio.create_task(here.rival.generate("x", max_new_tokens=8))
        await numbered(here.admin, 2)
        theirs = asyncio.create_task(here.victim.generate(SECRET, max_new_tokens=8))
        own_result = (await around).results[0]
        (record,) = await here.rival.get(own_result.sequence)
        await theirs
        entries = [entry async for entry in here.admin.tail()]

    known = chain.entry_hash(before.receipt.entry_hash, record.admitted)
    header = types_pb2.EntryHeader()
    header.CopyFrom(record.admitted)
    header.index, header.sequence = header.index + 1, header.sequence + 1
    header.first_sequence = header.sequence
    admitted = entries[header.index - 1].header
    assert (admitted.kind, admitted.sequence) == (header.kind, header.sequence), "or the rival guesses at another entry"
    assert own_result.receipt.header.index == header.index + 1
    found = []
    known_to_all = digest.sampling_hash("seed", header.log_id, header.sequence)  # what a derived seed was, in an older form
    for guess in inputs(record.input, [known_to_all, admitted.seed]):
        header.seed = guess.seed
        header.input_digest = digest.input_digest(guess.token_ids, guess.parameters, guess.seed)
        header.payload_digest = chain.payload_digest(guess.SerializeToString(deterministic=True))
        for header.time_unix_millis in range(admitted.time_unix_millis - CLOCKS_MILLIS, admitted.time_unix_millis + 1):
            if chain.entry_hash(known, header) == own_result.receipt.previous_hash:
                found.append(list(guess.token_ids))
    assert found == []


@pytest.mark.parametrize("joined", [False, True])
async def test_no_verdict_is_about_another_tenants_item(tmp_path: Path, joined: bool) -> None:
    """Neither a twin nor a collision is counted or recorded for the prompt of another tenant, unless the two are joined."""
    flags = ("--joined-tenants", "acme+rival") if joined else ()
    async with callers(tmp_path, *flags) as here:
        for caller in (here.victim, here.rival):
            for seed in (7, None):
                await caller.generate(SECRET, seed=seed, max_new_tokens=128, ignore_eos=True)  # enough for a collision check
        metrics = here.pair.metrics()
        entries = [entry async for entry in here.admin.tail(payloads=True)]

    completed = [
        sequencer_pb2.CompletedPayload.FromString(entry.payload)
        for entry in entries
        if entry.header.kind == types_pb2.ENTRY_KIND_COMPLETED
    ]
    compared = sum(count for name, count in metrics.items() if name.startswith("ostinato_comparisons_total{"))
    assert [each.HasField("twin") for each in completed] == [False, False, joined, False]
    assert [each.collision != sequencer_pb2.COLLISION_UNSPECIFIED for each in completed] == [False, False, False, joined]
    assert compared == joined


async def test_a_tenants_verdicts_do_not_count_others(tmp_path: Path) -> None:
    """How many runs the engine held is in a replay's verdict for an admin; not in a tenant's, nor in that of its answer."""
    async with callers(tmp_path) as here:
        answer = await here.rival.generate("x", verify=True)
        told = [answer.results[0].comparison]
        for caller in (here.rival, here.admin):
            told += [each.comparison async for each in caller.replay(answer.stamp.first_sequence)]

    assert [each.verdict for each in told] == [types_pb2.VERDICT_MATCH] * 3
    assert [each.company for each in told] == [0, 0, 1]


async def test_a_tenant_is_not_told_the_newest_sequence(tmp_path: Path) -> None:
    """A range that reaches beyond a tenant's own items is refused in the same words, whether others have such items or not."""
    async with callers(tmp_path) as here:
        mine = (await here.rival.generate("x", max_new_tokens=8)).stamp.first_sequence
        told = [await _told(here.rival, mine)]
        for _ in range(3):
            await here.victim.generate(SECRET, max_new_tokens=8)
            told.append(await _told(here.rival, mine))
        admin = await _message(here.admin.cancel(1, 99))

    assert told == [told[0]] * 4
    assert set(told[0]) == {f"no sequence {mine + 1}", "no sequence 1000"}
    assert admin == f"the newest sequence is {mine + 3}"


async def _told(caller: Client, mine: int) -> list[str]:
    """The refusals of a tenant who has one item and asks beyond it."""
    ranges = ((mine, mine + 1), (mine, 1000), (1000, 1000))
    calls: list[Awaitable[object]] = [caller.cancel(first, last) for first, last in ranges]
    calls += [anext(caller.replay(first, last)) for first, last in ranges]
    return [await _message(call) for call in calls]


async def _message(call: Awaitable[object]) -> str:
    with pytest.raises(errors.NotFound) as refused:
        await call
    return refused.value.message
