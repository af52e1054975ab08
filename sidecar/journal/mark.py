"""The high-water mark: where a journal stood, in a file of its own, to find a journal that lost its end at the next start.

The mark is written after the commit that it names, never before. What lies between the mark and the head when the end is lost,
the service remembers (JOURNAL_BEHIND).
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from ostinato.digest import DIGEST_BYTES
from ostinato.errors import JournalUnavailable
from serving import files

from sidecar.journal.model import JournalUnusable, Mark
from sidecar.journal.writer import Journal


class MarkFile:
    """One mark, replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Mark | None:
        """None: there is no mark yet. Raises JournalUnusable for a file that cannot be read, or is not a mark."""
        try:
            content = files.read(self.path)
        except FileNotFoundError:
            if self.path.parent.is_dir():
                return None
            raise JournalUnusable(
                f"{self.path}: the folder of the high-water mark does not exist: mount or create it, or name "
                "another --high-water"
            ) from None
        except OSError as error:
            raise JournalUnusable(
                f"{self.path}: the high-water mark cannot be read by {files.user()}: {error.strerror or error}: make it "
                "readable, or name the right file with --high-water; without it a journal that lost its end is not found"
            ) from error
        try:
            told = json.loads(content)
            mark = Mark(str(told["log_id"]), int(told["index"]), bytes.fromhex(told["entry_hash"]), int(told["last_sequence"]))
            if mark.index < 1 or mark.last_sequence < 0 or len(mark.entry_hash) != DIGEST_BYTES:
                raise ValueError("a number or the hash cannot be that of an entry")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise JournalUnusable(
                f"{self.path} is no high-water mark ({type(error).__name__}): put a copy back, or, if the journal is known to "
                "have its end, remove it"
            ) from error
        return mark

    def write(self, mark: Mark) -> None:
        """Durable on return. After OSError the previous mark is still there."""
        told = {
            "log_id": mark.log_id,
            "index": str(mark.index),
            "entry_hash": mark.entry_hash.hex(),
            "last_sequence": str(mark.last_sequence),
        }
        files.replace(self.path, json.dumps(told) + "\n")


def shares_disk(mark: Path, journal: Path) -> bool:
    """Whether a loss of the journal's file system would take the mark with it."""
    return mark.parent.stat().st_dev == journal.parent.stat().st_dev


MARK_SECONDS = 1.0
"""Between two marks, at least."""

log = logging.getLogger(__name__)


class HighWater:
    """Writes the mark of an open journal: at a bounded rate, and never ahead of it."""

    def __init__(self, file: MarkFile, journal: Journal) -> None:
        self._file, self._journal = file, journal
        self._index = 0

    async def run(self) -> None:
        """Until it is cancelled: write a mark whenever the journal has grown. A mark that cannot be written is tried again with
        the next one."""
        while True:
            await self._journal.wait(self._index + 1)
            await self.write()
            await asyncio.sleep(MARK_SECONDS)

    async def write(self) -> None:
        """Write a mark now, unless the journal is unavailable."""
        try:
            mark = (await self._journal.head()).mark
            await asyncio.to_thread(self._file.write, mark)
        except JournalUnavailable:
            log.info("the journal is unavailable: the high-water mark stays as it is")
        except OSError as error:
            log.error("the high-water mark cannot be written", extra={"path": str(self._file.path), "why": str(error)})
        else:
            self._index = mark.index
