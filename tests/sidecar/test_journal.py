"""The journal's promises, against every backend and through the interface that the sidecar uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from ostinato import chain
from ostinato.chain import FORM, GENESIS, OUTCOMES, payload_digest, sealed, sealed_output
from ostinato.digest import input_digest, output_digest, u64
from ostinato.signature import PublicKeys, inclusion_fault, new_key, signer_of
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.ledger import keyed
from sidecar.journal.model import Appended, Audit, ItemEntries, JournalBroken, Note, Sealed, Unfinished
from sidecar.journal.writer import Journal
from tests.sidecar.journal_kit import (
    FINGERPRINT,
    LOG_ID,
    PARAMETERS,
    SECRET,
    Kit,
    admission,
    audit,
    checked,
    completed,
    ended,
    item,
    prompt,
    sequences,
    twin,
)

DAY = 86_400


class Open:
    """A journal in use."""

    def __init__(self, kit: Kit) -> None:
        self.backend = kit.open()
        self.grouped = Journal(self.backend, now_millis=kit.clock.now_millis)
        self.journal: Journal = self.grouped

    async def admit(self, *items: sequencer_pb2.AdmittedPayload, key: str = "") -> tuple[Sealed, ...]:
        return (await self.journal.append(admission(*items, key=key))).entries


@asynccontextmanager
async def opened(kit: Kit) -> AsyncIterator[Open]:
    using = Open(kit)
    try:
        yield using
    finally:
        await using.journal.close()


@pytest.fixture(name="using")
async def _using(kit: Kit) -> AsyncIterator[Open]:
    async with opened(kit) as using:
        yield using


async def assert_sound(journal: Journal) -> None:
    """Every link and every invariant holds."""
    entries = await journal.entries(1, 10_000, payloads=True)
    head = await journal.head()
    assert (head.index, head.entry_hash) == (entries[-1].header.index, entries[-1].entry_hash)
    checked(entries)


async def test_numbers(using: Open) -> None:
    """A batch takes a contiguous range of sequences, batches take consecutive ones, and indexes have no gap."""
    first = await using.admit(item(), item(), item())
    second = await using.admit(item())

    assert sequences(first) == [1, 2, 3]
    assert sequences(second) == [4]
    assert [(e.header.first_sequence, e.header.count) for e in (*first, *second)] == [(1, 3)] * 3 + [(4, 1)]
    assert [e.header.index for e in (*first, *second)] == [2, 3, 4, 5]
    await assert_sound(using.journal)


async def test_first_entry(using: Open, kit: Kit) -> None:
    """A new journal begins with OPENED of epoch 1, after 32 zero bytes."""
    opened_entry, *others = await using.journal.entries(1, 10, payloads=True)

    header = opened_entry.header
    assert others == []
    assert (header.kind, header.epoch, header.log_id, header.writer) == (types_pb2.ENTRY_KIND_OPENED, 1, LOG_ID, "writer")
    assert header.time_unix_millis == kit.clock.millis
    assert opened_entry.previous_hash == GENESIS
    assert sequencer_pb2.OpenedPayload.FromString(opened_entry.payload).version == "1.0"


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
async def test_given_seed(using: Open, seed: int) -> None:
    """A seed that was given is recorded as it is, 0 and the largest included, and is part of the input digest."""
    (entry,) = await using.admit(item(5, seed=seed))

    payload = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
    (read,) = await using.journal.items(1, 1, 1)
    assert read.admitted == entry
    assert (entry.header.seed, payload.seed, payload.seed_derived) == (seed, seed, False)
    assert entry.header.input_digest == sealed(FORM, payload.nonce, "input", input_digest([5], PARAMETERS, seed))


async def test_derived_seed(using: Open) -> None:
    """An item without a seed gets the one that the log's secret and its sequence give, and no two get the same."""
    entries = await using.admit(item(5), item(5))

    seeds = [int.from_bytes(keyed(SECRET, "seed", u64(sequence))[:8]) for sequence in (1, 2)]
    assert [e.header.seed for e in entries] == seeds
    assert all(sequencer_pb2.AdmittedPayload.FromString(e.payload).seed == e.header.seed for e in entries)
    assert entries[0].header.input_digest != entries[1].header.input_digest


async def test_completed(using: Open) -> None:
    """A COMPLETED entry bears the item's place and input, the attempt, the output's digests and grade, and the fingerprint."""
    (admitted,) = await using.admit(item())
    outcome = completed(admitted, 4, 5, attempt=3)
    (entry,) = (await using.journal.append(outcome)).entries

    header = entry.header
    assert (header.kind, header.sequence, header.attempt) == (types_pb2.ENTRY_KIND_COMPLETED, 1, 3)
    assert (header.seed, header.input_digest) == (admitted.header.seed, admitted.header.input_digest)
    digests = sealed_output(FORM, prompt(admitted).nonce, outcome.payload.output)  # type: ignore[union-attr]
    assert (header.output_digest, header.text_digest) == (digests["output_digest"], digests["text_digest"])
    assert (header.logprobs_digest, header.grade, header.fingerprint_digest) == (b"", types_pb2.GRADE_EXACT, FINGERPRINT)
    assert entry.payload == outcome.payload.SerializeToString(deterministic=True)
    assert header.payload_digest == payload_digest(entry.payload)
    assert (await using.journal.items(1, 1, 1))[0].outcome == entry


@pytest.mark.parametrize("kind", sorted(OUTCOMES - {types_pb2.ENTRY_KIND_COMPLETED}))
async def test_ended(using: Open, kind: types_pb2.EntryKind.ValueType) -> None:
    """An outcome without an output bears seed and input digest too, and no grade."""
    (admitted,) = await using.admit(item())
    (entry,) = (await using.journal.append(ended(admitted, kind))).entries

    header = entry.header
    assert (header.kind, header.seed, header.input_digest) == (kind, admitted.header.seed, admitted.header.input_digest)
    assert (header.grade, header.output_digest, header.attempt) == (types_pb2.GRADE_UNSPECIFIED, b"", 1)


async def test_audited(using: Open) -> None:
    """A verdict is an entry about its item that takes no number and ends nothing."""
    (admitted,) = await using.admit(item())
    (entry,) = (await using.journal.append(audit(admitted))).entries

    assert (entry.header.kind, entry.header.sequence) == (types_pb2.ENTRY_KIND_AUDITED, 1)
    assert sequencer_pb2.AuditedPayload.FromString(entry.payload).comparison.verdict == types_pb2.VERDICT_MATCH
    assert (await using.journal.items(1, 1, 1))[0].outcome is None
    assert sequences(await using.admit(item())) == [2]


async def test_verified(using: Open) -> None:
    """A verdict of kind VERIFY is found with its item; those of other kinds are not part of it."""
    (first, second) = (await using.journal.append(admission(item(1), item(2)))).entries
    await using.journal.append(completed(first))
    await using.journal.append(audit(first, types_pb2.COMPARISON_KIND_REPLAY))
    (verified,) = (await using.journal.append(audit(first, types_pb2.COMPARISON_KIND_VERIFY))).entries

    assert [each.verified for each in await using.journal.items(1, 2, 2)] == [verified, None]
    assert second.header.sequence == 2


async def test_a_canarys_verdict(using: Open) -> None:
    """It names no item, bears the canary's name, and leaves a chain that verifies."""
    comparison = types_pb2.Comparison(kind=types_pb2.COMPARISON_KIND_CANARY, verdict=types_pb2.VERDICT_MATCH)
    header = types_pb2.EntryHeader(form=FORM, seed=5, input_digest=b"i" * 32)
    (entry,) = (await using.journal.append(Audit(header, comparison, b"n" * 16, b"f" * 32, canary="short"))).entries

    assert (entry.header.sequence, entry.header.seed, entry.header.input_digest) == (0, 5, b"i" * 32)
    assert sequencer_pb2.AuditedPayload.FromString(entry.payload).canary == "short"
    await assert_sound(using.journal)


async def test_notes(kit: Kit) -> None:
    """A note is found by how its name begins, replaced by the next of that name, outlives the process, and is no entry."""
    async with opened(kit) as using:
        for name, value in (("a/1", b"old"), ("a/2", b""), ("b/1", b"other"), ("a/1", b"new")):
            assert (await using.journal.append(Note(name, value))).entries == ()
        assert (await using.journal.head()).index == 1
    async with opened(kit) as using:
        assert await using.journal.notes("a/") == {"a/1": b"new", "a/2": b""}
        assert list(await using.journal.notes("")) == ["a/1", "a/2", "b/1"]
        assert await using.journal.notes("%") == {}


async def test_key_is_bound_once(using: Open) -> None:
    """A bound key returns what it stands for and appends nothing, also within one commit and whatever the request is."""
    appends = (using.journal.append(admission(item(), item(), key="k", digest=digest * 32)) for digest in (b"a", b"b", b"a"))
    first, second, third = await asyncio.gather(*appends)
    later = await using.journal.append(admission(key="k"))

    assert sequences(first.entries) == [1, 2]
    assert first.binding is None
    for repeated in (second, third, later):
        assert repeated.entries == ()
        assert repeated.binding is not None
        assert (repeated.binding.request_digest, repeated.binding.first_sequence, repeated.binding.count) == (b"a" * 32, 1, 2)
    assert await using.journal.binding("", "k") == later.binding
    assert (await using.journal.head()).last_sequence == 2


async def test_key_is_scoped_by_tenant(using: Open) -> None:
    """One key of two tenants is two keys, and an empty key binds nothing."""
    for tenant in ("", "a", "b"):
        assert len((await using.journal.append(admission(key="k", tenant=tenant))).entries) == 1
    for _ in range(2):
        assert len((await using.journal.append(admission(tenant="a"))).entries) == 1

    assert [b.first_sequence for t in ("", "a", "b") if (b := await using.journal.binding(t, "k"))] == [1, 2, 3]
    assert await using.journal.binding("c", "k") is None
    assert await using.journal.binding("a", "") is None


def twins(answers: Sequence[Appended]) -> list[tuple[int, str] | None]:
    """Sequence of the first run, and verdict, of each."""
    found = [twin(entry) for answer in answers for entry in answer.entries]
    return [said and (said.expected_sequence, types_pb2.Verdict.Name(said.verdict)) for said in found]


async def test_twin(using: Open) -> None:
    """A COMPLETED entry holds the comparison with the first one of an equal input, also one of the same commit."""
    entries = await using.admit(*(item(1, seed=9) for _ in range(3)), item(1, seed=10))
    answers = await asyncio.gather(*(using.journal.append(completed(entry, 4)) for entry in entries))
    (late,) = await using.admit(item(1, seed=9))
    answers.append(await using.journal.append(completed(late, 4, 5)))

    assert twins(answers) == [None, (1, "VERDICT_MATCH"), (1, "VERDICT_MATCH"), None, (1, "VERDICT_DIVERGED")]
    said = twin(answers[-1].entries[0])
    assert said is not None
    assert (said.sequence, said.first_difference, said.kind) == (5, 1, types_pb2.COMPARISON_KIND_TWIN)
    assert (said.expected_writer, said.grade) == ("writer", types_pb2.GRADE_EXACT)
    assert said.actual_output_digest == output_digest(
        types_pb2.Output(token_ids=[4, 5], finish_reason=types_pb2.FINISH_REASON_LENGTH)
    )


async def test_twin_of_one_fingerprint(using: Open) -> None:
    """The first one under the same fingerprint is preferred; without one it is the first of all, and that is drift."""
    entries = await using.admit(*(item(1, seed=9) for _ in range(4)))
    outcomes = [completed(entry, fingerprint=name * 32) for entry, name in zip(entries, (b"a", b"b", b"b", b"a"), strict=True)]
    answers = [await using.journal.append(outcome) for outcome in outcomes]

    assert twins(answers) == [None, (1, "VERDICT_INCOMPARABLE"), (2, "VERDICT_MATCH"), (1, "VERDICT_MATCH")]


async def test_items(using: Open) -> None:
    """Items are read by their numbers, ascending, as many as wanted; numbers that were never given are left out."""
    entries = await using.admit(*(item(n) for n in range(1, 6)))
    (outcome,) = (await using.journal.append(completed(entries[1]))).entries

    async def read(first: int, last: int, limit: int = 100) -> list[int]:
        return [found.admitted.header.sequence for found in await using.journal.items(first, last, limit)]

    assert await read(2, 4) == [2, 3, 4]
    assert await read(0, 2**64 - 1) == [1, 2, 3, 4, 5]
    assert await read(1, 5, 2) == [1, 2]
    assert await read(6, 2**63) == await read(2**63, 2**64 - 1) == await read(4, 3) == []
    assert [found.outcome for found in await using.journal.items(1, 3, 3)] == [None, outcome, None]
    for bounds, expected in (((1, 5, 9), [1, 3, 4, 5]), ((2, 2**64 - 1, 2), [3, 4]), ((2, 2, 9), []), ((6, 9, 9), [])):
        assert sequences(await using.journal.unfinished(*bounds)) == expected


async def test_entries(using: Open) -> None:
    """Entries are read by index, with their payloads or without; beyond the head there are none."""
    admitted = await using.admit(item(), item())

    assert tuple(await using.journal.entries(2, 10, payloads=True)) == admitted
    assert [len(e.payload) for e in await using.journal.entries(2, 1, payloads=False)] == [0]
    assert (await using.journal.entries(2, 1, payloads=False))[0].previous_hash == admitted[0].previous_hash
    for index in (4, 2**63, 2**64 - 1):
        assert await using.journal.entries(index, 10, payloads=True) == []


async def test_reopen(kit: Kit) -> None:
    """A journal that is opened again goes on where it was, in the next epoch, and hands over what has not ended."""
    async with opened(kit) as using:
        first, second, third = await using.admit(item(), item(), item())
        await using.journal.append(completed(second))
        before = await using.journal.head()
        assert using.backend.to_recover == []
    async with opened(kit) as using:
        assert using.backend.to_recover == [Unfinished(first, 2), Unfinished(third, 2)]
        head = using.backend.head
        assert (head.log_id, head.epoch, head.index, head.last_sequence) == (LOG_ID, 2, before.index + 1, 3)
        assert sequences(await using.admit(item(), key="k")) == [4]
        await assert_sound(using.journal)
    async with opened(kit) as using:
        assert [(one.admitted.header.sequence, one.attempt) for one in using.backend.to_recover] == [(1, 3), (3, 3), (4, 2)]
        assert (await using.journal.binding("", "k")) is not None
        assert sequencer_pb2.AdmittedPayload.FromString(using.backend.to_recover[2].admitted.payload).idempotency_key == "k"


async def test_log_id_stays(kit: Kit) -> None:
    """The log id that a journal was made with is its name for good."""
    kit.open().close()
    journal = kit.open(log_id="f" * 32)
    journal.close()

    assert journal.head.log_id == LOG_ID


async def test_order_of_calls(using: Open) -> None:
    """Appends take effect in the order of the calls, and are answered in it."""
    answered: list[int] = []

    async def append(number: int) -> int:
        (entry,) = await using.admit(item(number))
        answered.append(number)
        return entry.header.sequence

    numbers = await asyncio.gather(*(append(number) for number in range(1, 600)))

    assert numbers == answered == list(range(1, 600))
    await assert_sound(using.journal)


async def test_reads_see_earlier_appends(using: Open) -> None:
    """A read sees every append that was called before it, answered or not."""
    for expected in range(1, 20):
        append = asyncio.ensure_future(using.admit(item(), key=f"k{expected}"))
        await asyncio.sleep(0)
        assert (await using.journal.head()).last_sequence == expected
        binding = await using.journal.binding("", f"k{expected}")
        assert binding is not None
        assert binding.first_sequence == expected
        await append


async def test_cancelled_caller(using: Open) -> None:
    """A caller that is cancelled while it appends loses the answer, not the draft, nor its place."""
    tasks = [asyncio.ensure_future(using.admit(item(number))) for number in range(1, 10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [n % 2 == 0 for n in range(9)]
    items = await using.journal.items(1, 100, 100)
    assert [sequencer_pb2.AdmittedPayload.FromString(i.admitted.payload).token_ids[0] for i in items] == list(range(1, 10))


async def test_wait(using: Open) -> None:
    """Waiting for an index ends when an entry with it is durable: at once, if it is already."""
    await using.journal.wait(1)
    waiting = [asyncio.ensure_future(using.journal.wait(index)) for index in (2, 2, 3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)

    await using.admit(item())
    await asyncio.gather(*waiting[:2])
    assert not waiting[2].done()
    await using.admit(item())
    await waiting[2]


async def test_close(kit: Kit) -> None:
    """Closing appends what waits; a call after that, or a wait that cannot end, is told so."""
    using = Open(kit)
    appends = [asyncio.ensure_future(using.admit(item())) for _ in range(600)]
    waiting = asyncio.ensure_future(using.journal.wait(10_000))
    await asyncio.sleep(0)
    await asyncio.gather(using.journal.close(), using.journal.close())

    assert [(await append)[0].header.sequence for append in appends] == list(range(1, 601))
    for call in (waiting, using.admit(item()), using.journal.head(), using.journal.wait(10_000)):
        with pytest.raises(JournalBroken, match="closed"):
            await call
    assert not using.grouped.broken.done()


async def test_stale_epoch(using: Open, kit: Kit) -> None:
    """A writer whose epoch has been taken over appends nothing more, and knows that it has to end."""
    await using.admit(item())
    kit.fence(using.backend)

    with pytest.raises(JournalBroken, match="fenced"):
        await using.admit(item())
    assert "fenced" in str(await using.grouped.broken)
    with pytest.raises(JournalBroken):
        await using.admit(item())


async def test_signed(kit: Kit) -> None:
    """Every transaction is signed by the key of its epoch. An outcome has the head that covers it, the same when it is read,
    after another key, and beside transactions without one."""
    keys = [signer_of(new_key()) for _ in range(2)]
    public = PublicKeys()
    made = list[Sealed]()
    read: Sequence[ItemEntries] = ()
    for signer in (None, *keys, None):
        kit.configure(signer=signer)
        async with opened(kit) as using:
            entries = [*await using.admit(item(1), item(2)), *await using.admit(item(3))]
            ends = await asyncio.gather(*(using.journal.append(completed(each)) for each in entries))
            made += [each.entries[0] for each in ends]
            newest, head = await using.journal.newest_signed(), await using.journal.head()

            assert (newest is None) if signer is None and len(made) == 3 else newest is not None
            if signer is not None:
                public.add(signer.public_pem.encode())
                assert newest is not None
                assert (newest.key_id, newest.last_index, newest.entry_hash) == (signer.key_id, head.index, head.entry_hash)
            read = await using.journal.items(1, 100, 100)
    trees = [(before.signed, after.outcome) for before, after in zip(made, read, strict=True)]

    assert [tree.head.key_id if tree is not None else "" for tree, _ in trees] == [
        *[""] * 3, *[keys[0].key_id] * 3, *[keys[1].key_id] * 3, *[""] * 3
    ]  # fmt: skip
    for tree, after in trees:
        assert after is not None
        receipts = [chain.receipt(after.header, after.previous_hash, after.entry_hash, b"") for _ in range(2)]
        assert (tree is None) == (after.signed is None)
        if tree is not None and after.signed is not None:
            tree.put_into(receipts[0])
            after.signed.put_into(receipts[1])
            assert receipts[0] == receipts[1]
            assert inclusion_fault(receipts[0]) == ""
            assert public.verify(receipts[0].head)


async def test_large_transactions_are_signed_in_parts(kit: Kit) -> None:
    """A head covers a bounded number of entries, so that a receipt is read in a bounded time: the heads of a large transaction
    follow each other to its end, and each receipt has the one that covers it."""
    kit.configure(signer=signer_of(new_key()))
    journal = kit.open()
    batches = [admission(*(item(n) for n in range(600))) for _ in range(3)]
    (first,) = journal.append_many([admission(item())], 1)
    ended_ = journal.append_many([completed(first.entries[0]), *batches, completed(first.entries[0])], 2)[0].entries[0]
    late = journal.append_many([*batches, completed(journal.entries(4, 1, payloads=True)[0])], 3)[-1].entries[0]
    newest = journal.newest_signed()
    with contextlib.closing(journal):
        read = [each.outcome for each in journal.items(1, 2, 2)]
    trees = [each.signed for each in (ended_, late, *read) if each is not None and each.signed is not None]

    assert [(tree.head.first_index, tree.head.last_index) for tree in trees] == [
        (3, 1026),
        (2828, 3604),
        (3, 1026),
        (2828, 3604),
    ]
    assert newest == trees[1].head
