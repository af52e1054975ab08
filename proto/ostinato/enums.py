"""The contract's enums as words: GRADE_BEST_EFFORT is BEST_EFFORT. A value that this version does not know is its number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor

if TYPE_CHECKING:  # the name exists for type checkers only
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as Enum

V = TypeVar("V", bound=int)


def word(enum: Enum[Any], value: int) -> str:
    return words(enum.DESCRIPTOR).get(value, str(value))


def value(enum: Enum[V], word: str) -> V:
    """The inverse of `word`. Raises ValueError."""
    return cast(V, int(word)) if word.isdecimal() else enum.Value(_prefix(enum.DESCRIPTOR) + word)


@cache
def words(kind: EnumDescriptor) -> Mapping[int, str]:
    return {each.number: each.name.removeprefix(_prefix(kind)) for each in kind.values}


def _prefix(kind: EnumDescriptor) -> str:
    return kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
