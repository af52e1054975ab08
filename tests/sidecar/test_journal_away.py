"""A journal whose database goes away, through the interface that the sidecar uses: refused, deferred, in doubt, and back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ostinato.errors import JournalUnavailable
from ostinato.v1 import types_pb2

from sidecar.journal.mark import HighWater, MarkFile
from sidecar.journal.model import Appended, ItemEntries, JournalBroken, Note, Sealed
from sidecar.journal.postgres import PostgresTables
from sidecar.journal.writer import GroupSettings, Journal
from tests.postgres import Postgres
from tests.sidecar.journal_kit import PostgresKit, admission, completed, item, sequences, through
from tests.sidecar.postgres_proxy import Cut, Proxy

SETTINGS = GroupSettings(full_retry_seconds=0.05, deferred_outcomes_max=8)


@asynccontextmanager
async def grouped(store: PostgresKit, line: Proxy | None = None, writer: str = "writer") -> AsyncIterator[Journal]:
    url = store.url if line is None else through(line, store)
    journal = Journal(store.open(writer=writer, url=url), now_millis=store.clock.now_millis, settings=SETTINGS)
    yield journal
    await journal.close()


async def full(journal: Journal, expected: bool) -> None:
    """Until it refuses new work, or no longer."""
    async with asyncio.timeout(20):
        while journal.full is not expected:
            await asyncio.sleep(0.01)


async def refused(journal: Journal) -> None:
    for draft in (admission(), admission(key="new"), Note("n", b"")):
        with pytest.raises(JournalUnavailable) as error:
            await journal.append(draft)
        assert error.value.retry_after == SETTINGS.full_retry_seconds


async def test_away_and_back(store: PostgresKit, line: Proxy) -> None:
    """While the database is away new work and reads are refused, outcomes wait, and then go first, in their order."""
    async with grouped(store, line) as journal:
        entries = (await journal.append(admission(*(item(number) for number in range(1, 6))))).entries
        line.sever()
        await refused(journal)
        assert journal.full
        waiting = [asyncio.ensure_future(journal.append(completed(entry))) for entry in entries]
        await refused(journal)
        for read in (journal.head(), journal.items(1, 1, 1), journal.binding("", "k"), journal.notes("")):
            with pytest.raises(JournalUnavailable) as error:
                await read
            assert error.value.retry_after == SETTINGS.full_retry_seconds
            assert str(line.folder) not in error.value.message, "where the database is, callers need not know"
        assert not any(one.done() for one in waiting)
        line.closed = False
        ended = [(await one).entries[0] for one in waiting]
        await full(journal, expected=False)
        after = (await journal.append(admission())).entries

        assert [entry.header.index for entry in ended] == [7, 8, 9, 10, 11]
        assert sequences(after) == [6]
        assert not journal.broken.done()


async def test_no_mark_while_it_is_away(store: PostgresKit, line: Proxy, tmp_path: Path) -> None:
    """The high-water mark stays where it was while the database is away, and rises again when it is back."""
    file = MarkFile(tmp_path / "mark")
    async with grouped(store, line) as journal:
        high_water = HighWater(file, journal)
        await high_water.write()
        line.sever()
        await refused(journal)
        await high_water.write()
        before = file.read()
        line.closed = False
        await full(journal, expected=False)
        await journal.append(admission())
        await high_water.write()
        after = file.read()

    assert before is not None and after is not None
    assert (before.last_sequence, after.last_sequence) == (0, 1)


async def test_away_without_calls(store: PostgresKit, line: Proxy) -> None:
    """That the database is gone is found out by the lease, and so is that it is back."""
    store.configure(lease_seconds=0.1)
    async with grouped(store, line) as journal:
        line.sever()
        await full(journal, expected=True)
        line.closed = False
        await full(journal, expected=False)


async def test_away_for_too_long(store: PostgresKit, line: Proxy) -> None:
    """Outcomes are deferred up to a bound; one more, and the process has to end."""
    async with grouped(store, line) as journal:
        entries = (await journal.append(admission(*(item() for _ in range(SETTINGS.deferred_outcomes_max + 1))))).entries
        line.sever()
        answers = await asyncio.gather(*(journal.append(completed(entry)) for entry in entries), return_exceptions=True)

        assert {type(answer) for answer in answers} == {JournalBroken}
        assert "outcomes wait" in str(await journal.broken)


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
async def test_in_doubt(store: PostgresKit, line: Proxy, monkeypatch: pytest.MonkeyPatch, cut: Cut) -> None:
    """Drafts of a commit that may or may not have been durable are answered once that is known, and not refused before; each
    is there once, and what came later comes behind them."""
    commit = PostgresTables.commit

    def cutting(self: PostgresTables, *args: object) -> None:
        monkeypatch.setattr(PostgresTables, "commit", commit)
        line.cut, line.closed = cut, True
        commit(self, *args)  # type: ignore[arg-type]

    async with grouped(store, line) as journal:
        first, second = (await journal.append(admission(item(1), item(2)))).entries
        monkeypatch.setattr(PostgresTables, "commit", cutting)
        in_doubt = [asyncio.ensure_future(journal.append(draft)) for draft in (admission(item(3), key="k"), completed(first))]
        await full(journal, expected=True)
        deferred = asyncio.ensure_future(journal.append(completed(second)))
        await refused(journal)
        assert not any(one.done() for one in (*in_doubt, deferred))
        line.closed = False
        answers: Sequence[Appended] = await asyncio.wait_for(asyncio.gather(*in_doubt, deferred), 20)
        await full(journal, expected=False)
        entries = await journal.entries(2, 100, payloads=True)

        assert [answer.entries[0].header.index for answer in answers] == [4, 5, 6]
        assert list(entries[2:]) == [answer.entries[0] for answer in answers]
        assert store.faults() == []


async def test_closing_while_in_doubt(store: PostgresKit, line: Proxy) -> None:
    """A journal that is closed while its database is away fails all calls, and says that it was closed."""
    async with grouped(store, line) as journal:
        (entry,) = (await journal.append(admission())).entries
        line.sever()
        waiting = asyncio.ensure_future(journal.append(completed(entry)))
        await full(journal, expected=True)
        await journal.close()

        with pytest.raises(JournalBroken, match="closed"):
            await waiting


async def _all_items(journal: Journal) -> Sequence[ItemEntries]:
    """Once its database can be reached: others may have come back sooner."""
    while True:
        try:
            return await journal.items(1, 2**63, 100_000)
        except JournalUnavailable:
            await asyncio.sleep(0.02)


async def test_a_server_that_crashes(store: PostgresKit, postgres: Postgres) -> None:
    """kill -9 of the server, twice, under the load of two writers: what was acknowledged is there once, and nothing else is
    but what no caller was told of; one order throughout."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, acknowledged = random.Random(seed), dict[str, Sealed]()
    stop = asyncio.Event()

    async def client(name: str, journals: Sequence[Journal]) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            key = f"{name}/{number}"
            while True:  # until it is known
                journal = rng.choice(journals)
                try:
                    answer = await journal.append(admission(item(number), key=key))
                    sequence = answer.binding.first_sequence if answer.binding else answer.entries[0].header.sequence
                    (found,) = await journal.items(sequence, sequence, 1)
                    acknowledged[key] = found.admitted
                    await journal.append(completed(found.admitted))
                    break
                except JournalUnavailable:
                    await asyncio.sleep(0.02)

    async with grouped(store, writer="a") as a, grouped(store, writer="b") as b:
        clients = [asyncio.ensure_future(client(f"c{number}", (a, b))) for number in range(8)]
        for _ in range(2):
            await asyncio.sleep(rng.uniform(0.1, 0.4))
            await asyncio.to_thread(postgres.crash)
            await asyncio.sleep(rng.uniform(0, 0.2))
            await asyncio.to_thread(postgres.start)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*clients), 30)
        items = await _all_items(a)
        assert not (a.broken.done() or b.broken.done())

    assert {pair.admitted.header.sequence: pair.admitted for pair in items} == {
        entry.header.sequence: entry for entry in acknowledged.values()
    }
    assert [pair.admitted.header.sequence for pair in items] == list(range(1, len(items) + 1))
    assert {pair.outcome.header.kind for pair in items if pair.outcome} == {types_pb2.ENTRY_KIND_COMPLETED}
    assert all(pair.outcome for pair in items)
    assert store.faults() == []
