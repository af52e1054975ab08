"""Bytes of the journal by tenant, so that one tenant cannot fill it for all.

What this writer appends is added up as it becomes durable. The sums are kept as the journal's note `usage/WRITER`, with the
index of the newest entry in them, and a start adds the entries since. Without the note, as after payloads were dropped, it
counts them all. A second run's verdict counts for who asked for it, and only while it is appended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable

import msgspec

from ostinato import errors
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import USAGE, Note, Sealed
from sidecar.journal.writer import Journal

ENTRY_BYTES = 280
"""What an entry takes beside its payload: header, hashes, and the rows that point to it."""
SAVE_SECONDS = 5.0
PAGE_ENTRIES = 1_000


class Usage(msgspec.Struct, frozen=True):
    """A note."""

    index: int = 0
    """Of the newest entry that is counted."""
    bytes: dict[str, int] = {}
    """By tenant."""


class JournalQuota:
    """A bound on each tenant's bytes. `most`: 0 is none, and nothing is counted."""

    def __init__(self, most: int, writer: str, *, keeps_payloads: bool) -> None:
        self._most, self._writer, self._keeps_payloads = most, writer, keeps_payloads
        self._own: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        """Of the other writers of a shared log, as they last said."""
        self._index = self._saved = 0

    def check(self, tenant: str) -> None:
        """Raises JournalFull for a tenant at its bound."""
        used = self._own[tenant] + self._others[tenant] if self._most else 0
        if self._most and used >= self._most:
            what = f"this tenant's entries have {used} bytes of the journal, at most {self._most} are allowed"
            raise errors.JournalFull(what, details={"setting": "tenant_journal_bytes_max"})

    def add(self, tenant: str, entries: Iterable[Sealed]) -> None:
        """These are durable now."""
        if self._most:
            for entry in entries:
                self._own[tenant] += ENTRY_BYTES + (len(entry.payload) if self._keeps_payloads else 0)
                self._index = max(self._index, entry.header.index)

    async def restore(self, journal: Journal) -> None:
        """What earlier epochs of this writer have appended. To be called before anything else is added."""
        if not self._most:
            return
        head, tenants = (await journal.head()).index, dict[int, str]()
        await self._read(journal, head)
        while page := await journal.entries(self._index + 1, min(PAGE_ENTRIES, head - self._index), payloads=True):
            for entry in page:
                own = entry.header.writer == self._writer and entry.header.sequence
                if own and entry.header.kind != types_pb2.ENTRY_KIND_AUDITED:
                    self.add(await self._tenant(journal, entry, tenants), [entry])
            self._index = page[-1].header.index

    async def _tenant(self, journal: Journal, entry: Sealed, tenants: dict[int, str]) -> str:
        """Of an item's entry; "" if its payload was dropped. `tenants`: of unfinished items."""
        sequence = entry.header.sequence
        if entry.header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            tenants[sequence] = entry.read(sequencer_pb2.AdmittedPayload).tenant
            return tenants[sequence]
        if sequence in tenants:
            return tenants.pop(sequence)
        return "".join(
            item.admitted.read(sequencer_pb2.AdmittedPayload).tenant for item in await journal.items(sequence, sequence, 1)
        )

    async def run(self, journal: Journal) -> None:
        """Save until cancelled."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self.save(journal)

    async def save(self, journal: Journal) -> None:
        """Save the sums, if they have changed, and read those of the other writers. Does nothing if the journal is full."""
        if self._index == self._saved:
            return
        usage = Usage(self._index, dict(self._own))
        with contextlib.suppress(errors.Refused):
            await journal.append(Note(USAGE + self._writer, msgspec.json.encode(usage)))
            self._saved = usage.index
            await self._read(journal)

    async def _read(self, journal: Journal, head: int = 0) -> None:
        """The notes; this writer's own only up to this entry."""
        others: Counter[str] = Counter()
        for name, value in (await journal.notes(USAGE)).items():
            try:
                usage = msgspec.json.decode(value, type=Usage)
            except msgspec.DecodeError:  # it is counted again
                continue
            if name != USAGE + self._writer:
                others.update(usage.bytes)
            elif usage.index <= head:
                self._own, self._index, self._saved = Counter(usage.bytes), usage.index, usage.index
        self._others = others
