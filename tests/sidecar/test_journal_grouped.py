"""Group commit: what waits is committed together, answered together, and fails together when the journal breaks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from ostinato.chain import GENESIS
from ostinato.errors import JournalFull

from sidecar.journal.ledger import Known, Ledger
from sidecar.journal.model import Appended, Binding, Draft, Head, ItemEntries, JournalBroken, Sealed, Unfinished
from sidecar.journal.writer import GroupSettings, Journal
from tests.sidecar.journal_kit import LOG_ID, Clock, SqliteKit, admission, item
from tests.waiting import eventually


@dataclass
class Scripted:
    """A backend in memory that commits when it is let, and fails when it is told to."""

    head: Head = field(default_factory=lambda: Head(LOG_ID, "writer", 1, 1, GENESIS, 0))
    reserved: bool = True
    room: bool = True
    """For the reserve, where there is none."""
    begun: threading.Event = field(default_factory=threading.Event)
    """The first commit is under way."""
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fault: BaseException | None = None
    groups: list[list[Draft]] = field(default_factory=list)
    maintained: list[bool] = field(default_factory=list)
    closed: bool = False
    poll_seconds: float | None = None
    taken: list[Unfinished] = field(default_factory=list)

    def newest(self) -> Head:
        return self.head

    def idle_seconds(self) -> float | None:
        return None

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        self.begun.set()
        assert self.go.acquire(timeout=30)
        if self.fault is not None:
            raise self.fault
        self.groups.append(list(drafts))
        ledger = Ledger(self.head, Known(), now_millis)
        appended = [ledger.append(draft) for draft in drafts]
        self.head = ledger.head
        return appended

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        raise LookupError("the reader's mistake")

    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        raise JournalBroken("the disk cannot be read")

    def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]:
        return []

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        return []

    def notes(self, prefix: str) -> dict[str, bytes]:
        return {}

    def release_reserve(self) -> None: ...

    def restore_reserve(self) -> bool:
        return self.room

    def maintain(self, now_millis: int, *, idle: bool) -> list[Unfinished]:
        self.maintained.append(idle)
        taken, self.taken = self.taken, []
        return taken

    def close(self) -> None:
        self.closed = True


@dataclass
class Running:
    """A journal over such a backend, and what it reported."""

    backend: Scripted
    journal: Journal
    commits: list[tuple[float, int, int]]

    async def gather(self, count: int) -> list[Appended]:
        return await asyncio.gather(*(self.journal.append(admission(item(n))) for n in range(1, count + 1)))


@asynccontextmanager
async def running(settings: GroupSettings | None = None) -> AsyncIterator[Running]:
    backend, commits = Scripted(), list[tuple[float, int, int]]()
    journal = Journal(
        backend, now_millis=Clock().now_millis, settings=settings, on_commit=lambda *commit: commits.append(commit)
    )
    yield Running(backend, journal, commits)
    backend.go.release(1_000)
    await journal.close()
    assert backend.closed


async def test_groups() -> None:
    """All drafts that came during one commit make up the next one."""
    async with running() as it:
        first = asyncio.ensure_future(it.gather(1))
        await eventually(it.backend.begun.is_set)
        others = asyncio.ensure_future(it.gather(99))
        await asyncio.sleep(0)
        it.backend.go.release(2)
        await asyncio.gather(first, others)

        sizes = [len(group) for group in it.backend.groups]
        assert sizes == [1, 99]
        assert [drafts for _, drafts, _ in it.commits] == sizes
        assert all(seconds > 0 and payload_bytes > drafts for seconds, drafts, payload_bytes in it.commits)


async def test_groups_of_a_real_journal(tmp_path: Path) -> None:
    """Many requesters at once take far fewer commits than drafts."""
    store = SqliteKit(tmp_path / "journal.db")
    commits: list[int] = []
    backend, _ = store.open()
    journal = Journal(
        backend, now_millis=store.clock.now_millis, on_commit=lambda seconds, drafts, size: commits.append(drafts)
    )

    async def requester() -> None:
        for _ in range(10):
            await journal.append(admission())

    await asyncio.gather(*(requester() for _ in range(50)))
    await journal.close()
    assert sum(commits) == 500
    assert len(commits) < 100


async def test_bounds() -> None:
    """A commit takes no more drafts than the settings allow, and no further one when it has enough bytes."""
    async with running(GroupSettings(commit_drafts_max=7)) as it:
        it.backend.go.release(1_000)
        await it.gather(50)
        assert max(len(group) for group in it.backend.groups) == 7
        assert sum(len(group) for group in it.backend.groups) == 50
    async with running(GroupSettings(commit_bytes_max=3 * item(1).ByteSize())) as it:
        it.backend.go.release(1_000)
        await it.gather(50)
        assert max(len(group) for group in it.backend.groups) == 3
        assert sum(len(group) for group in it.backend.groups) == 50


async def test_one_call_into_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is woken once for a group, not once for a draft."""
    loop = asyncio.get_running_loop()
    calls: list[Callable[..., object]] = []
    wake = loop.call_soon_threadsafe

    def counted(function: Callable[..., object], *args: object) -> object:
        calls.append(function)
        return wake(function, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    async with running() as it:
        it.backend.go.release(1_000)
        await it.gather(200)

        assert len(calls) == len(it.backend.groups) < 200


async def test_maintenance() -> None:
    """Upkeep comes after the answers, and is told whether somebody waits."""
    async with running(GroupSettings(commit_drafts_max=1)) as it:
        appends = asyncio.ensure_future(it.gather(2))
        await eventually(it.backend.begun.is_set)
        it.backend.go.release(2)
        await appends
        await eventually(lambda: len(it.backend.maintained) == 2)

        assert it.backend.maintained == [False, True]


@pytest.mark.parametrize("fault", [JournalBroken("fenced"), OSError("I/O error"), AssertionError("our own bug")])
async def test_broken(fault: Exception) -> None:
    """After an error nothing is retried: all that wait fail, later calls fail at once, and the program is told why."""
    async with running() as it:
        appends = [asyncio.ensure_future(it.journal.append(admission())) for _ in range(5)]
        reads = [asyncio.ensure_future(it.journal.head()), asyncio.ensure_future(it.journal.wait(100))]
        await eventually(it.backend.begun.is_set)
        it.backend.fault = fault
        it.backend.go.release(1)
        results = await asyncio.gather(*appends, *reads, return_exceptions=True)

        assert all(isinstance(result, JournalBroken) for result in results)
        reason = await it.journal.broken
        assert str(fault) in str(reason)
        assert reason.__cause__ is fault
        for call in (it.journal.append(admission()), it.journal.head(), it.journal.wait(100)):
            with pytest.raises(JournalBroken):
                await call
        assert it.backend.groups == []


async def test_broken_with_a_cancelled_caller() -> None:
    """A caller that is gone is not missed when the journal breaks."""
    async with running() as it:
        tasks = [asyncio.ensure_future(it.journal.append(admission())) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        it.backend.fault = OSError("I/O error")
        it.backend.go.release(1)
        results = await asyncio.gather(*tasks, return_exceptions=True)

        assert [type(result) for result in results] == [asyncio.CancelledError, JournalBroken, JournalBroken]


async def test_reads_that_fail() -> None:
    """A reader's mistake is the reader's alone; a disk that cannot be read breaks the journal."""
    async with running() as it:
        with pytest.raises(LookupError):
            await it.journal.binding("", "k")
        assert not it.journal.broken.done()
        with pytest.raises(JournalBroken, match="cannot be read"):
            await it.journal.items(1, 1, 1)
        assert it.journal.broken.done()


async def test_starts_full() -> None:
    """A journal without its reserve refuses new work until the reserve is restored, by itself."""
    backend = Scripted(reserved=False, room=False)
    journal: Journal = Journal(backend, now_millis=Clock().now_millis, settings=GroupSettings(full_retry_seconds=0.01))
    with pytest.raises(JournalFull):
        await journal.append(admission())
    backend.room = True
    await eventually(lambda: not journal.full)
    await journal.close()


def test_settings() -> None:
    """Bounds that make no sense are refused when they are set."""
    for settings in ({"commit_drafts_max": 0}, {"commit_bytes_max": 0}, {"deferred_outcomes_max": -1}):
        with pytest.raises(ValueError, match="must"):
            GroupSettings(**settings)
    with pytest.raises(ValueError, match="must"):
        GroupSettings(full_retry_seconds=0)


async def test_every_entry_is_told_once(tmp_path: Path) -> None:
    """All that is made durable is told in the order of the indexes, also what nobody waits for any more."""
    told: list[int] = []
    backend, opened = SqliteKit(tmp_path / "journal.db").open()
    journal = Journal(
        backend,
        now_millis=Clock().now_millis,
        on_entries=lambda entries: told.extend(entry.header.index for entry in entries),
    )
    appends = [asyncio.ensure_future(journal.append(admission(item(n), item(n)))) for n in range(1, 30)]
    await asyncio.sleep(0)
    appends[3].cancel()
    await asyncio.gather(*appends, return_exceptions=True)
    last = (await journal.head()).index
    await journal.close()

    assert appends[3].cancelled()
    assert told == list(range(opened.head.index + 1, last + 1))


async def test_a_commit_that_cannot_be_counted(tmp_path: Path) -> None:
    """What fails when it is told of a commit breaks the journal, so that the process ends and recovers, and does not go on
    without having heard."""

    def failing(entries: list[Sealed]) -> None:
        if entries:
            raise ZeroDivisionError

    store = SqliteKit(tmp_path / "journal.db")
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    journal = Journal(store.open()[0], now_millis=store.clock.now_millis, on_entries=cast(Any, failing))
    await journal.append(admission())

    reason = await asyncio.wait_for(asyncio.shield(journal.broken), 10)
    await journal.close()
    assert isinstance(reason, JournalBroken)
    assert "ZeroDivisionError" in str(reason)
    assert [type(context["exception"]) for context in seen] == [ZeroDivisionError]
