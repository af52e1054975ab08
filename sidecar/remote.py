"""Items that another sidecar of the same log runs: this one's calls wait for what the journal says of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container, Sequence

from ostinato import errors
from ostinato.chain import OUTCOMES
from ostinato.errors import Cancelled, JournalUnavailable, PayloadPruned
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.answers import Waiter, answer_of, ended_payload, is_whole
from sidecar.journal.model import ItemEntries, JournalBroken, Outcome, Sealed
from sidecar.journal.writer import Journal

PAGE_ENTRIES = 256
"""Entries in one read."""
ENDS = OUTCOMES | {types_pb2.ENTRY_KIND_AUDITED}
"""Kinds of entries that may complete an answer."""
PAUSE_SECONDS = 0.2
"""Before the journal is read again, if it was unavailable."""


class RemoteWaiters:
    """Waiters for items that another sidecar runs. Follows the journal while there are any."""

    def __init__(self, journal: Journal, supervise: Callable[[asyncio.Task[None]], None]) -> None:
        """`supervise` gets the task that follows the journal. Its failure must end the process: calls would wait for ever."""
        self._journal, self._supervise = journal, supervise
        self._waiters: dict[int, list[Waiter]] = {}
        """By sequence."""
        self._following: asyncio.Task[None] | None = None

    async def join(self, waiter: Waiter, sequences: Sequence[int]) -> None:
        """Tell the waiter how these items end. They had not ended a moment ago, and another sidecar runs them."""
        for sequence in sequences:
            self._waiters.setdefault(sequence, []).append(waiter)
        try:
            head = await self._journal.head()
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow(head.index + 1))
                self._supervise(self._following)
            for entries in await self._journal.items(sequences[0], sequences[-1], sequences[-1] - sequences[0] + 1):
                self._deliver(entries, head.writer)
        except BaseException:
            self.remove(waiter)
            raise

    async def cancel(self, first: int, last: int, here: Container[int]) -> int:
        """Append a CANCELLED outcome for items first to last that have no outcome, without those of `here`.

        The number of outcomes that were appended: the other sidecar's may come first.
        """
        cancelled = 0
        while page := await self._journal.unfinished(first, last, PAGE_ENTRIES):
            appended = [
                await self._journal.append(Outcome(entry.header, types_pb2.ENTRY_KIND_CANCELLED, 1, _cancelled(entry)))
                for entry in page
                if entry.header.sequence not in here
            ]
            cancelled += sum(len(each.entries) for each in appended)
            first = page[-1].header.sequence + 1
        return cancelled

    def claim(self, sequence: int) -> list[Waiter]:
        """Remove and give the waiters for an item that this sidecar takes over."""
        return self._waiters.pop(sequence, [])

    def remove(self, waiter: Waiter) -> None:
        for sequence in waiter.sequences:
            if waiter in (waiters := self._waiters.get(sequence, [])):
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[sequence]
        if not self._waiters and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self, index: int) -> None:
        with contextlib.suppress(JournalBroken):  # the process ends, and its calls with it
            while self._waiters:
                try:
                    index = await self._read(index)
                except JournalUnavailable:
                    await asyncio.sleep(PAUSE_SECONDS)
                except errors.RecordDamaged as error:  # whether an item has ended cannot be read any more
                    for sequence in list(self._waiters):
                        self._lose(sequence, error)

    async def _read(self, index: int) -> int:
        """Await entries from this index on. The index behind them."""
        await self._journal.wait(index)
        page = await self._journal.entries(index, PAGE_ENTRIES, payloads=False)
        for header in [entry.header for entry in page]:
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                for sequence in list(self._waiters):
                    for entries in await self._journal.items(sequence, sequence, 1):
                        self._deliver(entries, header.writer)
            elif header.sequence in self._waiters and header.kind in ENDS:
                self._deliver(await ended(self._journal, header.sequence))
        return index + len(page)

    def _deliver(self, entries: ItemEntries, restarted: str = "") -> None:
        """Tell the result if it is whole. What the writer `restarted` left without a verdict will not get one."""
        sequence = entries.admitted.header.sequence
        if entries.outcome is None or sequence not in self._waiters:
            return
        if not is_whole(entries) and entries.outcome.header.writer != restarted:
            return
        try:
            answer = answer_of(entries)
        except PayloadPruned as error:  # as a later call with the same key
            self._lose(sequence, error)
            return
        for waiter in self._waiters.pop(sequence):
            waiter.result(answer)

    def _lose(self, sequence: int, error: errors.OstinatoError) -> None:
        for waiter in self._waiters.pop(sequence, ()):
            waiter.lost(error)
            self.remove(waiter)


def _cancelled(admitted: Sealed) -> sequencer_pb2.EndedPayload:
    nonce = sequencer_pb2.AdmittedPayload.FromString(admitted.payload).nonce
    return ended_payload(Cancelled("cancelled on request"), types_pb2.Timing(), nonce)


async def ended(journal: Journal, sequence: int) -> ItemEntries:
    """What is recorded of an item that has ended, also if the journal is unavailable for a while."""
    while True:
        with contextlib.suppress(JournalUnavailable):
            (entries,) = await journal.items(sequence, sequence, 1)
            assert entries.outcome is not None
            return entries
        await asyncio.sleep(PAUSE_SECONDS)
