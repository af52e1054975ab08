"""Disk space held back for outcomes: when the disk is full, work that was admitted can still end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Reserve:
    """A file of really allocated blocks, beside the journal."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self.held = path.exists()
        """Whether the space is held back: outcomes can count on it."""

    def take(self) -> bool:
        """Hold the space. False: there is not so much."""
        if not self._size_bytes:
            self.held = True
            return True
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, self._size_bytes)
            os.posix_fallocate(handle, 0, self._size_bytes)
            self.held = True
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.release()
        finally:
            os.close(handle)
        return self.held

    def release(self) -> None:
        """Give the space to whoever writes next."""
        self._path.unlink(missing_ok=True)
        self.held = False
