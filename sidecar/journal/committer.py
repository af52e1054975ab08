"""What is committed together, and what happens when there is no room. Synchronous; `grouped` gives it a thread.

    not full --no room, no database--> full, the reserve released --room again, nothing withheld, reserve restored--> not full

While it is full only outcomes are appended; those that find no room are withheld, in order, and go first when there is some.
Drafts whose commit is in doubt go before them: until it is known whether they are durable, nobody is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ostinato.errors import JournalFull, JournalUnavailable

from sidecar.journal import (
    Admission,
    Appended,
    Audit,
    Binding,
    CommitUnknown,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    Loss,
    Note,
    Outcome,
    Sealed,
    Unfinished,
)

T = TypeVar("T")
Refusal = JournalFull | JournalUnavailable

WITHHELD_GROUP = 16
"""Withheld outcomes in one commit: few, so that little room is of use."""

WHY: Mapping[type[Refusal], str] = {
    JournalFull: "the journal has no room for new work",
    JournalUnavailable: "the journal's database cannot be reached",
}
"""What callers are told. More of it is in the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """Bounds of a commit, and of what waits for room."""

    commit_drafts_max: int = 256
    commit_bytes_max: int = 8 << 20
    """Of payloads; a single draft may be larger."""
    withheld_outcomes_max: int = 4_096
    """Outcomes kept in memory while there is no room; one more breaks the journal."""
    full_retry_seconds: float = 1.0
    """How often a full journal looks for room, and what refused callers are told to wait."""

    def __post_init__(self) -> None:
        if (
            min(self.commit_drafts_max, self.commit_bytes_max) < 1
            or self.withheld_outcomes_max < 0
            or self.full_retry_seconds <= 0
        ):
            raise ValueError("commit_drafts_max, commit_bytes_max and full_retry_seconds must be positive")


class Backend(Protocol):
    """A synchronous journal, used by one thread at a time. `SqliteJournal` says what each method promises and raises.

    One that is shared with other writers may also raise JournalUnavailable from any method, and CommitUnknown from
    `append_many`.
    """

    @property
    def head(self) -> Head: ...

    @property
    def reserved(self) -> bool: ...

    @property
    def poll_seconds(self) -> float | None: ...

    def newest(self) -> Head: ...

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]: ...

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None: ...

    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]: ...

    def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]: ...

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]: ...

    def notes(self, prefix: str) -> Mapping[str, bytes]: ...

    def release_reserve(self) -> None: ...

    def restore_reserve(self) -> bool: ...

    def idle_seconds(self) -> float | None: ...

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """A draft, and whatever the caller recognises it by."""

    draft: Draft
    tag: T


@dataclass(slots=True)
class Round(Generic[T]):
    """What came of a round of commits."""

    settled: list[tuple[T, Appended | Refusal]] = field(default_factory=list)
    """By tag. What is withheld is not among them."""
    commits: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, drafts and payload bytes of each transaction that was durable."""


class Committer(Generic[T]):
    """Appends drafts in the order given. JournalBroken and every other error: nothing is known, do not call again.

    `now_millis` is Unix time for entries and keys; `seconds` is a monotonic clock for looking for room.
    """

    def __init__(
        self, backend: Backend, settings: GroupSettings, now_millis: Callable[[], int], seconds: Callable[[], float]
    ) -> None:
        self.full = not backend.reserved
        """Whether all but outcomes is refused."""
        self._backend, self._settings = backend, settings
        self._now_millis, self._seconds = now_millis, seconds
        self._doubtful: list[Job[T]] = []
        self._withheld: list[Job[T]] = []
        self._why: type[Refusal] = JournalFull
        self._retry_at = seconds()

    def idle_seconds(self) -> float | None:
        """How long it may be left alone; None: until there is work."""
        return max(0.0, self._retry_at - self._seconds()) if self.full else None

    def commit(self, jobs: Sequence[Job[T]]) -> Round[T]:
        """Append these, after what was withheld before. Without jobs: look for room, if it is time."""
        done = Round[T]()
        if not self.full:
            if not jobs or self._append(jobs, done):
                return done
            self._shut()
            if self._doubtful:
                return done
        due = self._seconds() >= self._retry_at
        may_fit = due or not (self._doubtful or self._withheld)
        for job in jobs:
            self._withhold(job, done)
        if may_fit:
            self._append_withheld(done)
        if len(self._withheld) > self._settings.withheld_outcomes_max:
            raise JournalBroken(f"no room, and more than {self._settings.withheld_outcomes_max} outcomes wait for it")
        if due:
            self.full = bool(self._doubtful or self._withheld) or not self._backend.restore_reserve()
            self._retry_at = self._seconds() + self._settings.full_retry_seconds
        return done

    def maintain(self, *, idle: bool) -> Sequence[Unfinished]:
        """The backend's upkeep; it also shows whether there is a database."""
        try:
            return self._backend.maintain(self._now_millis(), idle=idle)
        except JournalUnavailable:
            self._why = JournalUnavailable
            self._shut()
            return ()

    def finish(self) -> Round[T]:
        """Try a last time. What still finds no room is not durable: recovery will find its items unfinished."""
        done = Round[T]()
        self._append_withheld(done)
        return done

    def _shut(self) -> None:
        self.full = True
        self._backend.release_reserve()
        self._retry_at = self._seconds() + self._settings.full_retry_seconds

    def _withhold(self, job: Job[T], done: Round[T]) -> None:
        if isinstance(job.draft, Outcome):
            self._withheld.append(job)
        else:
            done.settled.append((job.tag, self._refuse(job.draft)))

    def _append_withheld(self, done: Round[T]) -> None:
        doubtful, self._doubtful = self._doubtful, []
        if doubtful and not self._append(doubtful, done):
            if not self._doubtful:  # they are not durable, and wait or are refused like all others
                withheld, self._withheld = self._withheld, []
                for job in doubtful:
                    self._withhold(job, done)
                self._withheld += withheld
            return
        while self._withheld and not self._doubtful:
            group, appended = self._withheld[:WITHHELD_GROUP], self._append(self._withheld[:WITHHELD_GROUP], done)
            if not appended and not self._doubtful:
                return
            del self._withheld[: len(group)]

    def _append(self, jobs: Sequence[Job[T]], done: Round[T]) -> bool:
        started = self._seconds()
        try:
            appended = self._backend.append_many([job.draft for job in jobs], self._now_millis())
        except (JournalFull, JournalUnavailable) as refusal:
            self._why = type(refusal)
            return False
        except CommitUnknown:
            self._why, self._doubtful = JournalUnavailable, list(jobs)
            return False
        size = sum(len(entry.payload) for each in appended for entry in each.entries)
        done.commits.append((self._seconds() - started, len(jobs), size))
        done.settled += [(job.tag, each) for job, each in zip(jobs, appended, strict=True)]
        return True

    def _refuse(self, draft: Draft) -> Appended | Refusal:
        if isinstance(draft, Admission) and draft.key:
            with suppress(JournalUnavailable):
                binding = self._backend.binding(draft.tenant, draft.key, self._now_millis())
                if binding is not None:
                    return Appended((), binding=binding)
        return self._why(WHY[self._why], retry_after=self._settings.full_retry_seconds)


def payload_bytes(draft: Draft) -> int:
    """What it adds to a commit."""
    match draft:
        case Admission():
            return sum(item.ByteSize() for item in draft.items)
        case Outcome():
            return draft.payload.ByteSize()
        case Audit():
            return draft.comparison.ByteSize()
        case Note():
            return len(draft.value)
        case Loss():
            return 0
