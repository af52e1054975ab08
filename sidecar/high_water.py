"""Keeps the high-water mark: at a bounded rate, and never ahead of the journal."""

from __future__ import annotations

import asyncio
import logging

from ostinato.errors import JournalUnavailable

from sidecar.journal import Journal
from sidecar.journal.mark import MarkFile

MARK_SECONDS = 1.0
"""Between two marks, at least."""

log = logging.getLogger(__name__)


class HighWater:
    """One beside each journal that has a file for its mark."""

    def __init__(self, file: MarkFile, journal: Journal) -> None:
        self._file, self._journal = file, journal
        self._index = 0

    async def keep(self) -> None:
        """For ever: a mark whenever the journal has grown. One that cannot be written is tried again with the next."""
        while True:
            await self._journal.wait(self._index + 1)
            await self.write()
            await asyncio.sleep(MARK_SECONDS)

    async def write(self) -> None:
        """What is durable now, if the journal can be asked."""
        try:
            mark = (await self._journal.head()).mark
            await asyncio.to_thread(self._file.write, mark)
        except JournalUnavailable:
            log.info("the journal is away: the high-water mark stays as it is")
        except OSError as error:
            log.error("the high-water mark cannot be written", extra={"path": str(self._file.path), "why": str(error)})
        else:
            self._index = mark.index
