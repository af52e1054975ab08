"""Values as bytes, one way only: what every digest is taken over. docs/protocol.md specifies it byte for byte.

Independent of protobuf's serialisation, which promises no canonical form.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array as array_of
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")

DIGEST_BYTES = 32
"""Every digest is a SHA-256."""


# The journal computes some forty of these for an item, hence no function of our own around the first two.
u64: Callable[[int], bytes] = struct.Struct(">Q").pack
"""8 bytes, big-endian."""

i64: Callable[[int], bytes] = struct.Struct(">q").pack
"""8 bytes, big-endian two's complement: u64 where it is not negative. Open enums and signed fields can be, until judged."""

_f64: Callable[[float], bytes] = struct.Struct(">d").pack
_NAN = b"\xff" * 8
_NONE = bytes(8)


def f64(value: float) -> bytes:
    """IEEE 754 binary64, big-endian; -0.0 is written as 0.0, and every NaN as eight bytes 255."""
    return _NAN if math.isnan(value) else _f64(value + 0.0)


def blob(value: bytes) -> bytes:
    """Length as u64, then the bytes."""
    return u64(len(value)) + value


def text(value: str) -> bytes:
    """UTF-8, as a blob."""
    return blob(value.encode())


def maybe(encode: Callable[[T], bytes], value: T | None) -> bytes:
    """One byte 0 for nothing; one byte 1, then the value."""
    return b"\0" if value is None else b"\1" + encode(value)


def array(encode: Callable[[T], bytes], values: Iterable[T]) -> bytes:
    """Count as u64, then the values."""
    parts = [encode(value) for value in values]
    return u64(len(parts)) + b"".join(parts)


def ids(values: Sequence[int]) -> bytes:
    """An array of u64; the fast way for token ids."""
    if not values:
        return _NONE
    numbers = array_of("Q", values[:])  # protobuf hands out a whole list sooner than its items
    if sys.byteorder == "little":
        numbers.byteswap()
    return u64(len(numbers)) + numbers.tobytes()


def digest(name: str, *parts: bytes) -> bytes:
    """SHA-256 over `ostinato/<name>/v1`, one zero byte, and the parts; the name keeps digests of different things apart."""
    return hashlib.sha256(b"".join((_prefix(name), *parts))).digest()


@cache
def _prefix(name: str) -> bytes:
    return f"ostinato/{name}/v1\0".encode()
