"""Items on which another sidecar of the same log is at work: calls that wait for them, and what ends them from here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container, Sequence

from ostinato.chain import OUTCOMES
from ostinato.errors import Cancelled, JournalUnavailable, PayloadPruned
from ostinato.v1 import types_pb2

from sidecar.calls import Call
from sidecar.journal.model import ItemEntries, JournalBroken, Outcome
from sidecar.journal.writer import Journal
from sidecar.results import answer_of, ended_payload, is_whole

PAGE_ENTRIES = 256
"""Read at once."""
ENDS = OUTCOMES | {types_pb2.ENTRY_KIND_AUDITED}
"""Kinds of entries that may make an answer whole."""
PAUSE_SECONDS = 0.2
"""Before the journal is asked again, if it could not be."""


class Elsewhere:
    """Follows the journal while anybody waits."""

    def __init__(self, journal: Journal, supervise: Callable[[asyncio.Task[None]], None]) -> None:
        """`supervise` gets the task that follows; its failure must end the process, or calls would wait for ever."""
        self._journal, self._supervise = journal, supervise
        self._calls: dict[int, list[Call]] = {}
        """By sequence."""
        self._following: asyncio.Task[None] | None = None

    async def join(self, call: Call, sequences: Sequence[int]) -> None:
        """Tell the call how these items end, which had not ended a moment ago and are none of this sidecar's."""
        for sequence in sequences:
            self._calls.setdefault(sequence, []).append(call)
        try:
            head = await self._journal.head()
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow(head.index + 1))
                self._supervise(self._following)
            for entries in await self._journal.items(sequences[0], sequences[-1], sequences[-1] - sequences[0] + 1):
                self._tell(entries, head.writer)
        except BaseException:
            self.leave(call)
            raise

    async def cancel(self, first: int, last: int, here: Container[int]) -> int:
        """End those of these items that have not ended and are not here. How many: another's outcome may still come first."""
        cancelled = 0
        while page := await self._journal.unfinished(first, last, PAGE_ENTRIES):
            payload = ended_payload(Cancelled("cancelled on request"), types_pb2.Timing())
            appended = [
                await self._journal.append(Outcome(entry.header, types_pb2.ENTRY_KIND_CANCELLED, 1, payload))
                for entry in page
                if entry.header.sequence not in here
            ]
            cancelled += sum(len(each.entries) for each in appended)
            first = page[-1].header.sequence + 1
        return cancelled

    def claim(self, sequence: int) -> list[Call]:
        """Who waits for an item that is this sidecar's from now on."""
        return self._calls.pop(sequence, [])

    def leave(self, call: Call) -> None:
        """This call waits no more."""
        for sequence in call.sequences:
            if call in (calls := self._calls.get(sequence, [])):
                calls.remove(call)
                if not calls:
                    del self._calls[sequence]
        if not self._calls and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self, index: int) -> None:
        with contextlib.suppress(JournalBroken):  # the process ends, and its calls with it
            while self._calls:
                try:
                    index = await self._look(index)
                except JournalUnavailable:
                    await asyncio.sleep(PAUSE_SECONDS)

    async def _look(self, index: int) -> int:
        """Wait for entries from this index on; the index behind them."""
        await self._journal.wait(index)
        page = await self._journal.entries(index, PAGE_ENTRIES, payloads=False)
        for header in [entry.header for entry in page]:
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                for sequence in list(self._calls):
                    for entries in await self._journal.items(sequence, sequence, 1):
                        self._tell(entries, header.writer)
            elif header.sequence in self._calls and header.kind in ENDS:
                self._tell(await ended(self._journal, header.sequence))
        return index + len(page)

    def _tell(self, entries: ItemEntries, over: str = "") -> None:
        """If the answer is whole. What the writer `over` has left without a verdict will not get one any more."""
        sequence = entries.admitted.header.sequence
        if entries.outcome is None or sequence not in self._calls:
            return
        if not is_whole(entries) and entries.outcome.header.writer != over:
            return
        try:
            answer = answer_of(entries)
        except PayloadPruned as error:  # as a later call with the same key
            for call in self._calls.pop(sequence):
                call.lost(error)
                self.leave(call)
            return
        for call in self._calls.pop(sequence):
            call.result(answer)


async def ended(journal: Journal, sequence: int) -> ItemEntries:
    """What is recorded of an item that has ended, however long the journal is away."""
    while True:
        with contextlib.suppress(JournalUnavailable):
            (entries,) = await journal.items(sequence, sequence, 1)
            assert entries.outcome is not None
            return entries
        await asyncio.sleep(PAUSE_SECONDS)
