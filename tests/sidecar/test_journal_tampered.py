"""A journal whose tables were changed beside the sidecar: what is read, what a start finds, and what verify finds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import apsw
import pytest

from ostinato.errors import RecordDamaged
from ostinato.signature import new_key, signer_of
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.maintenance import prune, rebuild, redact
from sidecar.journal.model import Binding, Draft, ItemEntries, JournalBroken, JournalUnusable, Loss, Note
from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store
from sidecar.journal.transfer import export
from sidecar.journal.writer import Journal
from sidecar.opening import open_for_maintenance
from tests.sidecar.journal_kit import FIRST_VERSION, Kit, PostgresKit, SqliteKit, admission, audit, completed, item, twin


def tamper(kit: Kit, store: Store, statement: str) -> None:
    """In the database, as someone who can write its files."""
    if isinstance(kit, PostgresKit):
        kit.execute(statement)
    else:
        assert isinstance(store, SqliteStore)
        assert store._db.execute(statement).fetchall() == []
        assert store._db.changes()


DAMAGED: list[str] = []


@asynccontextmanager
async def filled(kit: Kit, statement: str = "") -> AsyncIterator[Journal]:
    """Two keyed batches of two tenants, the first of two items; all items have ended."""
    DAMAGED.clear()
    with kit.opened() as store:
        now = kit.clock.millis
        answers = store.append_many(
            [admission(item(1), item(2), key="k", tenant="a"), admission(item(3, seed=3), key="other", tenant="b")], now
        )
        store.append_many([completed(entry) for answer in answers for entry in answer.entries], now)
        if statement:
            tamper(kit, store, statement)
        journal = Journal(store, now_millis=kit.clock.now_millis, on_damaged=DAMAGED.append)
        yield journal
        await journal.close()


async def answer(journal: Journal, tenant: str, key: str) -> list[int]:
    """The indexes of the outcomes that the key's caller gets."""
    binding = await journal.binding(tenant, key)
    assert binding is not None
    return [each.outcome.header.index for each in await journal.batch(tenant, key, binding) if each.outcome]


SIGNER = signer_of(new_key())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("signature = {hex}", "entries 5 to 7 is damaged: its signature is not by key"),
        ("key_id = 'other'", "entries 5 to 7 is damaged: it names key 'other', and the epoch signs with"),
        ("first_index = 6", "entries 6 to 7 is damaged: its signature"),
        ("first_index = 4", "entries 4 to 7 is damaged: its signature"),
    ],
)
async def test_an_altered_head_is_not_served(kit: Kit, change: str, why: str) -> None:
    """A signed head that is not what this sidecar's key signed, or of another key, ends the call with RECORD_DAMAGED. Without
    the key only its id is compared."""
    kit.configure(signer=SIGNER)
    async with filled(kit, written(kit, f"UPDATE heads SET {change} WHERE last_index = 7")) as journal:
        with pytest.raises(RecordDamaged, match=why):
            await answer(journal, "a", "k")
        if "key_id" not in change:
            with pytest.raises(RecordDamaged, match=why):
                await journal.newest_signed()
    kit.configure(signer=signer_of(new_key()))
    with kit.opened() as store:
        if "key_id" in change:
            with pytest.raises(RecordDamaged, match=why):
                store.items(2, 2, 1)
        else:
            assert store.items(2, 2, 1)[0].unsigned == ""


async def test_a_head_that_was_deleted(kit: Kit) -> None:
    """The outcomes that it covered are served without a signature, and each read is reported: the OPENED entry of their epoch
    names a key. After a restart with another key, or without one, too. Outcomes of epochs without a key are sound."""
    kit.configure(signer=SIGNER)
    async with filled(kit, "DELETE FROM heads WHERE last_index = 7") as journal:
        assert await answer(journal, "a", "k") == [5, 6]
        assert await journal.newest_signed() is not None
    assert [f"entry {index} has lost its signed head: it is served without a signature" for index in (5, 6)] == DAMAGED
    for signer in (signer_of(new_key()), None):
        kit.configure(signer=signer)
        with kit.opened() as store:
            (entry,) = store.append_many([admission(item(9))], 1)[0].entries
            store.append_many([completed(entry)], 1)
            found = store.items(1, 99, 99)
        assert [bool(each.unsigned) for each in found] == [each.admitted.header.sequence < 4 for each in found]


async def test_a_deleted_head_among_several_writers(store: PostgresKit) -> None:
    """The key of an outcome's epoch is found behind any number of other writers' starts."""
    a = store.open(writer="a")
    store.configure(signer=SIGNER)
    b = store.open(writer="b")
    entries = [journal.append_many([admission(item(1))], 1)[0].entries[0] for journal in (a, b)]
    store.configure(signer=None)
    for _ in range(20):
        store.open(writer="c").close()
    for journal, entry in zip((a, b), entries, strict=True):
        journal.append_many([completed(entry)], 1)
    store.execute("DELETE FROM heads")

    assert [bool(each.unsigned) for each in a.items(1, 2, 2)] == [False, True]


async def test_a_damaged_key_ends_no_other_call(kit: Kit) -> None:
    """A batch whose key's row cannot be read is refused with RECORD_DAMAGED. What is appended together with it is recorded, and
    the journal goes on."""
    async with filled(kit, written(kit, "UPDATE keys SET tenant = {no_text} WHERE first_sequence = 1")) as journal:
        (entry,) = (await journal.append(admission(item(7)))).entries
        bound = admission(item(9), key="k", tenant="a")
        drafts: list[Draft] = [admission(item(8)), bound, completed(entry), admission(key="new")]
        answers = await asyncio.gather(*map(journal.append, drafts), return_exceptions=True)
        assert [isinstance(each, RecordDamaged) for each in answers] == [False, True, False, False]
        with pytest.raises(RecordDamaged, match="UTF-8"):
            await journal.binding("a", "k")
        assert not journal.broken.done()
    assert len(DAMAGED) == 2
    assert kit.faults() == ["table keys: the row of the batch from sequence 1 is not what the entries say"]
    with kit.maintained() as kept:
        rebuild(kept)
    assert kit.faults() == []


def damage_page(store: SqliteStore, path: Path, table: str) -> None:
    """The second leaf of a table in a file that is open."""
    pages = store._db.execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path", (table,))
    number, size = int(str(pages.fetchall()[1][0])), int(str(store._db.pragma("page_size")))
    with path.open("r+b") as file:
        file.seek((number - 1) * size)
        file.write(b"\xff" * 64)
    store._db.pragma("shrink_memory")  # or the page is still in memory


async def test_a_damaged_page(tmp_path: Path) -> None:
    """A page that is no part of its table ends the calls that read it. An outcome whose twin would be there is recorded without
    a comparison. One that cannot be recorded ends the sidecar with a line that names the file and the remedy."""
    kit = SqliteKit(tmp_path / "journal.db")
    with kit.opened() as store:
        items = [item(number, seed=1) for number in range(2000)]
        entries = [answer.entries[0] for answer in store.append_many([admission(each) for each in items], 1)]
        store.append_many([completed(entry) for entry in entries if entry.header.sequence != 400], 1)
    DAMAGED.clear()
    store = kit.open()
    journal = Journal(store, now_millis=kit.clock.now_millis, on_damaged=DAMAGED.append)
    for table in ("items", "twins"):
        damage_page(store, kit.path, table)
    with pytest.raises(RecordDamaged, match="table items cannot be read"):
        await journal.items(400, 400, 1)
    assert len(await journal.items(1, 1, 1)) == 1
    again = (await journal.append(admission(*(item(number, seed=1) for number in range(2000))))).entries
    ended = await asyncio.gather(*(journal.append(completed(entry)) for entry in again))
    assert 0 < sum(twin(each.entries[0]) is None for each in ended) < 2000
    assert {why.partition(":")[0] for why in DAMAGED} == {"table items cannot be read", "table twins cannot be read"}
    with pytest.raises(JournalBroken):
        await journal.append(completed(entries[399]))
    why = str(await journal.broken)
    assert f"{kit.path} is damaged: " in why and "docs/operations.md" in why
    await journal.close()


def written(kit: Kit, statement: str) -> str:
    """With bytes as the database writes them."""
    if isinstance(kit, PostgresKit):
        zeros = "decode(repeat('00', 32), 'hex')"
        return statement.format(hex="'\\xdeadbeef'::bytea", no_text="'\\xff'::bytea", name="'zz'::bytea", zeros=zeros)
    return statement.format(hex="x'deadbeef'", no_text="CAST(x'ff' AS TEXT)", name="'zz'", zeros="zeroblob(32)")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (
            "UPDATE items SET outcome = 7 WHERE sequence = 1",
            "record of sequence 1 is damaged: entry 7 is not its own",
        ),
        ("UPDATE items SET outcome = 2 WHERE sequence = 1", "entry 2 is not its own"),
        ("UPDATE items SET outcome = 99 WHERE sequence = 1", "entry 99 is not its own"),
        ("UPDATE items SET admitted = 4 WHERE sequence = 1", "entry 4 is not its own"),
        ("UPDATE items SET verified = 5 WHERE sequence = 1", "entry 5 is not its own"),
        ("DELETE FROM items WHERE sequence = 2", "bound to sequences 1 to 2, which are no batch"),
        ("UPDATE keys SET count = 1 WHERE first_sequence = 1", "bound to sequences 1 to 1, which are no batch"),
        ("UPDATE keys SET first_sequence = 2 WHERE first_sequence = 1", "bound to sequences 2 to 3, which are no batch"),
        ("UPDATE keys SET request_digest = {zeros} WHERE key = 'k'", "of another request"),
        ("DELETE FROM payloads WHERE entry_index = 2", "a payload of sequence 1 is missing"),
        ("DELETE FROM payloads WHERE entry_index = 5", "a payload of sequence 1 is missing"),
        ("UPDATE payloads SET payload = {hex} WHERE entry_index = 5", "the payload of entry 5 is damaged"),
        ("UPDATE payloads SET payload = {hex} WHERE entry_index = 2", "the payload of entry 2 is damaged"),
        ("UPDATE entries SET header = {hex} WHERE entry_index = 5", "entry 5: its header"),
        (
            "UPDATE entries SET header = (SELECT header FROM entries WHERE entry_index = 6) WHERE entry_index = 5",
            "header says 6",
        ),
        ("UPDATE entries SET entry_hash = {hex} WHERE entry_index = 2", "entry 2: its hash"),
        (
            "UPDATE entries SET entry_hash = (SELECT entry_hash FROM entries WHERE entry_index = 4) WHERE entry_index = 2",
            "entry 2 is damaged: its hash",
        ),
    ],
)
async def test_a_damaged_record_is_not_served(kit: Kit, statement: str, why: str) -> None:
    """A row of an item or a key that names what is not its own, and a payload that was changed, or is the only one left of its
    item, end the call with RECORD_DAMAGED, which is reported; other records are served."""
    async with filled(kit, written(kit, statement)) as journal:
        with pytest.raises(RecordDamaged, match=why):
            await answer(journal, "a", "k")
        assert len(DAMAGED) == 1
        assert await answer(journal, "b", "other") == [7]
        if "UPDATE payloads" in statement or "UPDATE entries" in statement:
            with pytest.raises(RecordDamaged, match=why):
                await journal.entries(1, 99, payloads=True)


async def test_an_entry_that_is_missing(kit: Kit) -> None:
    """A gap in the entries is not passed over."""
    async with filled(kit, "DELETE FROM entries WHERE entry_index = 5") as journal:
        for first in (1, 5):
            with pytest.raises(RecordDamaged, match="entry 5 is missing|entry 6 is damaged"):
                await journal.entries(first, 99, payloads=True)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET header = {hex} WHERE entry_index = 7",
        "UPDATE entries SET entry_hash = {hex} WHERE entry_index = 6",
        "UPDATE payloads SET payload = {hex} WHERE entry_index = 7",
        "UPDATE twins SET entry_index = 1 WHERE entry_index = 7",
        "UPDATE twins SET entry_index = 4 WHERE entry_index = 7",
        "UPDATE twins SET entry_index = 5 WHERE entry_index = 7",
    ],
)
async def test_a_twin_that_is_damaged(kit: Kit, statement: str) -> None:
    """With an entry that is damaged, or that is another item's, nothing is compared; that is reported, and the journal goes
    on."""
    async with filled(kit, written(kit, statement)) as journal:
        (entry,) = (await journal.append(admission(item(3, seed=3), tenant="b"))).entries
        (ended,) = (await journal.append(completed(entry))).entries
        assert twin(ended) is None
        assert len(DAMAGED) == 1


@pytest.mark.parametrize(
    "change",
    ["count = 0", "count = -1", "count = 2147483647", "count = 4097", "first_sequence = 0", "request_digest = {hex}"],
)
async def test_a_key_that_is_bound_to_no_batch(kit: Kit, change: str) -> None:
    """A key whose row no journal writes is refused at once, however many items it names."""
    async with filled(kit, written(kit, f"UPDATE keys SET {change} WHERE key = 'k'")) as journal:
        with pytest.raises(RecordDamaged, match="table keys"):
            await journal.binding("a", "k")
        with pytest.raises(RecordDamaged, match="table keys"):
            await journal.append(admission(key="k", tenant="a"))
        assert (await journal.append(admission(key="new"))).entries


async def test_a_key_of_another_tenant(kit: Kit) -> None:
    """A key that was bound to another tenant's batch gets none of its outputs."""
    rebound = """UPDATE keys SET first_sequence = 13 - first_sequence, count = 3 - count;
      UPDATE keys SET first_sequence = CASE first_sequence WHEN 12 THEN 3 ELSE 1 END"""
    async with filled(kit, rebound) as journal:
        for tenant, key in (("a", "k"), ("b", "other")):
            with pytest.raises(RecordDamaged, match="which are another key's"):
                await answer(journal, tenant, key)


# One flipped bit.


@dataclass(frozen=True)
class Seen:
    """What callers and the engine would see of a journal that was opened."""

    keys: dict[tuple[str, str, int], Binding | None]
    items: dict[int, ItemEntries | None]
    """None: RECORD_DAMAGED."""
    unfinished: list[tuple[int, int]]
    """Sequence and attempt."""
    epoch: int
    last_sequence: int


KEYS = (("a", "k"), ("b", "other"), ("a", "open"))
TTL_MILLIS = 86_400_000


def fill(kit: Kit) -> None:
    """Two epochs; a finished batch of two, one of another tenant, one without a key, one half finished; lost numbers."""
    with kit.opened() as store:
        now = kit.clock.millis
        answers = store.append_many(
            [
                admission(item(1), item(2), key="k", tenant="a"),
                admission(item(3), key="other", tenant="b", digest=b"s" * 32),
                admission(item(4)),
                Loss(6),
                admission(item(5), item(6), key="open", tenant="a"),
            ],
            now,
        )
        entries = [entry for answer in answers for entry in answer.entries if entry.header.sequence]
        store.append_many([*map(completed, entries[:5]), audit(entries[0], types_pb2.COMPARISON_KIND_VERIFY)], now)
    kit.open().close()


def seen(kit: Kit) -> Seen:
    store = kit.open()
    try:
        times = (kit.clock.millis, kit.clock.millis + TTL_MILLIS - 1)
        keys = {(*key, now): store.binding(*key, now) for key in KEYS for now in times}
        items = dict[int, ItemEntries | None]()
        for sequence in range(1, 9):
            try:
                items |= {each.admitted.header.sequence: each for each in store.items(sequence, sequence, 1)}
            except RecordDamaged:
                items[sequence] = None
        unfinished = [(each.admitted.header.sequence, each.attempt) for each in store.to_recover]
        return Seen(keys, items, unfinished, store.head.epoch, store.head.last_sequence)
    finally:
        store.close()


def flipped(value: object, rng: random.Random) -> Iterator[object]:
    """The value with one bit flipped, for some bits. What no column of its type can hold is left out."""
    match value:
        case int():
            yield from (value ^ (1 << bit) for bit in (0, 1, 2, 10, 20, 30, 40, 62))
        case bytes():
            for bit in rng.sample(range(8 * len(value)), 2):
                yield (int.from_bytes(value) ^ (1 << bit)).to_bytes(len(value))
        case str():
            for other in flipped(value.encode(), rng):
                assert isinstance(other, bytes)
                with suppress(UnicodeDecodeError):
                    yield other.decode()
        case None:
            yield from (1, 9, 1 << 40)


COLUMNS = {
    "items": ("sequence", "admitted", "outcome", "verified"),
    "keys": ("first_sequence", "count", "request_digest", "tenant", "key", "unfinished", "expires_millis"),
    "journal": ("log_id", "writer", "epoch", "lost_sequence"),
}


def test_every_flipped_bit(tmp_path: Path) -> None:
    """Of a value in items, keys or journal with one bit flipped: verify finds it, and a start finds it, or no key has another
    batch, no item another entry or end, and no number or epoch is another. What both miss changes nothing at all."""
    kit, rng = SqliteKit(tmp_path / "journal.db"), random.Random(7)
    fill(kit)
    content, tried, started, missed = kit.path.read_bytes(), 0, 0, list[str]()
    sound = seen(kit)
    for table, columns in COLUMNS.items():
        kit.path.write_bytes(content)
        with closing(apsw.Connection(str(kit.path))) as db:
            rows = db.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1").fetchall()
        for row, (place, column) in product(rows, enumerate(columns)):
            for value in flipped(row[place], rng):
                kit.path.write_bytes(content)
                with closing(apsw.Connection(str(kit.path))) as db:
                    try:
                        db.execute(f"UPDATE {table} SET {column} = ? WHERE {columns[0]} = ?", (value, row[0]))
                    except apsw.ConstraintError:
                        continue
                tried += 1
                what = f"{table} {row[0]}: {column} {row[place]!r} became {value!r}"
                try:
                    found = bool(kit.faults())
                except JournalUnusable:
                    found = True
                if not found:
                    missed.append(what)
                try:
                    now = seen(kit)
                except JournalUnusable:
                    continue
                started += 1
                damaged = [sequence for sequence, each in now.items.items() if each is None]
                assert replace(now, items={}) == replace(sound, items={}), what
                assert now.items == sound.items | dict.fromkeys(damaged), what
    assert (tried > 250, started > 1) == (True, True), (tried, started)
    assert all("lost_sequence" in what for what in missed), missed


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE items SET outcome = NULL WHERE sequence = 1",
        "UPDATE items SET outcome = 9 WHERE sequence = 8",
        "UPDATE items SET sequence = 2000000 WHERE sequence = 8",
        "DELETE FROM items WHERE sequence = 7",
        "UPDATE keys SET first_sequence = 100 WHERE first_sequence = 3",
        "UPDATE keys SET key = {name} WHERE first_sequence = 1",
        "UPDATE keys SET tenant = {name} WHERE first_sequence = 1",
        "UPDATE keys SET unfinished = 0, expires_millis = 5 WHERE first_sequence = 7",
        "UPDATE keys SET expires_millis = 5 WHERE first_sequence = 1",
        "DELETE FROM keys WHERE first_sequence = 1",
        "epoch",
        "last",
    ],
)
def test_tables_that_contradict_the_entries(kit: Kit, statement: str) -> None:
    """Rows that were changed in either database are found by verify and by a start, both name the remedy, and after it the
    journal is what it was."""
    fill(kit)
    sound = seen(kit)
    shared = isinstance(kit, PostgresKit)
    if statement == "epoch":
        statement = "UPDATE writers SET epoch = 1" if shared else "UPDATE journal SET epoch = 1"
    elif statement == "last":
        statement = "UPDATE log SET last_sequence = 99" if shared else "UPDATE journal SET lost_sequence = 99"
    kit.execute(written(kit, statement))
    assert kit.faults()
    with pytest.raises(JournalUnusable, match="python -m sidecar rebuild|has not ended"):
        kit.open()
    with closing(open_for_maintenance(kit.location, "copy and change")) as store:
        assert (store.copy is None) == shared
        rebuild(store)
    assert kit.faults() == []
    again = seen(kit)
    assert replace(again, epoch=sound.epoch, unfinished=sound.unfinished) == sound
    assert [sequence for sequence, _ in again.unfinished] == [sequence for sequence, _ in sound.unfinished]


def test_an_older_version_is_brought_up(kit: Kit) -> None:
    """A journal of the first version opens, keeps its record, and can do what only a newer one can. It is changed once."""
    with kit.opened() as store:
        store.append_many([admission()], 1)
    kit.execute(FIRST_VERSION[type(kit)])
    kit.configure(signer=SIGNER)
    with kit.opened() as store:
        (entry,) = (each for each in store.entries(1, 9, payloads=True) if each.header.sequence)
        store.append_many([Note("name", b"value"), completed(entry)], 1)
        (found,) = store.items(1, 1, 1)
        assert (store.notes("n"), found.verified, found.unsigned) == ({"name": b"value"}, None, "")
    kit.open().close()
    assert kit.faults() == []


def test_maintaining_a_database_of_an_older_version(store: PostgresKit) -> None:
    """A log in PostgreSQL is never migrated by a command: before the last index it is read as it is, and one that is older, or
    newer, is refused with a line that says what to do."""
    with store.opened() as journal:
        journal.append_many([admission()], 1)
    store.execute("DROP INDEX openings")
    store.execute("UPDATE ostinato SET version = 3")
    assert store.faults() == []
    with store.maintained() as kept:
        assert len(list(export(kept))) == 3
    assert store.execute("SELECT version FROM ostinato") == [(3,)]
    for version, why in ((2, "has version 2, and commands work with version 3 or newer"), (99, "has version 99; .* newer one")):
        store.execute(f"UPDATE ostinato SET version = {version}")
        with pytest.raises(JournalUnusable, match=why):
            store.faults()
        assert store.execute("SELECT version FROM ostinato") == [(version,)]


def test_a_newer_version(kit: Kit) -> None:
    """A journal that a newer sidecar has made is refused, and stays as it was."""
    with kit.opened() as store:
        head = store.head
    kit.execute("PRAGMA user_version = 99" if isinstance(kit, SqliteKit) else "UPDATE ostinato SET version = 99")
    with pytest.raises(JournalUnusable, match="has version 99; this sidecar knows up to .: run a newer one"):
        kit.open()
    assert kit.execute("SELECT entry_index, entry_hash FROM entries") == [(1, head.entry_hash)]


# Payloads that are gone.


def prunes(kit: Kit) -> list[sequencer_pb2.PrunedPayload]:
    with kit.maintained() as store:
        found = [entry for entry in store.entries(1, 999, payloads=True) if entry.header.kind == types_pb2.ENTRY_KIND_PRUNED]
    return [sequencer_pb2.PrunedPayload.FromString(entry.payload) for entry in found]


def test_prunes_are_in_the_chain(kit: Kit) -> None:
    """An entry says which payloads prune and redact dropped, and why; verify tells them from payloads that were deleted, and
    redact of these makes the journal whole again."""
    fill(kit)
    with kit.maintained() as store:
        assert redact(store, [3], 9) == 2
        assert sum(count for _, count in prune(store, lambda header: header.sequence < 4, 9)) == 4
        assert sum(count for _, count in prune(store, lambda header: header.sequence < 4, 9)) == 0
    told = [(each.reason, [(run.first, run.last) for run in each.ranges], each.entries) for each in prunes(kit)]
    assert told == [("request", [(3, 3)], 2), ("age", [(1, 2)], 4)]
    assert kit.faults() == []
    kit.execute("DELETE FROM payloads WHERE entry_index IN (SELECT admitted FROM items WHERE sequence = 4)")
    assert "kept or dropped together, and one is missing" in kit.faults()[0]
    kit.execute("DELETE FROM payloads WHERE entry_index IN (SELECT outcome FROM items WHERE sequence = 4)")
    assert kit.faults() == ["a payload of sequence 4 is missing, and no PRUNED entry says so"]
    for _ in range(2):  # the second time nothing is to be told
        with kit.maintained() as store:
            assert redact(store, [3, 4], 9) == 0
        assert len(prunes(kit)) == 3
    assert kit.faults() == []
    kit.open().close()


def test_a_secret_of_another_length(kit: Kit) -> None:
    """A start says so in one line."""
    fill(kit)
    shared = isinstance(kit, PostgresKit)
    kit.execute("UPDATE log SET secret = ''::bytea" if shared else "UPDATE journal SET secret = x''")
    with pytest.raises(JournalUnusable, match="the log's secret has 0 bytes instead of 32"):
        kit.open()


@pytest.mark.parametrize("kind", [types_pb2.ENTRY_KIND_OPENED, types_pb2.ENTRY_KIND_AUDITED, types_pb2.ENTRY_KIND_LOST])
def test_a_payload_that_is_never_dropped(kit: Kit, kind: types_pb2.EntryKind.ValueType) -> None:
    """A payload that is no item's was deleted: verify finds it, and a start what it reads of it."""
    fill(kit)
    with kit.maintained() as store:
        index = next(entry.header.index for entry in store.entries(1, 999, payloads=False) if entry.header.kind == kind)
    kit.execute(f"DELETE FROM payloads WHERE entry_index = {index}")
    assert "is missing, and none of this kind is ever dropped" in kit.faults()[0]
    if kind != types_pb2.ENTRY_KIND_LOST:
        with pytest.raises(JournalUnusable, match=f"entry {index}: payload: is missing"):
            kit.open()


def test_digests_say_that_payloads_are_not_kept(kit: Kit) -> None:
    """With digests only, the epoch's first entry covers what is dropped with its outcome, and PRUNED entries what keyed batches
    lose when their keys expire; a payload of an earlier epoch that was deleted is found."""
    with kit.opened() as store:
        now = kit.clock.millis
        (early,) = store.append_many([admission(item(1))], now)
        store.append_many([completed(early.entries[0])], now)
    kit.configure(digests_only=True)
    with kit.opened() as store:
        answers = store.append_many([admission(item(2)), admission(item(3), item(4), key="k")], now)
        store.append_many([completed(entry) for answer in answers for entry in answer.entries], now)
        assert store.append_many([admission(item(5))], now + TTL_MILLIS)[0].entries[0].header.sequence == 5
    assert kit.faults() == []
    assert [(each.reason, [(run.first, run.last) for run in each.ranges]) for each in prunes(kit)] == [("digests", [(3, 4)])]
    kit.execute("DELETE FROM payloads WHERE entry_index IN (2, 3)")
    assert kit.faults() == ["a payload of sequence 1 is missing, and no PRUNED entry says so"]


def test_what_was_dropped_before_prunes_were_recorded(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal from before entries had forms verifies without PRUNED entries. The first start after that records what is
    missing, once; a payload that is deleted later is found, and nothing can claim again to be from before."""
    monkeypatch.setattr("sidecar.journal.ledger.FORM", 0)
    bare = [item(number) for number in range(3)]
    for each in bare:
        each.nonce = b""
    with kit.opened() as store:
        answers = store.append_many([admission(each) for each in bare], 1)
        store.append_many([completed(answer.entries[0]) for answer in answers], 1)
    kit.execute("DELETE FROM payloads WHERE entry_index IN (2, 5)")
    assert kit.faults() == []
    monkeypatch.undo()
    for _ in range(2):
        kit.open().close()
        assert kit.faults() == []
    assert [(each.reason, [(run.first, run.last) for run in each.ranges]) for each in prunes(kit)] == [("earlier", [(1, 1)])]
    kit.execute("DELETE FROM payloads WHERE entry_index IN (3, 6)")
    assert kit.faults() == ["a payload of sequence 2 is missing, and no PRUNED entry says so"]
    with kit.maintained() as store:
        store.drop([2], "earlier", 9)
    assert "payload: says that it is of an earlier version, and the entries before are not" in kit.faults()[0]
