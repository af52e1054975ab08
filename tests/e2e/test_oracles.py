"""A rival: a tenant who knows how everything is computed, and wants to know what another tenant asks. It learns nothing.

Each attack tests guesses, the right one among them, against what the rival is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ostinato import chain, digest, errors
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2
from serving import auth
from serving.auth import Role

from tests.e2e.kit import Door, own, refusal, span

SECRET, GUESSES = "the merger", ("the weather", "the merger", "the match")
CLOCKS_MILLIS = 3_000
"""How well the rival knows the victim's time."""
SILENT = ("--canary-seconds", "0", "--audit-rate", "0")


@dataclass(frozen=True)
class Caller:
    """A tenant, or the admin, at a sidecar."""

    door: Door
    token: str

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", f"Bearer {self.token}"),)

    async def ask(self, *prompts: str, **parameters: Any) -> generation_pb2.GenerateResponse:
        request = generation_pb2.GenerateRequest(
            items=[types_pb2.Item(text=prompt) for prompt in prompts], parameters=types_pb2.Parameters(**parameters)
        )
        response: generation_pb2.GenerateResponse = await self.door.generation.Generate(request, metadata=self.metadata)
        return response

    async def get(self, sequence: int) -> sequencer_pb2.ItemRecord:
        response = await self.door.sequencer.Get(sequencer_pb2.GetRequest(sequence=sequence), metadata=self.metadata)
        return response.items[0]

    async def tail(self) -> list[sequencer_pb2.Entry]:
        pages = self.door.sequencer.Tail(sequencer_pb2.TailRequest(), metadata=self.metadata)
        return [entry async for page in pages for entry in page.entries]


@dataclass(frozen=True)
class Callers:
    rival: Caller
    victim: Caller
    admin: Caller


@asynccontextmanager
async def callers(folder: Path, *flags: str, delay_seconds: float = 0.0) -> AsyncIterator[Callers]:
    made = [auth.new_token(name, role) for name, role in (("rival", Role.TENANT), ("acme", Role.TENANT), ("ops", Role.ADMIN))]
    listed = folder / "tokens"
    listed.touch(mode=0o600)
    listed.write_text("\n".join(line for _, line in made))
    async with own("--tokens", str(listed), *SILENT, *flags, delay_seconds=delay_seconds) as door:
        yield Callers(*(Caller(door, token) for token, _ in made))


def inputs(given: sequencer_pb2.AdmittedPayload, seeds: Sequence[int]) -> Iterator[sequencer_pb2.AdmittedPayload]:
    """What the victim may have been admitted with, as the rival was: the scripted engine's tokens are the text's bytes."""
    for prompt in GUESSES:
        for seed in seeds:
            guess = sequencer_pb2.AdmittedPayload()
            guess.CopyFrom(given)
            guess.token_ids[:] = [*given.token_ids[: len(given.token_ids) - len("x")], *prompt.encode()]
            guess.seed, guess.tenant = seed, "acme"
            guess.request_digest = digest.request_digest(
                generation_pb2.GenerateRequest(
                    items=[types_pb2.Item(text=prompt)], parameters=types_pb2.Parameters(max_new_tokens=8)
                )
            )
            yield guess


def public_seed(log_id: str, sequence: int) -> int:
    """What a derived seed was, for all who knew the log's id."""
    return digest.sampling_hash("seed", log_id, sequence)


async def test_a_receipts_previous_hash_tests_no_guess(tmp_path: Path) -> None:
    """The entry before a tenant's own is another tenant's. Its hash covers digests of the prompt, and shows none of it."""
    async with callers(tmp_path, delay_seconds=0.05) as here:
        before = (await here.rival.ask("x", max_new_tokens=8)).results[0]
        around = asyncio.create_task(here.rival.ask("x", max_new_tokens=8))
        await asyncio.sleep(0.15)
        theirs = asyncio.create_task(here.victim.ask(SECRET, max_new_tokens=8))
        own_result = (await around).results[0]
        record = await here.rival.get(own_result.sequence)
        await theirs
        entries = await here.admin.tail()

    known = chain.entry_hash(before.receipt.entry_hash, record.admitted)
    header = types_pb2.EntryHeader()
    header.CopyFrom(record.admitted)
    header.index, header.sequence = header.index + 1, header.sequence + 1
    header.first_sequence = header.sequence
    admitted = entries[header.index - 1].header
    assert (admitted.kind, admitted.sequence) == (header.kind, header.sequence), "or the rival guesses at another entry"
    assert own_result.receipt.header.index == header.index + 1
    found = []
    for guess in inputs(record.input, [public_seed(header.log_id, header.sequence), admitted.seed]):
        header.seed = guess.seed
        header.input_digest = digest.input_digest(guess.token_ids, guess.parameters, guess.seed)
        header.payload_digest = chain.payload_digest(guess.SerializeToString(deterministic=True))
        for header.time_unix_millis in range(admitted.time_unix_millis - CLOCKS_MILLIS, admitted.time_unix_millis + 1):
            if chain.entry_hash(known, header) == own_result.receipt.previous_hash:
                found.append(list(guess.token_ids))
    assert found == []


async def test_a_chain_without_payloads_is_no_dictionary(tmp_path: Path) -> None:
    """Who reads the entries without their payloads, and knows all seeds, finds no prompt and no answer by trying."""
    async with callers(tmp_path) as here:
        own_result = (await here.rival.ask("x", max_new_tokens=8)).results[0]
        answer = (await here.victim.ask(SECRET, max_new_tokens=8)).results[0]
        await here.victim.ask(SECRET, max_new_tokens=8, seed=7)
        record = await here.rival.get(own_result.sequence)
        headers = [entry.header for entry in await here.admin.tail()]

    shown = {each for header in headers for each in (header.input_digest, header.output_digest, header.payload_digest) if each}
    guesses = inputs(record.input, [header.seed for header in headers if header.seed])
    assert [
        list(each.token_ids) for each in guesses if digest.input_digest(each.token_ids, each.parameters, each.seed) in shown
    ] == []
    assert digest.output_digest(answer.output) not in shown
    inputs_shown = [header.input_digest for header in headers if header.kind == types_pb2.ENTRY_KIND_ADMITTED]
    assert len(set(inputs_shown)) == len(inputs_shown) == 3


async def test_a_derived_seed_is_not_derived_by_others(tmp_path: Path) -> None:
    """The log's id and a sequence, which every caller has, do not give the seed of that item."""
    async with callers(tmp_path) as here:
        stamp = (await here.rival.ask("x", max_new_tokens=8)).stamp
        theirs = (await here.victim.ask(SECRET, max_new_tokens=8)).results[0]

    assert theirs.sequence == stamp.first_sequence + 1
    assert theirs.output.seed != public_seed(stamp.log_id, theirs.sequence)


@pytest.mark.parametrize("joined", [False, True])
async def test_no_verdict_is_about_another_tenants_item(tmp_path: Path, joined: bool) -> None:
    """Neither a twin nor a collision is counted or recorded for the prompt of another tenant, unless the two are joined."""
    flags = ("--joined-tenants", "acme+rival") if joined else ()
    async with callers(tmp_path, *flags) as here:
        asked = {"max_new_tokens": 128, "ignore_eos": True}  # enough choice for a collision check
        for caller in (here.victim, here.rival):
            await caller.ask(SECRET, seed=7, **asked)
            await caller.ask(SECRET, **asked)
        metrics = here.admin.door.pair.metrics()
        pages = here.admin.door.sequencer.Tail(sequencer_pb2.TailRequest(payloads=True), metadata=here.admin.metadata)
        entries = [entry async for page in pages for entry in page.entries]

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
        request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="x")], verify=True)
        answer = await here.rival.door.generation.Generate(request, metadata=here.rival.metadata)
        sequence = answer.stamp.first_sequence
        replay = sequencer_pb2.ReplayRequest(range=generation_pb2.SequenceRange(first=sequence, last=sequence))
        told = [answer.results[0].comparison]
        for caller in (here.rival, here.admin):
            told += [each.comparison async for each in caller.door.sequencer.Replay(replay, metadata=caller.metadata)]

    assert [each.verdict for each in told] == [types_pb2.VERDICT_MATCH] * 3
    assert [each.company for each in told] == [0, 0, 1]


async def test_a_tenant_is_not_told_the_newest_sequence(tmp_path: Path) -> None:
    """A range that reaches beyond a tenant's own items is refused in the same words, whether others have such items or not."""
    async with callers(tmp_path) as here:
        mine = (await here.rival.ask("x", max_new_tokens=8)).stamp.first_sequence
        told = [await _told(here.rival, mine)]
        for _ in range(3):
            await here.victim.ask(SECRET, max_new_tokens=8)
            told.append(await _told(here.rival, mine))
        admin = await refusal(here.admin.door.generation.Cancel(span(1, 99), metadata=here.admin.metadata))

    assert told == [told[0]] * 4
    assert set(told[0]) == {f"no sequence {mine + 1}", "no sequence 1000"}
    assert (admin.reason, admin.message) == (errors.NotFound.reason, f"the newest sequence is {mine + 3}")


async def _told(caller: Caller, mine: int) -> list[str]:
    """The refusals of a tenant who has one item and asks beyond it."""
    door, metadata = caller.door, caller.metadata
    calls: list[Awaitable[object]] = [door.generation.Cancel(span(mine, last), metadata=metadata) for last in (mine + 1, 1000)]
    calls.append(door.generation.Cancel(span(1000, 1000), metadata=metadata))
    for first, last in ((mine, mine + 1), (mine, 1000), (1000, 1000)):
        request = sequencer_pb2.ReplayRequest(range=generation_pb2.SequenceRange(first=first, last=last))
        calls.append(door.sequencer.Replay(request, metadata=metadata).read())
    return [(await refusal(call)).message for call in calls]
