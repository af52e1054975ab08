"""Files that are read again whenever they change, and files that are replaced whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ostinato.serving.program import BAD_CONFIGURATION, StartupError

BYTES_MAX = 1 << 20
"""Of one file."""

T = TypeVar("T")


def replace(path: Path, text: str) -> None:
    """Makes this its content, and makes its folder. Durable on return. Raises OSError, and then what was there still is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class Unusable(ValueError):
    """What a flag's file says cannot be used."""

    def __init__(self, flag: str, why: str) -> None:
        super().__init__(why)
        self.flag = flag


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a flag names. One that is `private` must not be open to everybody on the machine."""

    flag: str
    path: Path
    private: bool = False

    def state(self) -> tuple[int, ...]:
        """Differs after a change; follows links, so that a mounted folder may be swapped as a whole."""
        try:
            found = self.path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)

    def read(self) -> bytes:
        """Raises Unusable."""
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(BYTES_MAX + 1)
        except OSError as error:
            raise Unusable(self.flag, error.strerror or str(error)) from error
        if len(data) > BYTES_MAX:
            raise Unusable(self.flag, f"is larger than {BYTES_MAX} bytes")
        if self.private and mode & 0o007:
            raise Unusable(self.flag, f"mode {mode & 0o777:04o} lets everybody on this machine in; make it 0640 or 0600")
        return data


class Reloaded(Generic[T]):
    """What some files say together. While a change makes them unusable, `value` is what they said before."""

    def __init__(self, sources: Sequence[Source], parse: Callable[[Mapping[str, bytes]], T]) -> None:
        """`parse` is given the contents by flag, and raises Unusable. Raises StartupError that names flag and file."""
        self._sources, self._parse = sources, parse
        self._states = self._look()
        self.value = self._read()

    def refresh(self) -> bool:
        """Whether `value` is new. Raises StartupError where the files have changed and cannot be used."""
        states = self._look()
        if states == self._states:
            return False
        self._states = states
        self.value = self._read()
        return True

    def _look(self) -> list[tuple[int, ...]]:
        return [source.state() for source in self._sources]

    def _read(self) -> T:
        try:
            return self._parse({source.flag: source.read() for source in self._sources})
        except Unusable as error:
            path = next(source.path for source in self._sources if source.flag == error.flag)
            raise StartupError(f"{error.flag}: {path}: {error}", exit_code=BAD_CONFIGURATION) from error
