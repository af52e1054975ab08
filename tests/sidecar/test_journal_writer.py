"""The group commit: what is committed together, and what happens without room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from ostinato.chain import GENESIS
from ostinato.errors import JournalFull, RecordDamaged

from sidecar.journal.ledger import Known, Ledger
from sidecar.journal.model import (
    Appended,
    Binding,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Sealed,
    Unfinished,
)
from sidecar.journal.sqlite import Reserve
from sidecar.journal.writer import DEFERRED_GROUP, Committer, GroupSettings, Job, Journal, Refusal
from tests.sidecar.journal_disk import Disk
from tests.sidecar.journal_kit import LOG_ID, SECRET, Clock, SqliteKit, admission, audit, checked, completed, ended, item
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
    to_recover: Sequence[Unfinished] = ()
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
        ledger = Ledger(self.head, Known(), now_millis, SECRET)
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

    def newest_signed(self) -> None:
        return None

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
    """Upkeep comes after the answers, and is told whether work waits."""
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


async def test_every_entry_is_told_once(tmp_path: Path) -> None:
    """All that becomes durable is reported in the order of the indexes, also if its caller is gone."""
    told: list[int] = []
    backend = SqliteKit(tmp_path / "journal.db").open()
    newest = backend.head.index
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
    assert told == list(range(newest + 1, last + 1))


async def test_a_commit_that_cannot_be_counted(tmp_path: Path) -> None:
    """What fails when it is told of a commit breaks the journal, so that the process ends and recovers, and does not go on
    without having heard."""

    def failing(entries: list[Sealed]) -> None:
        if entries:
            raise ZeroDivisionError

    store = SqliteKit(tmp_path / "journal.db")
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    journal = Journal(store.open(), now_millis=store.clock.now_millis, on_entries=cast(Any, failing))
    await journal.append(admission())

    reason = await asyncio.wait_for(asyncio.shield(journal.broken), 10)
    await journal.close()
    assert isinstance(reason, JournalBroken)
    assert "ZeroDivisionError" in str(reason)
    assert [type(context["exception"]) for context in seen] == [ZeroDivisionError]


RETRY = 5.0


class Full:
    """A committer over a journal on a disk whose size is ours to set."""

    def __init__(self, folder: Path, deferred_outcomes_max: int = 100) -> None:
        self.disk, self.clock = Disk(), Clock()
        self.store = SqliteKit(folder / "journal.db", clock=self.clock, vfs=self.disk.name)
        self.journal = self.store.open()
        settings = GroupSettings(full_retry_seconds=RETRY, deferred_outcomes_max=deferred_outcomes_max)
        self.committer = Committer[str](self.journal, settings, self.clock.now_millis, self.clock.seconds)

    def admit(self, count: int) -> list[Sealed]:
        return list(self.journal.append_many([admission(*(item(n) for n in range(1, count + 1)))], 1)[0].entries)

    def fill(self, more: int = 0) -> None:
        """Leave room for so many bytes."""
        self.disk.bytes_max = sum(len(image.data) for image in self.disk.files.values()) + more

    def is_full(self) -> bool:
        return self.committer.full

    def end(self) -> None:
        self.disk.bytes_max = 1 << 40
        self.journal.close()

    def commit(self, **drafts: Draft) -> dict[str, Appended | Refusal | RecordDamaged]:
        """The results of the drafts that were settled, by name."""
        return dict(self.committer.commit([Job(draft, name) for name, draft in drafts.items()]).settled)


@pytest.fixture(name="full")
def _full(tmp_path: Path) -> Iterator[Full]:
    full = Full(tmp_path)
    yield full
    full.end()


def test_admissions_are_refused(full: Full) -> None:
    """Without room an admission and a verdict are refused, and told when to come again; reads go on."""
    (entry,) = full.admit(1)
    full.fill()
    answers = full.commit(admission=admission(), audit=audit(entry))

    assert full.is_full()
    assert not full.journal.reserved
    for answer in answers.values():
        assert isinstance(answer, JournalFull)
        assert answer.retry_after == RETRY
    assert full.committer.idle_seconds() == RETRY
    assert len(full.journal.items(1, 10, 10)) == 1


def test_outcomes_use_the_reserve(full: Full) -> None:
    """As long as they find room, outcomes are appended at once, though new work is refused."""
    entries = full.admit(2)
    full.fill(100_000)
    for name, entry in zip(("first", "second"), entries, strict=True):
        drafts: dict[str, Draft] = {"refused": admission(item(*range(100_000))), name: completed(entry)}
        answers = full.commit(**drafts)
        assert isinstance(answers["refused"], JournalFull)
        assert isinstance(answers[name], Appended)
    assert full.is_full()


def test_bound_keys_are_answered(full: Full) -> None:
    """A retry by key needs no room, so it gets its binding."""
    full.journal.append_many([admission(key="k")], full.clock.millis)
    full.fill()
    answers = full.commit(new=admission(key="new"), retry=admission(key="k"))

    assert isinstance(answers["new"], JournalFull)
    assert isinstance(answers["retry"], Appended)
    assert answers["retry"].binding is not None


def test_outcomes_wait(full: Full) -> None:
    """Outcomes without room are deferred, and appended in their order before anything else when room returns."""
    entries = full.admit(5)
    full.fill()
    big = "x" * 50_000
    assert list(full.commit(first=completed(entries[3], text=big), refused=admission())) == ["refused"]
    assert full.commit(second=completed(entries[1]), third=ended(entries[2])) == {}
    full.clock.sleep(RETRY)
    assert full.commit() == {}
    assert full.is_full()

    full.fill(1 << 20)
    assert full.commit(fourth=ended(entries[0])) == {}, "it is not time yet"
    full.clock.sleep(RETRY)
    answers = full.commit(fifth=ended(entries[4]))
    assert list(answers) == ["first", "second", "third", "fourth", "fifth"]
    assert [a.entries[0].header.sequence for a in answers.values() if isinstance(a, Appended)] == [4, 2, 3, 1, 5]
    assert not full.is_full()
    assert isinstance(full.commit(admission=admission())["admission"], Appended)
    recorded = full.journal.entries(1, 100, payloads=True)
    checked(recorded)


def test_little_room_is_used(full: Full) -> None:
    """Where there is room for some outcomes only, those go that fit, and the others stay in order."""
    entries = full.admit(3 * DEFERRED_GROUP)
    full.fill()
    drafts = {f"{n:02}": completed(entry, text="x" * 4_000) for n, entry in enumerate(entries)}
    assert full.commit(**drafts) == {}
    full.fill(DEFERRED_GROUP * 9_000)
    full.clock.sleep(RETRY)
    some = list(full.commit())
    assert 0 < len(some) < len(drafts)

    full.fill(1 << 20)
    full.clock.sleep(RETRY)
    assert some + list(full.commit()) == list(drafts)


def test_too_many_outcomes_wait(tmp_path: Path) -> None:
    """Memory is bounded: more deferred outcomes than the setting allows break the journal."""
    full = Full(tmp_path, deferred_outcomes_max=2)
    entries = full.admit(3)
    full.fill()
    assert full.commit(first=completed(entries[0]), second=completed(entries[1])) == {}

    with pytest.raises(JournalBroken, match="more than 2 outcomes"):
        full.commit(third=completed(entries[2]))
    full.end()


def test_deferred_outcome_counts_as_first(full: Full) -> None:
    """Of two outcomes of an item that both had to wait, the one that came first is recorded."""
    (entry,) = full.admit(1)
    full.fill()
    assert full.commit(first=completed(entry), second=ended(entry)) == {}
    full.fill(1 << 20)
    full.clock.sleep(RETRY)
    answers = full.commit()

    assert [len(a.entries) for a in answers.values() if isinstance(a, Appended)] == [1, 0]


def test_finish(full: Full) -> None:
    """At the end what waits is tried a last time; what still has no room is for recovery to find unfinished."""
    entries = full.admit(2)
    full.fill()
    full.commit(first=completed(entries[0]))
    assert full.committer.finish().settled == []
    full.fill(1 << 20)
    assert [name for name, _ in full.committer.finish().settled] == ["first"]
    full.journal.close()

    journal = full.store.open()
    assert [one.admitted.header.sequence for one in journal.to_recover] == [2]
    journal.close()


@pytest.mark.parametrize("more", range(0, 40_000, 2_000))
def test_no_room_anywhere(full: Full, more: int) -> None:
    """Wherever in a commit the disk runs full, it leaves no trace and the journal goes on."""
    entries = full.admit(8)
    head = full.journal.head
    full.fill(more)
    group: list[Draft] = [admission(item(*range(3_000)), key="k"), *(completed(entry, text="x" * 2_000) for entry in entries)]
    with pytest.raises(JournalFull):
        full.journal.append_many(group, full.clock.millis)
    assert full.journal.head == head
    assert full.journal.binding("", "k", full.clock.millis) is None

    full.fill(1 << 20)
    answers = full.journal.append_many(group, full.clock.millis)
    assert [len(answer.entries) for answer in answers] == [1] * 9
    full.journal.close()
    with full.store.opened() as journal:
        recorded = journal.entries(1, 100, payloads=True)
    checked(recorded)


async def test_grouped_journal(tmp_path: Path) -> None:
    """Refused, waiting and reading callers are served side by side, and all recover by themselves."""
    full = Full(tmp_path)
    entries = full.admit(4)
    settings = GroupSettings(full_retry_seconds=0.02)
    journal = Journal(full.journal, now_millis=full.clock.now_millis, settings=settings)
    full.fill()
    with pytest.raises(JournalFull):
        await journal.append(admission(item(*range(5_000))))

    outcomes = [asyncio.ensure_future(journal.append(completed(entry, text="x" * 9_000))) for entry in entries]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in outcomes)
    assert (await journal.items(1, 1, 1))[0].outcome is None
    full.disk.bytes_max = 1 << 40
    answers: Sequence[Appended] = await asyncio.gather(*outcomes)
    assert [a.entries[0].header.sequence for a in answers] == [1, 2, 3, 4]
    async with asyncio.timeout(30):
        while journal.full:
            await asyncio.sleep(0.02)
    assert len((await journal.append(admission())).entries) == 1
    await journal.close()


async def test_closing_while_full(tmp_path: Path) -> None:
    """A program that ends while outcomes wait tells their callers that they are not durable, and the next one finds them."""
    full = Full(tmp_path)
    (entry,) = full.admit(1)
    journal = Journal(full.journal, now_millis=full.clock.now_millis)
    full.fill()
    outcome = asyncio.ensure_future(journal.append(completed(entry, text="x" * 50_000)))
    await asyncio.sleep(0.05)
    await journal.close()
    with pytest.raises(JournalBroken, match="closed"):
        await outcome
    assert not journal.broken.done()

    full.disk.bytes_max = 1 << 40
    again = full.store.open()
    again.close()
    assert [one.admitted.header.sequence for one in again.to_recover] == [1]


async def test_room_at_the_end(tmp_path: Path) -> None:
    """Outcomes that wait when the program ends are tried a last time."""
    full = Full(tmp_path)
    (entry,) = full.admit(1)
    settings = GroupSettings(full_retry_seconds=3_600)
    journal = Journal(full.journal, now_millis=full.clock.now_millis, settings=settings)
    full.fill()
    outcome = asyncio.ensure_future(journal.append(completed(entry, text="x" * 50_000)))
    await asyncio.sleep(0.05)
    full.disk.bytes_max = 1 << 40
    await journal.close()

    assert len((await outcome).entries) == 1


def test_opening_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the first entry finds no room, opening says so; a reserve is freed for it, and then new work is refused."""
    full = Full(tmp_path)
    full.journal.close()
    full.fill()
    with pytest.raises(JournalUnusable, match="disk is full"):
        full.store.open()

    def release(reserve: Reserve) -> None:
        """The file lies on a real disk, and what it takes up is missing on ours."""
        reserve._path.unlink()
        reserve.held = False
        full.fill(100_000)

    full.store.configure(reserve_bytes=100_000)
    monkeypatch.setattr(Reserve, "release", release)
    tmp_path.joinpath("journal.db.reserve").write_bytes(bytes(100_000))
    monkeypatch.setattr(Reserve, "take", lambda _: False)
    with full.store.opened() as journal:
        assert journal.head.epoch == 2
        with pytest.raises(JournalFull):
            journal.append_many([admission()], 1)
    full.end()
