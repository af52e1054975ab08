"""Journal bytes by tenant: what is counted, what a start knows, and who is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ostinato import errors

from sidecar.config import Settings
from sidecar.journal.model import Admission
from sidecar.journal.writer import Journal
from sidecar.quota import ENTRY_BYTES, JournalQuota
from tests.sidecar.journal_kit import Kit, SqliteKit, admission, completed, item


@pytest.fixture(name="kit", params=["sqlite", "postgres"])
def _kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    """An empty journal of each backend."""
    return SqliteKit(tmp_path / "journal.sqlite") if request.param == "sqlite" else request.getfixturevalue("store")


@asynccontextmanager
async def opened(kit: Kit, writer: str = "writer", most: int = 1 << 30) -> AsyncIterator[tuple[Journal, JournalQuota]]:
    """The journal, and a quota that a start has restored."""
    store = kit.open(writer=writer)
    journal, quota = Journal(store, now_millis=kit.clock.now_millis), JournalQuota(most, writer, keeps_payloads=True)
    await quota.restore(journal)
    try:
        yield journal, quota
    finally:
        await journal.close()


async def admitted(journal: Journal, quota: JournalQuota, tenant: str, size: int, *, end: bool = True) -> int:
    """An item with so many token ids; what it has in the journal, in bytes."""
    draft = Admission((item(*[70_000] * size),), b"r" * 32, tenant=tenant)
    entries = [*(await journal.append(draft)).entries]
    if end:
        entries += (await journal.append(completed(entries[0]))).entries
    quota.add(tenant, entries)
    return sum(len(entry.payload) + ENTRY_BYTES for entry in entries)


@pytest.mark.parametrize("saved", [True, False])
async def test_a_start_knows_what_each_tenant_has(kit: Kit, saved: bool) -> None:
    """Whether or not the sums were saved before the end, the next start has the same: of items that ended before the last save,
    since then, or not at all."""
    async with opened(kit) as (journal, quota):
        sizes = {"acme": await admitted(journal, quota, "acme", 100), "zeta": await admitted(journal, quota, "zeta", 10)}
        (first,) = (await journal.append(admission(item(9), tenant="acme"))).entries
        quota.add("acme", [first])
        sizes["acme"] += ENTRY_BYTES + len(first.payload)
        if saved:
            await quota.save(journal)
        sizes["zeta"] += await admitted(journal, quota, "zeta", 50, end=False)
        (last,) = (await journal.append(completed(first))).entries
        quota.add("acme", [last])
        sizes["acme"] += ENTRY_BYTES + len(last.payload)
    async with opened(kit) as (_, again):
        assert dict(again._own) == dict(quota._own) == sizes


async def test_a_tenant_at_its_bound_is_refused_alone(kit: Kit) -> None:
    """A tenant that has as many bytes as it may is refused, and the setting is named; another is not."""
    async with opened(kit, most=2_000) as (journal, quota):
        quota.check("flood")
        await admitted(journal, quota, "flood", 1_000)
        with pytest.raises(errors.JournalFull, match="at most 2000") as refused:
            quota.check("flood")
        quota.check("other")

    assert refused.value.details == {"setting": "tenant_journal_bytes_max"}


async def test_after_payloads_were_dropped_it_is_counted_again(kit: Kit) -> None:
    """When an operator has dropped an item's payloads, its tenant has room again."""
    async with opened(kit) as (journal, quota):
        await admitted(journal, quota, "acme", 1_000)
        size = await admitted(journal, quota, "acme", 10)
        await quota.save(journal)
    with kit.maintained() as store:
        assert store.drop([1], "request", 9) == 2
    async with opened(kit) as (_, again):
        assert again._own["acme"] == size


async def test_writers_of_one_log_count_together(store: Kit) -> None:
    """What another writer has saved counts too; what this one wrote counts once."""
    async with opened(store, "one") as (journal, quota):
        size = await admitted(journal, quota, "acme", 1_000)
        await quota.save(journal)
    async with opened(store, "two", most=size + 1) as (journal, quota):
        quota.check("acme")
        await admitted(journal, quota, "acme", 1)
        with pytest.raises(errors.JournalFull):
            quota.check("acme")


def test_without_tenants_there_is_no_bound() -> None:
    """One tenant may fill its own journal. With several, the bound is half of the journal's unless it is set."""
    size, tenants = {"journal_bytes_max": 1 << 30}, {"trust_tenant_metadata": True}

    def bound(**settings: Any) -> int:
        return Settings(**settings).tenant_journal_bytes

    assert bound(**size) == bound(**tenants) == bound() == 0
    assert bound(**size, **tenants) == 1 << 29
    assert bound(**size, **tenants, tenant_journal_bytes_max=5) == 5
