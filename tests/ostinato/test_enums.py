"""Enums in words, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import enums
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2

ENUMS = [
    getattr(file, kind.name)
    for file in (types_pb2, generation_pb2, sequencer_pb2, engine_pb2)
    for kind in file.DESCRIPTOR.enum_types_by_name.values()
]


@given(st.sampled_from(ENUMS), st.integers(0, 2**31 - 1))
def test_a_word_is_its_value(enum: enums.Enum[int], number: int) -> None:
    """Every value has a word that is its own, without the enum's name; one of a newer version has its number."""
    for value in (*enum.DESCRIPTOR.values_by_number, number):
        assert enums.value(enum, enums.word(enum, value)) == value
    assert enums.word(enum, 0) == "UNSPECIFIED"
    assert number in enum.DESCRIPTOR.values_by_number or enums.word(enum, number) == str(number)


def test_words_of_grades() -> None:
    """A word may have several parts."""
    assert [enums.word(types_pb2.Grade, value) for value in range(4)] == ["UNSPECIFIED", "BEST_EFFORT", "SERIAL", "EXACT"]


def test_no_word() -> None:
    """What is no word of an enum is refused."""
    with pytest.raises(ValueError, match="GRADE_BEST"):
        enums.value(types_pb2.Grade, "BEST")
