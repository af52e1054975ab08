"""A journal whose tables were changed beside the sidecar: what is read, what a start finds, and what verify finds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ostinato.errors import RecordDamaged

from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store
from sidecar.journal.writer import Journal
from tests.postgres import Postgres
from tests.sidecar.journal_kit import Kit, PostgresKit, SqliteKit, admission, completed, item


@pytest.fixture(name="kit", params=["sqlite", "postgres"])
def _kit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kit]:
    if request.param == "sqlite":
        yield SqliteKit(tmp_path / "journal.db")
        return
    server: Postgres = request.getfixturevalue("postgres")
    kit = PostgresKit(server.url(server.schema()), spare=server.url(server.schema()))
    yield kit
    kit.kill()


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
            [admission(item(1), item(2), key="k", tenant="a"), admission(item(3), key="other", tenant="b")], now
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


async def test_what_is_sound_is_read(kit: Kit) -> None:
    """Each key has its own outcomes."""
    async with filled(kit) as journal:
        assert (await answer(journal, "a", "k"), await answer(journal, "b", "other")) == ([5, 6], [7])
        assert len(await journal.entries(1, 99, payloads=True)) == 7
    assert DAMAGED == []


HEX = "'\\xdeadbeef'::bytea"


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
        ("UPDATE payloads SET payload = {hex} WHERE entry_index = 5", "the payload of entry 5 is damaged"),
        ("UPDATE payloads SET payload = {hex} WHERE entry_index = 2", "the payload of entry 2 is damaged"),
    ],
)
async def test_a_damaged_record_is_not_served(kit: Kit, statement: str, why: str) -> None:
    """A row of an item or a key that names what is not its own, and a payload that was changed, end the call with
    RECORD_DAMAGED, which is reported; other records are served."""
    text = statement.format(hex="x'deadbeef'" if isinstance(kit, SqliteKit) else HEX)
    async with filled(kit, text) as journal:
        with pytest.raises(RecordDamaged, match=why):
            await answer(journal, "a", "k")
        assert len(DAMAGED) == 1
        assert await answer(journal, "b", "other") == [7]
        if "payloads" in statement:
            with pytest.raises(RecordDamaged, match=why):
                await journal.entries(1, 99, payloads=True)


async def test_a_key_of_another_tenant(kit: Kit) -> None:
    """A key that was bound to another tenant's batch gets none of its outputs."""
    rebound = """UPDATE keys SET first_sequence = 13 - first_sequence, count = 3 - count;
      UPDATE keys SET first_sequence = CASE first_sequence WHEN 12 THEN 3 ELSE 1 END"""
    async with filled(kit, rebound) as journal:
        for tenant, key in (("a", "k"), ("b", "other")):
            with pytest.raises(RecordDamaged, match="which are another key's"):
                await answer(journal, tenant, key)
