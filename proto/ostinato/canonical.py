"""Values as bytes, one way only: what every digest is taken over. docs/protocol.md specifies it byte for byte.

Independent of protobuf's serialisation, which promises no canonical form.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

DIGEST_BYTES = 32
"""Every digest is a SHA-256."""


def u64(value: int) -> bytes:
    """8 bytes, big-endian."""
    return struct.pack(">Q", value)


def i64(value: int) -> bytes:
    """8 bytes, big-endian two's complement: u64 where it is not negative. Open enums and signed fields can be, until judged."""
    return struct.pack(">q", value)


def f64(value: float) -> bytes:
    """IEEE 754 binary64, big-endian; -0.0 is written as 0.0, and every NaN as eight bytes 255."""
    return b"\xff" * 8 if math.isnan(value) else struct.pack(">d", value + 0.0)


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


def ids(values: Iterable[int]) -> bytes:
    """An array of u64; the fast way for token ids."""
    numbers = list(values)
    return struct.pack(f">Q{len(numbers)}Q", len(numbers), *numbers)


def digest(name: str, *parts: bytes) -> bytes:
    """SHA-256 over `ostinato/<name>/v1`, one zero byte, and the parts; the name keeps digests of different things apart."""
    return hashlib.sha256(b"\0".join((f"ostinato/{name}/v1".encode(), b"".join(parts)))).digest()
