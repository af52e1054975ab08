"""Journals that outlive their sidecars, and what a crash leaves of them.

Two, because they can fail in different ways; `postgres_log` has a third. `SqliteLog` is the product's backend over SQLite's own
file layer, simulated: writes that no sync made safe are lost, torn or kept. A file has one sidecar at a time. `SharedLog` is
the least of a database that several sidecars write: the very Ledger, and transactions that happen whole or not at all; there a
sidecar that was paused can wake up and find another in its place. It is also quick.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import apsw
from msgspec.structs import replace

from ostinato.chain import GENESIS, OUTCOMES
from ostinato.errors import JournalFull
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.ledger import Known, Ledger, needs, verifications
from sidecar.journal.model import (
    Admission,
    Appended,
    Binding,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Sealed,
    Twin,
    Unfinished,
)
from sidecar.journal.sql import Opening
from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store, StoreSettings
from tests.sidecar.journal_disk import Disk, PowerLost

WRITER, VERSION = "ostinato-0", "simulated"
LOG_ID = "0123456789abcdef0123456789abcdef"
SECRET = b"s" * 32
ALL = 1 << 30


def opening(now_millis: int) -> Opening:
    """A new epoch of the simulated sidecar."""
    return Opening(writer=WRITER, version=VERSION, new_log_id=LOG_ID, new_secret=SECRET, now_millis=now_millis)


class Log(Protocol):
    """One log, opened by one sidecar after the other, or by several."""

    def open(self, now_millis: int) -> Store:
        """A new epoch."""

    def crash(self, backend: Store | None, rng: random.Random, *, power: bool) -> None:
        """The sidecar with this backend died; with the power, the whole machine did."""

    def power_off(self) -> None:
        """The power fails now: until the crash nothing more reaches the disk."""

    def entries(self) -> Sequence[Sealed]:
        """What is on the disk now, every entry."""

    def fail_in(self, operations: int) -> None:
        """The power fails in the middle of a commit that comes soon."""

    def fill(self, full: bool) -> None:
        """No room from now on; or room again."""


class SqliteLog:
    """The real backend, on a simulated disk."""

    def __init__(self, folder: Path) -> None:
        self.disk = Disk()
        self._path = folder / "journal.sqlite"

    def open(self, now_millis: int) -> Store:
        try:
            return SqliteStore.open(str(self._path), opening(now_millis), StoreSettings(), vfs=self.disk.name)
        except apsw.FullError as error:
            # Out of a close, where SQLite's own file layer keeps it to itself and one in Python cannot.
            raise JournalUnusable(str(error)) from error

    def crash(self, backend: Store | None, rng: random.Random, *, power: bool) -> None:
        # A killed process does not close its database.
        self.disk.dark = True
        if backend is not None:
            with suppress(apsw.Error, PowerLost):
                backend.close()
        if power:
            self.disk.lose_power(rng)
        self.disk.dark, self.disk.dark_after = False, -1

    def power_off(self) -> None:
        self.disk.dark = True

    def entries(self) -> Sequence[Sealed]:
        copy = SqliteLog(self._path.parent)
        for name, image in self.disk.files.items():
            copied = type(image)(bytearray(image.data), bytes(image.data))
            copy.disk.files[name] = copied
        reader = copy.open(0)
        try:
            return reader.entries(1, ALL, payloads=True)[:-1]  # less the epoch that this very look has opened
        finally:
            reader.close()

    def fail_in(self, operations: int) -> None:
        self.disk.dark_after = operations

    def fill(self, full: bool) -> None:
        held = sum(len(image.data) for image in self.disk.files.values())
        self.disk.bytes_max = held if full else 1 << 40


@dataclass
class SharedLog:
    """A log in memory, of which every transaction is atomic."""

    written: list[Sealed] = field(default_factory=list)
    keys: dict[tuple[str, str], Binding] = field(default_factory=dict)
    ended: dict[int, Sealed] = field(default_factory=dict)
    admitted: dict[int, Sealed] = field(default_factory=dict)
    twins: dict[bytes, tuple[Twin, ...]] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    verified: dict[int, Sealed] = field(default_factory=dict)
    epoch: int = 0
    left: list[tuple[int, Sealed]] = field(default_factory=list)
    """ADMITTED entries of dead writers, with the millisecond from which on they may be taken over."""
    others: int = 0
    full: bool = False
    dark_after: int = -1

    def open(self, now_millis: int) -> Store:
        self.operate()
        self.epoch += 1
        ledger = Ledger(self.head(), Known(), now_millis, SECRET)
        ledger.open(VERSION)
        self.write(ledger)
        left = [entry for sequence, entry in self.admitted.items() if sequence not in self.ended]
        self.left.clear()
        unfinished = tuple(Unfinished(entry, self.attempt(entry)) for entry in left)
        return _SharedBackend(self, ledger.head, unfinished)

    def attempt(self, entry: Sealed) -> int:
        """Of its next submission, counted from epochs; that another writer has taken it over counts as one."""
        return 1 + self.epoch - entry.header.epoch + (entry.header.writer != WRITER)

    def leave(self, count: int, now_millis: int, lease_millis: int) -> tuple[int, int] | None:
        """Another writer numbers `count` keyed items like the newest one, and dies. The first and last index of its entries, or
        None if the log has no item."""
        if not self.admitted or self.full:
            return None
        given = sequencer_pb2.AdmittedPayload.FromString(self.admitted[len(self.admitted)].payload)
        self.others += 1
        name = f"other-{self.others}"
        given.request_id, given.verify = name, False
        items = [sequencer_pb2.AdmittedPayload() for _ in range(count)]
        for number, item in enumerate(items):
            item.CopyFrom(given)
            item.nonce = f"{name}.{number}".encode().ljust(16)
        ledger = Ledger(replace(self.head(), writer=name), Known(), now_millis, SECRET)
        ledger.open(VERSION)
        ledger.append(Admission(tuple(items), name.encode().ljust(32), key=name))
        self.write(ledger)
        self.left += [(now_millis + lease_millis, entry) for entry in ledger.entries[1:]]
        return ledger.entries[0].header.index, ledger.entries[-1].header.index

    def crash(self, backend: Store | None, rng: random.Random, *, power: bool) -> None:
        self.dark_after = -1

    def power_off(self) -> None: ...

    def entries(self) -> Sequence[Sealed]:
        return list(self.written)

    def fail_in(self, operations: int) -> None:
        self.dark_after = operations

    def fill(self, full: bool) -> None:
        self.full = full

    # ---- for backends

    def operate(self) -> None:
        if self.dark_after == 0:
            raise PowerLost
        self.dark_after -= 1

    def head(self) -> Head:
        newest = self.written[-1] if self.written else None
        index, last = len(self.written), len(self.admitted)
        return Head(LOG_ID, WRITER, self.epoch, index, newest.entry_hash if newest else GENESIS, last)

    def write(self, ledger: Ledger) -> None:
        for entry in ledger.entries:
            header = entry.header
            self.written.append(entry)
            if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
                self.admitted[header.sequence] = entry
            if header.kind in OUTCOMES:
                self.ended[header.sequence] = entry
        for tag, header, _ in ledger.twins:
            self.twins[tag] = (*self.twins.get(tag, ()), Twin(self.written[header.index - 1]))
        self.notes.update(ledger.notes)
        self.verified.update({header.sequence: self.written[header.index - 1] for header in verifications(ledger.entries)})
        self.keys.update({(admission.tenant, admission.key): binding for admission, binding in ledger.bound})


class _SharedBackend:
    """One sidecar's way to it."""

    reserved = True
    poll_seconds = None

    def __init__(self, log: SharedLog, head: Head, to_recover: Sequence[Unfinished]) -> None:
        self.head, self.to_recover = head, to_recover
        self._log = log

    def newest(self) -> Head:
        return self.head

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        log = self._log
        log.operate()
        if log.epoch != self.head.epoch:
            raise JournalBroken("fenced: a newer epoch of this writer has begun")
        if log.full:
            raise JournalFull("no room")
        wanted = needs(drafts, SECRET)
        known = Known(
            {name: log.keys[name] for name in sorted(wanted.keys) if name in log.keys},
            frozenset(sequence for sequence in wanted.sequences if sequence not in log.ended),
            {tag: log.twins[tag] for tag in sorted(wanted.twins) if tag in log.twins},
        )
        ledger = Ledger(log.head(), known, now_millis, SECRET)
        appended = [ledger.append(draft) for draft in drafts]
        log.write(ledger)
        self.head = ledger.head
        log.operate()
        return appended

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        return self._log.keys.get((tenant, key))

    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        log = self._log
        numbers = [number for number in range(first, min(last, len(log.admitted)) + 1) if number in log.admitted]
        return [
            ItemEntries(log.admitted[number], log.ended.get(number), log.verified.get(number)) for number in numbers[:limit]
        ]

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        page = self._log.written[from_index - 1 : from_index - 1 + limit]
        return page if payloads else [replace(entry, payload=b"") for entry in page]

    def notes(self, prefix: str) -> Mapping[str, bytes]:
        return {name: value for name, value in sorted(self._log.notes.items()) if name.startswith(prefix)}

    def newest_signed(self) -> None:
        return None

    def release_reserve(self) -> None: ...

    def restore_reserve(self) -> bool:
        return not self._log.full

    def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]:
        return [pair.admitted for pair in self.items(first, last, ALL) if pair.outcome is None][:limit]

    def idle_seconds(self) -> None:
        return None

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        log = self._log
        left = [entry for due_millis, entry in log.left if due_millis <= now_millis]
        if not left or log.full or log.epoch != self.head.epoch:
            return ()
        log.left = [each for each in log.left if each[0] > now_millis]
        ledger = Ledger(log.head(), Known(), now_millis, SECRET)
        for writer in dict.fromkeys(entry.header.writer for entry in left):
            ledger.fence(writer, log.epoch + 1, VERSION)
        log.write(ledger)
        self.head = ledger.head
        return [Unfinished(entry, log.attempt(entry)) for entry in left if entry.header.sequence not in log.ended]

    def close(self) -> None: ...


class Watched:
    """A backend that reports what is durable, and a loss of power in the middle of an operation."""

    def __init__(self, backend: Store, durable: Callable[[int, int], None], lost_power: Callable[[], None]) -> None:
        """`durable` is given the first and the last index of what a commit has made safe."""
        self._backend, self._durable, self._lost_power = backend, durable, lost_power

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        before = self._backend.head.index
        with self._watch():
            appended = self._backend.append_many(drafts, now_millis)
        self._durable(before + 1, self._backend.head.index)
        return appended

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        with self._watch():
            return self._backend.maintain(now_millis, idle=idle)

    def close(self) -> None:
        with self._watch():
            self._backend.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except PowerLost:
            self._lost_power()
            raise
