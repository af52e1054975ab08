"""The contract's enums as words: GRADE_BEST_EFFORT is BEST_EFFORT. A value that this version does not know is its number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Protocol, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor

V_co = TypeVar("V_co", bound=int, covariant=True)


class Enum(Protocol[V_co]):
    """A generated enum, such as types_pb2.Grade."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor: ...  # noqa: N802

    def Value(self, name: str) -> V_co: ...  # noqa: N802


def word(enum: Enum[int], value: int) -> str:
    return words(enum.DESCRIPTOR).get(value, str(value))


def value(enum: Enum[V_co], word: str) -> V_co:
    """The inverse of `word`. Raises ValueError."""
    return cast(V_co, int(word)) if word.isdecimal() else enum.Value(_prefix(enum.DESCRIPTOR) + word)


@cache
def words(kind: EnumDescriptor) -> Mapping[int, str]:
    return {each.number: each.name.removeprefix(_prefix(kind)) for each in kind.values}


def _prefix(kind: EnumDescriptor) -> str:
    return kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
