"""The group commit: one thread appends all drafts that wait in one transaction, and reads in between.

`Committer` decides what is committed together and what happens when there is no room. `Journal` gives it a thread. The
rest of the sidecar calls `Journal`.

    not full --no room, no database--> full, the reserve released --room again, nothing deferred, reserve restored--> not full

While the journal is full only outcomes are appended. Those that find no room are deferred, in order, and go first when there is
room. Drafts whose commit is in doubt go before them: they are answered when it is known whether they are durable.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from ostinato.errors import JournalFull, JournalUnavailable, RecordDamaged
from ostinato.v1 import types_pb2
from serving.auth import caller

from sidecar.journal.model import (
    Admission,
    Appended,
    Binding,
    CommitUnknown,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    Outcome,
    Sealed,
    Unfinished,
)
from sidecar.journal.store import Store, check_batch, check_entries
from sidecar.turns import QUANTUM_BYTES, TurnQueue

T = TypeVar("T")
Refusal = JournalFull | JournalUnavailable

DEFERRED_GROUP = 16
"""Deferred outcomes in one commit: few, so that little room is of use."""

READS = 4
"""Of items, at once; half as many for one tenant."""

WHY: Mapping[type[Refusal], str] = {
    JournalFull: "the journal has no room for new work",
    JournalUnavailable: "the journal's database cannot be reached",
}
"""The message for callers. The log has the details."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """Bounds of a commit, and of the outcomes that wait for room."""

    commit_drafts_max: int = 256
    commit_bytes_max: int = 8 << 20
    """Of payloads; a single draft may be larger."""
    deferred_outcomes_max: int = 4_096
    """Outcomes kept in memory while there is no room; one more breaks the journal."""
    full_retry_seconds: float = 1.0
    """How often a full journal looks for room, and what refused callers are told to wait."""


class Job(msgspec.Struct, Generic[T], frozen=True, eq=False):
    """A draft, and a tag by which the caller recognises the answer."""

    draft: Draft
    tag: T


class Round(msgspec.Struct, Generic[T]):
    """The result of a round of commits."""

    settled: list[tuple[T, Appended | Refusal | RecordDamaged]] = msgspec.field(default_factory=list)
    """By tag, without what is deferred."""
    commits: list[tuple[float, int, int]] = msgspec.field(default_factory=list)
    """Seconds, drafts and payload bytes of each transaction that became durable."""


class Committer(Generic[T]):
    """Appends drafts in the order given. After JournalBroken, or any other error, it must not be called again.

    `now_millis` is Unix time, for entries and keys. `seconds` is a monotonic clock, for the next look for room.
    """

    def __init__(
        self, store: Store, settings: GroupSettings, now_millis: Callable[[], int], seconds: Callable[[], float]
    ) -> None:
        self.full = not store.reserved
        """Whether all drafts but outcomes are refused."""
        self._store, self._settings = store, settings
        self._now_millis, self._seconds = now_millis, seconds
        self._in_doubt: list[Job[T]] = []
        self._deferred: list[Job[T]] = []
        self._why: type[Refusal] = JournalFull
        self._retry_at = seconds()

    def idle_seconds(self) -> float | None:
        """When `commit` has to be called at the latest; None: only with work."""
        return max(0.0, self._retry_at - self._seconds()) if self.full else None

    def commit(self, jobs: Sequence[Job[T]]) -> Round[T]:
        """Append these, after what was deferred. Without jobs: look for room, if it is time."""
        done = Round[T]()
        if not self.full:
            if not jobs or self._append(jobs, done):
                return done
            self._shut()
            if self._in_doubt:
                return done
        due = self._seconds() >= self._retry_at
        may_fit = due or not (self._in_doubt or self._deferred)
        for job in jobs:
            self._defer(job, done)
        if may_fit:
            self._append_deferred(done)
        if len(self._deferred) > self._settings.deferred_outcomes_max:
            raise JournalBroken(f"no room, and more than {self._settings.deferred_outcomes_max} outcomes wait for it")
        if due:
            self.full = bool(self._in_doubt or self._deferred) or not self._store.restore_reserve()
            self._retry_at = self._seconds() + self._settings.full_retry_seconds
        return done

    def maintain(self, *, idle: bool) -> Sequence[Unfinished]:
        """The store's upkeep, which also finds out that the database cannot be reached."""
        try:
            return self._store.maintain(self._now_millis(), idle=idle)
        except JournalUnavailable:
            self._why = JournalUnavailable
            self._shut()
            return ()

    def finish(self) -> Round[T]:
        """Try a last time. What still finds no room is not durable: the next start finds its items unfinished."""
        done = Round[T]()
        self._append_deferred(done)
        return done

    def _shut(self) -> None:
        self.full = True
        self._store.release_reserve()
        self._retry_at = self._seconds() + self._settings.full_retry_seconds

    def _defer(self, job: Job[T], done: Round[T]) -> None:
        if isinstance(job.draft, Outcome):
            self._deferred.append(job)
        else:
            done.settled.append((job.tag, self._refuse(job.draft)))

    def _append_deferred(self, done: Round[T]) -> None:
        in_doubt, self._in_doubt = self._in_doubt, []
        if in_doubt and not self._append(in_doubt, done):
            if not self._in_doubt:  # they are not durable, so they are deferred or refused like all others
                deferred, self._deferred = self._deferred, []
                for job in in_doubt:
                    self._defer(job, done)
                self._deferred += deferred
            return
        while self._deferred and not self._in_doubt:
            group, appended = self._deferred[:DEFERRED_GROUP], self._append(self._deferred[:DEFERRED_GROUP], done)
            if not appended and not self._in_doubt:
                return
            del self._deferred[: len(group)]

    def _append(self, jobs: Sequence[Job[T]], done: Round[T]) -> bool:
        started = self._seconds()
        try:
            appended = self._store.append_many([job.draft for job in jobs], self._now_millis())
        except (JournalFull, JournalUnavailable) as refusal:
            self._why = type(refusal)
            return False
        except CommitUnknown:
            self._why, self._in_doubt = JournalUnavailable, list(jobs)
            return False
        except RecordDamaged as damaged:
            return self._append_apart(jobs, damaged, done)
        size = sum(len(entry.payload) for each in appended for entry in each.entries)
        done.commits.append((self._seconds() - started, len(jobs), size))
        done.settled += [(job.tag, each) for job, each in zip(jobs, appended, strict=True)]
        return True

    def _append_apart(self, jobs: Sequence[Job[T]], damaged: RecordDamaged, done: Round[T]) -> bool:
        """What one of these needs is damaged: append the others."""
        if len(jobs) == 1:
            done.settled.append((jobs[0].tag, damaged))
            return True
        for job in jobs:
            if not self._append([job], done):
                raise JournalBroken(f"{WHY[self._why]}, while drafts are appended one by one: {damaged.message}")
        return True

    def _refuse(self, draft: Draft) -> Appended | Refusal | RecordDamaged:
        if isinstance(draft, Admission) and draft.key:
            with suppress(JournalUnavailable):
                try:
                    binding = self._store.binding(draft.tenant, draft.key, self._now_millis())
                except RecordDamaged as damaged:
                    return damaged
                if binding is not None:
                    return Appended((), binding=binding)
        return self._why(WHY[self._why], retry_after=self._settings.full_retry_seconds)


def payload_bytes(draft: Draft) -> int:
    """Only those of items: other drafts are few and small."""
    if isinstance(draft, Outcome):
        return draft.payload.ByteSize()
    return sum(item.ByteSize() for item in draft.items) if isinstance(draft, Admission) else 0


Answer = asyncio.Future[Any]
OnCommit = Callable[[float, int, int], None]
OnEntries = Callable[[Sequence[Sealed]], None]
OnTaken = Callable[[Sequence[Unfinished]], None]


class _Read(msgspec.Struct, frozen=True, eq=False):
    read: Callable[[], object]
    answer: Answer


class _Signal(Enum):
    POLL = auto()
    """A caller of `wait` needs to know what other writers append."""
    CLOSE = auto()


class Journal:
    """The journal as the rest of the sidecar sees it, over a store that it owns.

    1. What `append` returns is durable.
    2. Appends take effect in the order of the calls, and so do sequences. Other writers may append in between.
    3. A read sees every append that was called before it.
    4. `on_entries` is given every entry that this journal made durable, once, by ascending index.
    5. While there is no room, outcomes wait, in order and up to a bound that breaks the journal; everything else is refused.

    Raises errors.JournalFull (there is no room for anything but an Outcome; outcomes wait for room instead),
    errors.JournalUnavailable (the same, while the database cannot be reached; reads raise it too) and JournalBroken (it is not
    known what is durable, or another process has this writer's name: the process must end and recover; also after `close`).

    Belongs to the event loop that is running when it is made. A caller that is cancelled while it appends loses the answer, not
    the draft. The callbacks are called in the loop: `on_entries` after the answers, then `on_commit` with the seconds, drafts
    and payload bytes of each transaction; `on_taken` with items of other writers that this one has to finish now;
    `on_damaged` with the message of each RecordDamaged, and why a twin could not be compared.
    """

    def __init__(
        self,
        store: Store,
        *,
        now_millis: Callable[[], int],
        settings: GroupSettings | None = None,
        on_commit: OnCommit = lambda seconds, drafts, payload_bytes: None,
        on_entries: OnEntries = lambda entries: None,
        on_taken: OnTaken = lambda unfinished: None,
        on_damaged: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[JournalBroken] = self._loop.create_future()
        """Set to the reason when the process has to end. It never has an exception, and the journal never cancels it."""
        self._settings = settings or GroupSettings()
        self._store, self._now_millis = store, now_millis
        self._on_commit, self._on_entries, self._on_taken, self._on_damaged = on_commit, on_entries, on_taken, on_damaged
        self._committer = Committer[Answer](store, self._settings, now_millis, time.monotonic)
        self._jobs: queue.SimpleQueue[Job[Answer] | _Read | _Signal] = queue.SimpleQueue()
        self._turns = TurnQueue(READS, READS // 2)
        self._unanswered: dict[Answer, None] = {}
        self._durable_index = self._reported_index = store.head.index
        self._grown = self._loop.create_future()
        self._waiting = 0
        """Calls of `wait`; the thread reads it too."""
        self._over = ""
        """Why no more calls are accepted; empty while they are."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._polled_at = 0.0
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether admissions are refused: there is no room, or no database."""
        return self._committer.full

    def append(self, draft: Draft) -> asyncio.Future[Appended]:
        """Done when it is durable. It takes its place in the order now."""
        return self._ask(partial(Job, draft))

    async def wait(self, index: int) -> None:
        """Until an entry with this index is durable, of any writer."""
        self._waiting += 1
        try:
            if self._store.poll_seconds is not None and not self._over:
                self._jobs.put(_Signal.POLL)
            while self._durable_index < index:
                if self._over:
                    raise JournalBroken(self._over)
                await asyncio.shield(self._grown)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Append what waits, then close the store. Calls after this one raise JournalBroken."""
        if not self._over:
            self._over = "the journal is closed"
            self._jobs.put(_Signal.CLOSE)
        await asyncio.shield(self._ended)
        self._thread.join()

    async def binding(self, tenant: str, key: str) -> Binding | None:
        """What a key stands for, if it is bound and has not expired."""
        return await self._read(lambda: self._store.binding(tenant, key, self._now_millis()))

    async def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        """The items numbered first to last, ascending, at most limit. Unknown numbers are left out. Raises RecordDamaged."""
        return await self._read_items(lambda: self._checked_items(first, last, limit))

    async def batch(self, tenant: str, key: str, binding: Binding) -> Sequence[ItemEntries]:
        """The items of a bound key. Raises RecordDamaged if they are not a batch of this key, as far as payloads are kept."""

        def checked() -> Sequence[ItemEntries]:
            first, count = binding.first_sequence, binding.count
            found = self._checked_items(first, first + count - 1, count)
            check_batch(found, tenant, key, binding)
            return found

        return await self._read_items(checked)

    async def _read_items(self, read: Callable[[], Sequence[ItemEntries]]) -> Sequence[ItemEntries]:
        """In turns: what was read for callers that have not looked at it yet is in memory, and may be megabytes each."""
        async with self._turns.place(caller().tenant, QUANTUM_BYTES):
            return await self._read(read)

    async def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]:
        """ADMITTED entries of the items first to last that have no outcome, of every writer, ascending, at most limit."""

        def checked() -> Sequence[Sealed]:
            found = self._store.unfinished(first, last, limit)
            check_entries(found)
            return found

        return await self._read(checked)

    async def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        """Consecutive entries, at most limit; empty beyond the head. Raises RecordDamaged."""

        def checked() -> Sequence[Sealed]:
            found = self._store.entries(from_index, limit, payloads=payloads)
            check_entries(found)
            for index, entry in enumerate(found, from_index):
                if entry.header.index != index:
                    raise RecordDamaged(f"entry {index} is missing")
            return found

        return await self._read(checked)

    async def notes(self, prefix: str) -> Mapping[str, bytes]:
        """Every note whose name begins with prefix, by name."""
        return await self._read(lambda: self._store.notes(prefix))

    async def newest_signed(self) -> types_pb2.SignedHead | None:
        """The newest signed head, of any writer; None: no transaction was signed."""
        return await self._read(self._store.newest_signed)

    async def head(self) -> Head:
        return await self._read(self._store.newest)

    async def _read(self, read: Callable[[], T]) -> T:
        value: T = await self._ask(partial(_Read, read))
        return value

    def _ask(self, job: Callable[[Answer], Job[Answer] | _Read]) -> Answer:
        answer: Answer = self._loop.create_future()
        if self._over:
            answer.set_exception(JournalBroken(self._over))
        else:
            self._unanswered[answer] = None
            self._jobs.put(job(answer))
        return answer

    # ---- in the event loop, called by the thread

    def _settle(self, answers: Sequence[tuple[Answer, object]], commits: Iterable[tuple[float, int, int]], index: int) -> None:
        for answer, value in answers:
            self._unanswered.pop(answer, None)
            if answer.done():
                continue
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)
        entries = [entry for _, value in answers if isinstance(value, Appended) for entry in value.entries]
        if entries:
            assert entries[0].header.index > self._reported_index, "entries are reported by ascending index"
            self._reported_index = entries[-1].header.index
        self._on_entries(entries)
        for _, value in answers:
            if damaged := value.damaged if isinstance(value, Appended) else isinstance(value, RecordDamaged) and value.message:
                self._on_damaged(damaged)
        if index > self._durable_index:
            self._durable_index = index
            if self._waiting:
                self._wake()
        for commit in commits:
            self._on_commit(*commit)

    def _finish(self, error: JournalBroken | None) -> None:
        """The thread has ended. With an error it is not known what is durable."""
        if error is not None:
            self._over = str(error)
            if not self.broken.done():
                self.broken.set_result(error)
        for answer in self._unanswered:
            if not answer.done():
                answer.set_exception(JournalBroken(self._over))
                answer.exception()  # marks it as retrieved: a caller that gathers many retrieves only the first
        self._unanswered.clear()
        self._wake()
        if not self._ended.done():
            self._ended.set_result(None)

    def _guarded(self, function: Callable[..., None], arguments: Sequence[object]) -> None:
        """A callback that fails has missed what is durable, or whose items are taken over: the process has to recover."""
        try:
            function(*arguments)
        except Exception as error:
            if not self.broken.done():
                broken = JournalBroken(repr(error))
                broken.__cause__ = error
                self.broken.set_result(broken)
            raise

    def _wake(self) -> None:
        grown, self._grown = self._grown, self._loop.create_future()
        grown.set_result(None)

    # ---- in the thread

    def _work(self) -> None:
        error = None
        try:
            while self._round():
                pass
        except BaseException as problem:  # noqa: BLE001  # nothing is committed any more: the program has to know
            error = JournalBroken(str(problem) if isinstance(problem, JournalBroken) else repr(problem))
            error.__cause__ = problem
        with suppress(Exception):
            self._store.close()
        self._call(self._finish, error)

    def _round(self) -> bool:
        """Commit the drafts that wait, then answer the reads. False: the journal is closed."""
        jobs, closing = self._take()
        done = self._committer.commit([job for job in jobs if isinstance(job, Job)])
        if done.settled:
            self._call(self._settle, done.settled, done.commits, self._store.head.index)
        read = [(job.answer, self._answer(job.read)) for job in jobs if isinstance(job, _Read)]
        if read:
            self._call(self._settle, read, (), self._store.head.index)
        if closing:
            done = self._committer.finish()
            self._call(self._settle, done.settled, done.commits, self._store.head.index)
            return False
        taken = self._committer.maintain(idle=self._jobs.empty())
        if taken:
            self._call(self._on_taken, taken)
        if self._store.poll_seconds is not None and self._waiting:
            self._poll(self._store.poll_seconds)
        return True

    def _poll(self, poll_seconds: float) -> None:
        """Look for entries of other writers: a caller waits for one."""
        if time.monotonic() >= self._polled_at + poll_seconds:
            self._polled_at = time.monotonic()
            with suppress(JournalUnavailable):
                self._call(self._settle, (), (), self._store.newest().index)

    def _take(self) -> tuple[list[Job[Answer] | _Read | _Signal], bool]:
        """The jobs that wait, as many as fit into a commit; and whether the journal is closed after them."""
        jobs: list[Job[Answer] | _Read | _Signal] = []
        poll_seconds = self._store.poll_seconds if self._waiting else None
        bounds = (self._committer.idle_seconds(), self._store.idle_seconds(), poll_seconds)
        size, timeout = 0, min((bound for bound in bounds if bound is not None), default=None)
        while len(jobs) < self._settings.commit_drafts_max and size < self._settings.commit_bytes_max:
            try:
                job = self._jobs.get_nowait() if jobs else self._jobs.get(timeout=timeout)
            except queue.Empty:
                break
            if job is _Signal.CLOSE:
                return jobs, True
            jobs.append(job)
            size += payload_bytes(job.draft) if isinstance(job, Job) else 0
        return jobs, False

    def _checked_items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        found = self._store.items(first, last, limit)
        check_entries(entry for each in found for entry in (each.admitted, each.outcome, each.verified) if entry)
        for each in found:
            if each.unsigned:
                self._call(self._on_damaged, each.unsigned)
            if each.outcome is not None and bool(each.admitted.payload) != bool(each.outcome.payload):
                sequence = each.admitted.header.sequence
                raise RecordDamaged(f"a payload of sequence {sequence} is missing: its two are kept or dropped together")
        return found

    def _answer(self, read: Callable[[], object]) -> object:
        try:
            return read()
        except JournalBroken:
            raise
        except JournalUnavailable:
            return JournalUnavailable(WHY[JournalUnavailable], retry_after=self._settings.full_retry_seconds)
        except Exception as error:  # noqa: BLE001  # the caller's mistake, or a damaged record: the caller gets it
            return error

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._guarded, function, arguments)
