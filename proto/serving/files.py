"""Files that a program relies on: who may have put them there is checked before they are used. Those that flags name may be
read again when they change.

A file is trusted if this user or root owns it, and not every user may write into it. A link on the way to it is followed if
this user or root made it, as the links of a Kubernetes volume. Groups are not looked at: Kubernetes lets one (fsGroup) write
every file of a volume.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from serving.program import BAD_CONFIGURATION, StartupError

T = TypeVar("T")

LINKS_MAX = 40
"""On the way to a file, as in the kernel."""
BYTES_MAX = 1 << 20
"""Of a file that a flag names."""

_IF_RIGHT = "{} if its content is right, or name another"


class Untrusted(OSError):
    """Another user may have made or changed the file. The message names it, why, and what to do."""


def user() -> str:
    """This process's user, for messages."""
    number = os.geteuid()
    try:
        return f"user {pwd.getpwuid(number).pw_name} (uid {number})"
    except KeyError:
        return f"uid {number}"


def resolved(path: Path) -> Path:
    """The path without links, to be opened with O_NOFOLLOW; what it names need not exist. Raises Untrusted, and OSError."""
    place, rest, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    while rest:
        step = place / rest.pop()
        if step.name == "..":
            place = place.parent
            continue
        try:
            found = step.lstat()
        except FileNotFoundError:
            return step.joinpath(*reversed(rest))
        if not stat.S_ISLNK(found.st_mode):
            place = step
            continue
        _check_owner(step, found, "a link, and its owner")
        if (links := links + 1) > LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = step.readlink()
        place = Path("/") if target.is_absolute() else place
        rest += [part for part in reversed(target.parts) if part != "/"]
    return place


def check(path: Path, found: os.stat_result) -> None:
    """Raises Untrusted if the file that was found there, or the folder, may be another user's work."""
    _check_owner(path, found, "its owner")
    if found.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(found.st_mode)
        raise Untrusted(f"{path}: mode {mode:04o} lets every user of this machine write it: {_IF_RIGHT.format('chmod o-w')}")


def _check_owner(path: Path, found: os.stat_result, what: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise Untrusted(
            f"{path}: {what} is uid {found.st_uid}, neither root nor {user()}, which uses it: {_IF_RIGHT.format('chown it')}"
        )


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a trusted file, or, with O_CREAT, of a new one that only this user can read. Without O_TRUNC: the file is
    looked at after it is opened. Raises Untrusted, and OSError."""
    assert not flags & os.O_TRUNC
    place = resolved(path)
    handle = os.open(place, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        check(place, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def read(path: Path) -> bytes:
    """The content of a trusted file. Raises Untrusted, and OSError."""
    with os.fdopen(opened(path), "rb") as file:
        return file.read()


def replace(path: Path, text: str, *, parents: bool = False) -> None:
    """Replace a file as a whole, by one that only this user can read; with `parents` its folder is made. Durable on return.
    Raises OSError; then the old file is intact."""
    place = resolved(path)
    if parents:
        place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{place.name}.new")
    draft.unlink(missing_ok=True)  # of a process that was killed
    with os.fdopen(opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(place)
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """The names in it are durable on return."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def private_folder(path: Path) -> Path:
    """A folder that only this user can enter: made, or closed for others, if it has to be. The path without links. Raises
    Untrusted, and OSError."""
    place = resolved(path)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = place.lstat()
    _check_owner(place, found, "its owner")
    if found.st_mode & 0o077:
        place.chmod(0o700)
    return place


# ---- files that flags name


class Unusable(ValueError):
    """The file of a flag cannot be used, and the message says why."""

    def __init__(self, flag: str, why: str) -> None:
        super().__init__(why)
        self.flag = flag


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a flag names. A `private` one must not be readable by all users of the machine."""

    flag: str
    path: Path
    private: bool = False

    def state(self) -> tuple[int, ...]:
        """Differs after a change. Follows links, so that a mounted folder may be replaced as a whole."""
        try:
            found = self.path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)

    def read(self) -> bytes:
        """Raises Unusable."""
        try:
            with os.fdopen(opened(self.path), "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(BYTES_MAX + 1)
        except OSError as error:
            raise Unusable(self.flag, error.strerror or str(error).removeprefix(f"{self.path}: ")) from error
        if len(data) > BYTES_MAX:
            raise Unusable(self.flag, f"is larger than {BYTES_MAX} bytes")
        if self.private and mode & 0o007:
            raise Unusable(self.flag, f"mode {mode & 0o777:04o} lets every user of this machine read it; make it 0640 or 0600")
        return data


class Reloaded(Generic[T]):
    """The parsed content of some files. While a change makes them unusable, `value` is the content before it."""

    def __init__(self, sources: Sequence[Source], parse: Callable[[Mapping[str, bytes]], T]) -> None:
        """`parse` is given the contents by flag, and raises Unusable. Raises StartupError that names flag and file."""
        self._sources, self._parse = sources, parse
        self._states = self._current_states()
        self.value = self._read()

    def refresh(self) -> bool:
        """Whether `value` is new. Raises StartupError if the files have changed and cannot be used."""
        states = self._current_states()
        if states == self._states:
            return False
        self._states = states
        self.value = self._read()
        return True

    def _current_states(self) -> list[tuple[int, ...]]:
        return [source.state() for source in self._sources]

    def _read(self) -> T:
        try:
            return self._parse({source.flag: source.read() for source in self._sources})
        except Unusable as error:
            path = next(source.path for source in self._sources if source.flag == error.flag)
            raise StartupError(f"{error.flag}: {path}: {error}", exit_code=BAD_CONFIGURATION) from error
