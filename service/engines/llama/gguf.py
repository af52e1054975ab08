"""The metadata at the head of a GGUF file: which bytes belong to which key, and what some of them mean."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type's number."""
_STRING, _ARRAY = 8, 9


class NotGguf(ValueError):
    """The file is no GGUF of a version that we read, or it is cut short."""


def read_metadata(path: Path) -> Mapping[str, bytes]:
    """Every key with its value's type and bytes as they stand in the file. Raises NotGguf, and OSError."""
    with path.open("rb") as file:
        if path.stat().st_size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
            raise NotGguf("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).metadata()
            except struct.error:
                raise NotGguf("it is cut short") from None
            except UnicodeDecodeError:
                raise NotGguf("its metadata is damaged: a key is no UTF-8 text") from None


def digest(metadata: Mapping[str, bytes], prefix: str) -> str:
    """SHA-256 over the keys under `prefix`, in order of their names, with their values."""
    state = sha256()
    for key in sorted(key for key in metadata if key.startswith(prefix)):
        name = key.encode()
        state.update(struct.pack("<QQ", len(name), len(metadata[key])) + name + metadata[key])
    return state.hexdigest()


def number(value: bytes) -> int:
    """A value of 32 bits."""
    return int(struct.unpack_from("<I", value, 4)[0])


def text(value: bytes) -> str:
    return value[12:].decode()


def length(value: bytes) -> int:
    """Elements of an array."""
    return int(struct.unpack_from("<Q", value, 8)[0])


def strings(value: bytes) -> list[str]:
    """The elements of an array of text."""
    found, at = [], 16
    for _ in range(length(value)):
        (size,) = struct.unpack_from("<Q", value, at)
        found.append(value[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return found


def numbers(value: bytes) -> list[int]:
    """The elements of an array of 32-bit numbers."""
    return list(struct.unpack_from(f"<{length(value)}i", value, 16))


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(_MAGIC)

    def metadata(self) -> Mapping[str, bytes]:
        version = self._number("<I")
        if version not in _VERSIONS:
            raise NotGguf(f"it is GGUF version {version}; {' and '.join(map(str, _VERSIONS))} can be read")
        self._number("<Q")  # tensors
        return dict(self._pair() for _ in range(self._number("<Q")))

    def _pair(self) -> tuple[str, bytes]:
        length = self._number("<Q")
        key = self._data[self._at : self._at + length].decode()
        self._at += length
        start = self._at
        self._skip(self._number("<I"))
        return key, self._data[start : self._at]

    def _number(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _skip(self, kind: int) -> None:
        """Go behind a value."""
        if kind == _STRING:
            length = self._number("<Q")
            self._at += length
        elif kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SIZES:
                self._at += count * _SIZES[inner]
            elif inner == _STRING:
                for _ in range(count):
                    self._skip(inner)
            else:
                raise NotGguf(f"its metadata has an array of type {inner}, which there is not")
        elif kind in _SIZES:
            self._at += _SIZES[kind]
        else:
            raise NotGguf(f"its metadata has a value of unknown type {kind}")
        if self._at > len(self._data):
            raise NotGguf("it is cut short")
