"""A disk in memory that can be full and can lose power: what was not synced is then lost, in part or whole, torn anywhere."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import apsw

SECTOR = 512
_names = itertools.count()


class PowerLost(Exception):
    """The machine went dark in the middle of this operation."""


@dataclass
class _Image:
    """A file's bytes as programs see them, and the changes that no sync has made safe, oldest first."""

    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Offset and bytes; None: cut to that size."""

    def change(self, offset: int, data: bytes | None) -> None:
        _apply(self.data, offset, data)
        self.unsynced.append((offset, data))

    def sync(self) -> None:
        self.safe = bytes(self.data)
        self.unsynced.clear()

    def lose_power(self, rng: random.Random) -> None:
        survives = rng.choice([0.0, 0.5, 0.9, 1.0])
        self.data = bytearray(self.safe)
        for offset, data in self.unsynced:
            if data is None:
                if rng.random() < survives:
                    _apply(self.data, offset, None)
                continue
            for start in range(0, len(data), SECTOR):
                if rng.random() < survives:
                    _apply(self.data, offset + start, data[start : start + SECTOR])
        self.sync()


def _apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del image[offset:]
        return
    image.extend(bytes(max(0, offset - len(image))))
    image[offset : offset + len(data)] = data


class Disk(apsw.VFS):
    """SQLite's file layer over such files. `name` is what a connection asks for."""

    def __init__(self) -> None:
        self.name = f"disk-{next(_names)}"
        self.files: dict[str, _Image] = {}
        self.bytes_max = 1 << 40
        self.dark_after = -1
        """Power fails at this many writes and syncs from now; negative: never."""
        self.dark = False
        super().__init__(self.name, base="")

    def lose_power(self, rng: random.Random) -> None:
        """Power fails, if it has not, and comes back."""
        for image in self.files.values():
            image.lose_power(rng)
        self.dark, self.dark_after = False, -1

    def works(self) -> bool:
        """Whether an operation has an effect. PowerLost: it is the one in which power fails."""
        if not self.dark and self.dark_after == 0:
            self.dark = True
            raise PowerLost
        self.dark_after -= 1
        return not self.dark

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> _File:  # type: ignore[override]
        flags[1] = flags[0]
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        return _File(self, self.files.setdefault(path, _Image()))

    def xDelete(self, filename: str, syncdir: bool) -> None:
        if self.works():
            self.files.pop(filename, None)

    def xAccess(self, pathname: str, flags: int) -> bool:
        return pathname in self.files


class _File:
    """An open file. There is one connection, so locks are always had."""

    def __init__(self, disk: Disk, image: _Image) -> None:
        self._disk, self._image = disk, image

    def xRead(self, amount: int, offset: int) -> bytes:
        return bytes(self._image.data[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        if not self._disk.works():
            return
        grows = max(0, offset + len(data) - len(self._image.data))
        if grows and sum(len(image.data) for image in self._disk.files.values()) + grows > self._disk.bytes_max:
            raise apsw.FullError("database or disk is full")
        self._image.change(offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        if self._disk.works():
            self._image.change(size, None)

    def xSync(self, flags: int) -> None:
        if self._disk.works():
            self._image.sync()

    def xFileSize(self) -> int:
        return len(self._image.data)

    def xLock(self, level: int) -> None: ...

    def xUnlock(self, level: int) -> None: ...

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, op: int, pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return SECTOR

    def xDeviceCharacteristics(self) -> int:
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE

    def xClose(self) -> None: ...
