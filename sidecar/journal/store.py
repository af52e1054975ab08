"""What the writer and the operator's commands need of a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from sidecar.journal.model import Appended, Binding, Draft, Head, ItemEntries, Key, Log, Sealed, Unfinished


class Store(Protocol):
    """A synchronous journal, used by one thread at a time. `SqliteStore` says what each method promises and raises.

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


class Importer(Protocol):
    """Takes a journal in, within one transaction. Everything has been checked."""

    def entries(self, entries: Sequence[Sealed]) -> None:
        """In their order."""
        ...

    def keys(self, keys: Sequence[Key]) -> None:
        """After all entries."""
        ...

    def notes(self, notes: Mapping[str, bytes]) -> None: ...


class Kept(Protocol):
    """Raises JournalUnusable where the database cannot."""

    @property
    def name(self) -> str:
        """For errors: the file, or what stands for a database, whose URL may hold a password."""
        ...

    def log(self) -> Log | None:
        """None: it is empty."""
        ...

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]: ...

    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]: ...

    def keys(self, from_sequence: int, limit: int) -> Sequence[Key]:
        """By first sequence, ascending, at most limit."""
        ...

    def notes(self, prefix: str) -> Mapping[str, bytes]: ...

    def structure(self) -> str:
        """What is wrong with the store itself, apart from what entries say; empty: nothing that it can see."""
        ...

    def drop(self, sequences: Sequence[int]) -> int:
        """The payloads of these items' admissions and outcomes, for good; how many there were."""
        ...

    def snapshot(self) -> AbstractContextManager[None]:
        """All that is read within it is of one moment."""
        ...

    def filling(self, log: Log, writer: str) -> AbstractContextManager[Importer]:
        """Makes an empty journal this log at the end, or leaves it empty. `writer`: whose it is to be, where only one may."""
        ...

    def close(self) -> None: ...
