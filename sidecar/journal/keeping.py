"""A journal that is kept rather than used: looked at, thinned out, copied. No epoch is opened in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ostinato.chain import OUTCOMES
from ostinato.v1 import types_pb2

from sidecar.journal import ItemEntries, JournalUnusable, Sealed
from sidecar.journal.diagnosis import RESTORE
from sidecar.journal.verify import PAGE, Checker, name_of


@dataclass(frozen=True, slots=True)
class Log:
    """What a journal is of, and where it stands."""

    log_id: str
    writers: Mapping[str, int]
    """The newest epoch of each, by name."""
    index: int
    entry_hash: bytes
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Key:
    """An idempotency key that is bound."""

    tenant: str
    key: str
    request_digest: bytes
    first_sequence: int
    count: int
    expires_millis: int | None
    """None: an item of its batch has not ended, or it is bound for good."""


class Filler(Protocol):
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

    def filling(self, log: Log, writer: str) -> AbstractContextManager[Filler]:
        """Makes an empty journal this log at the end, or leaves it empty. `writer`: whose it is to be, where only one may."""
        ...

    def close(self) -> None: ...


def pages(kept: Kept, *, payloads: bool) -> Iterator[Sequence[Sealed]]:
    """All entries. Raises JournalUnusable for the first that is damaged: what it says must be neither copied nor believed."""
    checker, index = Checker(), 1
    while page := kept.entries(index, PAGE, payloads=payloads):
        for sealed in page:
            if faults := checker.check(sealed):
                raise JournalUnusable(f"{kept.name} is damaged: {name_of(sealed.header)}: {'; '.join(faults)}: {RESTORE}")
        yield page
        index += len(page)


def prune(kept: Kept, old: Callable[[types_pb2.EntryHeader], bool]) -> Iterator[tuple[int, int]]:
    """Drop the payloads of items whose outcome is old. After each page: the index it came to, and how many payloads went."""
    for page in pages(kept, payloads=False):
        ended = [entry.header for entry in page if entry.header.kind in OUTCOMES]
        yield page[-1].header.index, kept.drop([header.sequence for header in ended if old(header)])


def redact(kept: Kept, sequences: Iterable[int]) -> int:
    """Drop the payloads of these items; how many there were. Raises JournalUnusable, and drops nothing, where one of them is
    unknown or has not ended."""
    wanted = sorted(set(sequences))
    for sequence in wanted:
        found = kept.items(sequence, sequence, 1)
        if not found:
            raise JournalUnusable(f"{kept.name}: there is no sequence {sequence}")
        if found[0].outcome is None:
            raise JournalUnusable(f"{kept.name}: sequence {sequence} has not ended: its payload is needed to finish it")
    return kept.drop(wanted)
