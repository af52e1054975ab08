"""Why a journal's file cannot be used: one line that names the file, the fault, and what to do."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from serving import files

RESTORE = "restore a copy that verifies, see docs/operations.md, A file that is damaged, or not accessible"

REBUILD = "python -m sidecar rebuild makes its tables again from the entries, if those are sound"


def remedy(fault: str) -> str:
    """For what was found in a table."""
    return REBUILD if fault.startswith(("table items:", "table keys:", "table journal:")) else RESTORE


SIDE_FILES = ("-wal", "-shm", "-journal")
"""Endings of the files that SQLite reads beside a journal."""

_MAGIC = b"SQLite format 3\0"
_MAGIC_FAULTS_MAX = 4
"""A file that differs in so few of these bytes was a SQLite file."""
_HEADER_BYTES = 100
"""Of a SQLite file, before its first table: https://www.sqlite.org/fileformat2.html."""
_PAGE_BYTES_MIN, _PAGE_BYTES_MAX = 512, 65536


def place_fault(path: Path, *, create: bool) -> str:
    """Why this user cannot or must not open a journal at this path, found without opening the file; empty: no fault. `create`:
    the journal may be created. `path`: without links."""
    folder = path.parent
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return f"{path}: {folder} is not a folder"
    except FileNotFoundError:
        return f"{path} does not exist, nor does its folder {folder}: create the folder, or name another --journal"
    except OSError as error:
        return f"{path}: the folder {folder} cannot be read by {files.user()}: {error.strerror}"
    for file in (path.with_name(path.name + ending) for ending in ("", *SIDE_FILES)):
        try:
            if not stat.S_ISREG(mode := file.lstat().st_mode):
                what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                beside = f"{path} needs a file of this name beside it; move it away"
                return f"{file} is {what}: {beside}" if file != path else f"{file} is {what}: name the journal's file"
            if fault := _access_fault(file, os.R_OK | os.W_OK):
                return fault
            files.check(file, file.stat())  # without opening it: closing it would release this process's locks on it
        except FileNotFoundError:
            if file == path and not create:
                return f"{path} does not exist: name a journal that does"
        except files.Untrusted as error:
            return str(error)
        except OSError as error:
            return f"{file} cannot be read by {files.user()}: {error.strerror}"
    fault = _access_fault(folder, os.W_OK | os.X_OK)
    return f"{path}: its folder {fault}, and the journal needs files beside it" if fault else ""


def _access_fault(path: Path, mode: int) -> str:
    """Why this user cannot access it; empty: no fault."""
    if os.access(path, mode, effective_ids=True):
        return ""
    found = path.stat()
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{path} cannot be written: its file system is read-only; copy the journal's files to one that is not"
    verb = "written" if os.access(path, mode & ~os.W_OK, effective_ids=True) else "read"
    held = f"its mode is {stat.S_IMODE(found.st_mode):04o} and its owner {found.st_uid}:{found.st_gid}"
    return f"{path} cannot be {verb} by {files.user()}: {held}; change them, or run as another user"


def damaged(path: Path, what: str) -> str:
    """The line for a file whose content is not what was written. SQLite may quote some of it."""
    printable = "".join(each if each.isprintable() else "?" for each in what)
    return f"{path} is damaged: {printable}: {RESTORE}"


def cut(path: Path, page_bytes: int, pages: int) -> str:
    """The line for a file that is shorter than its pages, or ends inside one; empty: it is complete, or there is a write-ahead
    log beside it, which may hold what the file lacks."""
    wal, size = path.with_name(path.name + "-wal"), path.stat().st_size
    if wal.exists() and wal.stat().st_size:
        return ""
    if size % page_bytes:
        return damaged(path, f"it is cut: {size} bytes are not a whole number of pages of {page_bytes}")
    if size < page_bytes * pages:
        return damaged(path, f"it is cut: its header says {page_bytes * pages} bytes, and {size} are there")
    return ""


def full_fault(path: Path, bytes_max: int) -> str:
    size = path.stat().st_size if path.exists() else 0
    if bytes_max and size >= bytes_max // 2:
        return f"{path}: no room is left of --journal-bytes-max {bytes_max}: raise it, or drop payloads with prune"
    free = shutil.disk_usage(path.parent).free
    return f"{path}: its disk is full, {free} bytes are free in {path.parent}: make room there"


def header_fault(path: Path) -> str:
    """The fault in the first bytes of the file, or in its length; empty: none was found."""
    try:
        with path.open("rb") as file:
            header, size = file.read(_HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not size:
        return ""
    if not header.startswith(_MAGIC):
        same = sum(a == b for a, b in zip(header, _MAGIC, strict=False))
        if same >= min(size, len(_MAGIC)) - _MAGIC_FAULTS_MAX:
            return damaged(path, f"its first {len(_MAGIC)} bytes are not quite those of a SQLite file, or it is cut")
        return f"{path} is not a journal, nor any other SQLite file: it begins with {header[:16]!r}; name the journal's file"
    if size < _HEADER_BYTES:
        return damaged(path, f"it is cut: {size} bytes are there, fewer than its header has")
    page_bytes = int.from_bytes(header[16:18]) if header[16:18] != b"\0\1" else _PAGE_BYTES_MAX
    if not (_PAGE_BYTES_MIN <= page_bytes <= _PAGE_BYTES_MAX) or page_bytes & (page_bytes - 1):
        return damaged(path, f"its header, bytes 16 and 17, says {page_bytes} bytes a page, which cannot be")
    return cut(path, page_bytes, int.from_bytes(header[28:32]))
