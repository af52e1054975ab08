"""The tally at the edge: restored at the start, fed by what is committed, kept as a note beside the chain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ostinato import enums, errors
from ostinato.v1 import types_pb2

from sidecar.divergence.tally import Tally
from sidecar.divergence.verdicts import Checked, Compared, NotCompared, events
from sidecar.journal import Journal, Note, Sealed

log = logging.getLogger(__name__)

SAVE_ENTRIES = 4_096
"""Saved at the latest after so many entries,"""
SAVE_SECONDS = 30.0
"""or so many seconds: a start has to read no more than was written since."""
PAGE_ENTRIES = 256
"""Read at once."""
VERSION = 1
"""Of what is kept. Another is not read, and the journal is counted anew."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is kept: a tally, and the newest entry that is counted in."""

    version: int = VERSION
    index: int = 0
    tally: Tally = field(default_factory=Tally)


class Book:
    """The writer's tally. Entries of other writers on the same log are theirs to count."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._name = f"divergence/{writer}"
        self._page = self._saved = Page()
        self._early: list[Sealed] | None = []
        """Committed before what is older was counted in: a takeover may end items during the start. None: it was."""
        self._due = asyncio.Event()

    @property
    def tally(self) -> Tally:
        return self._page.tally

    @property
    def counted(self) -> Tally | None:
        """The tally; None: what was counted before this start has not been read yet."""
        return self.tally if self._early is None else None

    @property
    def index(self) -> int:
        """Of the newest entry that is counted in."""
        return self._page.index

    async def restore(self, journal: Journal) -> None:
        """Read what was kept, and count what came after it. Once; what is committed meanwhile is counted at the end, from
        memory, since the journal may have dropped its payload."""
        assert self._early is not None
        head = (await journal.head()).index
        if self._early:
            head = self._early[0].header.index - 1
        self._page = self._saved = _read((await journal.notes(self._name)).get(self._name), head)
        while page := await journal.entries(self.index + 1, min(PAGE_ENTRIES, head - self.index), payloads=True):
            self._count(page)
        log.info("divergence restored", extra={"index": self.index, "read": self.index - self._saved.index})
        early, self._early = self._early, None
        self.committed(early)

    def committed(self, entries: Sequence[Sealed]) -> None:
        """These are durable; ascending, and after all that was counted before."""
        if self._early is not None:
            self._early += entries
            return
        for event in self._count(entries):
            _say(event)
        if self.index - self._saved.index >= SAVE_ENTRIES:
            self._due.set()

    def not_compared(self, kind: types_pb2.ComparisonKind.ValueType, reason: str) -> None:
        """A second run was due and brought no verdict: an audit that was chosen and did not run, say."""
        lost = NotCompared(enums.word(types_pb2.ComparisonKind, kind).lower(), reason)
        self._page = Page(index=self.index, tally=self.tally.after(lost))

    async def keep(self, journal: Journal) -> None:
        """Save now and then, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), SAVE_SECONDS)
            self._due.clear()
            await self.save(journal)

    async def save(self, journal: Journal) -> None:
        """What has changed. Where the journal is full, the next start has the more to read."""
        page = self._page
        if page is not self._saved:
            with contextlib.suppress(errors.Refused):
                await journal.append(Note(self._name, msgspec.json.encode(page)))
                self._saved = page

    def _count(self, entries: Sequence[Sealed]) -> list[Compared | Checked]:
        if not entries:
            return []
        assert entries[0].header.index > self.index, "an entry is counted once"
        own = [entry for entry in entries if entry.header.writer == self._writer]
        found = [event for entry in own for event in events(entry.header, entry.payload)]
        tally = self.tally
        for event in found:
            tally = tally.after(event)
        self._page = Page(index=entries[-1].header.index, tally=tally)
        return found


def _read(kept: bytes | None, head: int) -> Page:
    """An empty page where nothing is kept that can be believed."""
    if kept is None:
        return Page()
    try:
        page = msgspec.json.decode(kept, type=Page)
    except (msgspec.DecodeError, ValueError) as error:
        log.warning("what was counted cannot be read, and is counted anew: %s", error)
        return Page()
    if page.version != VERSION or page.index > head:
        log.warning("what was counted is of another version or journal, and is counted anew")
        return Page()
    return page


def _say(event: Compared | Checked) -> None:
    """A collision is said by the observer, which has the item's parameters."""
    if isinstance(event, Compared) and event.diverged:
        log.error(
            "diverged",
            extra={
                "sequence": event.comparison.sequence,
                "kind": event.key.kind,
                "grade": event.key.grade,
                "first_difference": event.comparison.first_difference,
                "index": event.at.index,
            },
        )
