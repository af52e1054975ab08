"""The `Journal` that the rest of the sidecar sees: one thread commits all that waits at once and reads in between."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ostinato.errors import JournalUnavailable

from sidecar.journal import Appended, Draft, JournalBroken, Outcome, Sealed, Unfinished
from sidecar.journal.committer import WHY, Backend, Committer, GroupSettings, Job, payload_bytes
from sidecar.journal.reads import Reads

T = TypeVar("T")
Answer = asyncio.Future[Any]
OnCommit = Callable[[float, int, int], None]
OnEntries = Callable[[Sequence[Sealed]], None]
OnTaken = Callable[[Sequence[Unfinished]], None]


@dataclass(frozen=True, slots=True)
class _Read:
    read: Callable[[], object]
    answer: Answer


@dataclass(frozen=True, slots=True)
class _Look:
    """Somebody has begun to wait for what others append."""


@dataclass(frozen=True, slots=True)
class _Close:
    pass


class GroupedJournal(Reads):
    """Implements `Journal` over a synchronous backend, which it owns from now on.

    Belongs to the event loop that is running when it is made. A caller that is cancelled while it appends loses the answer, not
    the draft. `on_commit` is called in the loop, after the answers, with a transaction's seconds, drafts and payload bytes;
    before that, `on_entries` with all that was made durable, in order, none left out; `on_taken` with items of other writers
    that have become this one's to finish.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        now_millis: Callable[[], int],
        settings: GroupSettings | None = None,
        on_commit: OnCommit = lambda seconds, drafts, payload_bytes: None,
        on_entries: OnEntries = lambda entries: None,
        on_taken: OnTaken = lambda unfinished: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[JournalBroken] = self._loop.create_future()
        """Done, with the reason, when the process has to end. Never an exception, never cancelled by us."""
        self._settings = settings or GroupSettings()
        super().__init__(backend, now_millis)
        self._on_commit, self._on_entries, self._on_taken = on_commit, on_entries, on_taken
        self._committer = Committer[Answer](backend, self._settings, now_millis, time.monotonic)
        self._jobs: queue.SimpleQueue[Job[Answer] | _Read | _Look | _Close] = queue.SimpleQueue()
        self._unanswered: dict[Answer, None] = {}
        self._durable_index = backend.head.index
        self._grown = self._loop.create_future()
        self._waiting = 0
        """Calls of `wait`; read by the thread too."""
        self._over = ""
        """Why nothing more is taken."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._looked_at = 0.0
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether admissions are refused for want of room."""
        return self._committer.full

    async def append(self, draft: Draft) -> Appended:
        """Durable on return. Takes its place in the order when it first runs: at once, if awaited."""
        appended: Appended = await self._put(draft)
        return appended

    async def append_outcomes(self, outcomes: Sequence[Outcome]) -> list[Appended]:
        """As `append` of each in turn, at the price of one task."""
        answers = [self._put(outcome) for outcome in outcomes]
        return [await answer for answer in answers]

    async def wait(self, index: int) -> None:
        """Until an entry with this index is durable."""
        self._waiting += 1
        try:
            if self._backend.poll_seconds is not None and not self._over:
                self._jobs.put(_Look())
            while self._durable_index < index:
                if self._over:
                    raise JournalBroken(self._over)
                await asyncio.shield(self._grown)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Append what waits, then let go of the database. Calls after this one raise JournalBroken."""
        if not self._over:
            self._over = "the journal is closed"
            self._jobs.put(_Close())
        await asyncio.shield(self._ended)
        self._thread.join()

    async def _read(self, read: Callable[[], T]) -> T:
        """Sees everything that was appended before it."""
        answer = self._expect()
        self._jobs.put(_Read(read, answer))
        value: T = await answer
        return value

    def _put(self, draft: Draft) -> Answer:
        answer = self._expect()
        self._jobs.put(Job(draft, answer))
        return answer

    def _expect(self) -> Answer:
        if self._over:
            raise JournalBroken(self._over)
        answer: Answer = self._loop.create_future()
        self._unanswered[answer] = None
        return answer

    # In the loop, on behalf of the thread.

    def _settle(self, answers: Sequence[tuple[Answer, object]], commits: Iterable[tuple[float, int, int]], index: int) -> None:
        for answer, value in answers:
            self._unanswered.pop(answer, None)
            if answer.done():
                continue
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)
        self._on_entries([entry for _, value in answers if isinstance(value, Appended) for entry in value.entries])
        if index > self._durable_index:
            self._durable_index = index
            self._wake()
        for commit in commits:
            self._on_commit(*commit)

    def _finish(self, error: JournalBroken | None) -> None:
        """The thread is at its end; with an error if it is not known what is durable."""
        if error is not None:
            self._over = str(error)
            if not self.broken.done():
                self.broken.set_result(error)
        for answer in self._unanswered:
            if not answer.done():
                answer.set_exception(JournalBroken(self._over))
                answer.exception()  # whoever waits for many sees only the first
        self._unanswered.clear()
        self._wake()
        if not self._ended.done():
            self._ended.set_result(None)

    def _guarded(self, function: Callable[..., None], arguments: Sequence[object]) -> None:
        """What fails here has not been told what is durable, or whose items are taken over: the process has to recover."""
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

    # In the thread.

    def _work(self) -> None:
        error = None
        try:
            while self._round():
                pass
        except BaseException as problem:  # noqa: BLE001  # whatever it is, nobody commits any more, and the program must know
            error = JournalBroken(str(problem) if isinstance(problem, JournalBroken) else repr(problem))
            error.__cause__ = problem
        with suppress(Exception):
            self._backend.close()
        self._call(self._finish, error)

    def _round(self) -> bool:
        """Commit what waits, answer what asks. False: that was the last time."""
        jobs, closing = self._take()
        done = self._committer.commit([job for job in jobs if isinstance(job, Job)])
        if done.settled:
            self._call(self._settle, done.settled, done.commits, self._backend.head.index)
        read = [(job.answer, self._answer(job.read)) for job in jobs if isinstance(job, _Read)]
        if read:
            self._call(self._settle, read, (), self._backend.head.index)
        if closing:
            done = self._committer.finish()
            self._call(self._settle, done.settled, done.commits, self._backend.head.index)
            return False
        taken = self._committer.maintain(idle=self._jobs.empty())
        if taken:
            self._call(self._on_taken, taken)
        self._look()
        return True

    def _look(self) -> None:
        """Whether others have appended, if somebody waits for it."""
        poll_seconds = self._backend.poll_seconds
        if poll_seconds is None or not self._waiting or time.monotonic() < self._looked_at + poll_seconds:
            return
        self._looked_at = time.monotonic()
        with suppress(JournalUnavailable):
            self._call(self._settle, (), (), self._backend.newest().index)

    def _idle_seconds(self) -> float | None:
        """How long the queue may stay empty before there is something to do all the same."""
        poll_seconds = self._backend.poll_seconds if self._waiting else None
        bounds = (self._committer.idle_seconds(), self._backend.idle_seconds(), poll_seconds)
        return min((bound for bound in bounds if bound is not None), default=None)

    def _take(self) -> tuple[list[Job[Answer] | _Read | _Look], bool]:
        """All that waits, as far as it fits into a commit; and whether nothing comes after it."""
        jobs: list[Job[Answer] | _Read | _Look] = []
        size, timeout = 0, self._idle_seconds()
        while len(jobs) < self._settings.commit_drafts_max and size < self._settings.commit_bytes_max:
            try:
                job = self._jobs.get_nowait() if jobs else self._jobs.get(timeout=timeout)
            except queue.Empty:
                break
            if isinstance(job, _Close):
                return jobs, True
            jobs.append(job)
            size += payload_bytes(job.draft) if isinstance(job, Job) else 0
        return jobs, False

    def _answer(self, read: Callable[[], object]) -> object:
        try:
            return read()
        except JournalBroken:
            raise
        except JournalUnavailable:
            return JournalUnavailable(WHY[JournalUnavailable], retry_after=self._settings.full_retry_seconds)
        except Exception as error:  # noqa: BLE001  # the reader's mistake, and its to hear of
            return error

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._guarded, function, arguments)
