"""Tokens, their bytes and begin tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.huggingface import letters
from service.engines.turbomind.model import begin_of, is_byte_level, pieces

BYTE_LEVEL = {"decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}}
SENTENCEPIECE = {
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]},
    "pre_tokenizer": None,
}


NESTED = {"decoder": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}}


@pytest.mark.parametrize(("layout", "expected"), [(BYTE_LEVEL, True), (NESTED, True), (SENTENCEPIECE, False)])
def test_the_tokenizers_description_says_how_bytes_are_written(layout: object, expected: bool) -> None:
    """The kind is found in the decoder or the pre-tokenizer, at any depth."""
    assert is_byte_level(json.dumps(layout)) is expected


@pytest.mark.parametrize(
    ("byte_level", "tokens", "expected"),
    [
        (True, ["Ġthe", "Ċ", "Ã", "¤", "a b"], [b" the", b"\n", b"\xc3", b"\xa4", b"a b", b""]),
        (
            False, ["▁the", "<0x0A>", "<0xE2>", "<0xZZ>", "ä"],
            [b" the", b"\n", b"\xe2", b"<0xZZ>", "ä".encode(), b""],
        ),
    ],
)  # fmt: skip
def test_tokens_are_bytes(byte_level: bool, tokens: list[str], expected: list[bytes]) -> None:
    """Byte-level tokens are decoded to their bytes, also parts of characters; sentencepiece byte tokens are bytes, and similar
    texts are text."""
    assert pieces({token: number for number, token in enumerate(tokens)}, {}, 6, byte_level=byte_level) == expected


@given(st.binary(max_size=8))
def test_every_byte_has_a_letter(data: bytes) -> None:
    """Every byte has a letter, and is decoded again."""
    token = "".join(letters()[byte] for byte in data)

    assert len(set(letters())) == 256
    assert pieces({token: 0}, {}, 1, byte_level=True) == [data]


def test_control_tokens_add_nothing_and_other_added_ones_are_text() -> None:
    """Ids beyond the model's vocabulary are ignored."""
    added = {1: ("<|im_end|>", True), 2: ("<tool Ġ>", False), 9: ("<image>", True)}
    found = pieces({"a": 0, "<|im_end|>": 1, "<tool Ġ>": 2, "<image>": 9}, added, 4, byte_level=True)

    assert found == [b"a", b"", "<tool Ġ>".encode(), b""]


@pytest.mark.parametrize(
    ("whole", "bare", "expected"),
    [([1, 5], [5], [1]), ([5], [5], []), ([1, 5, 2], [5], [1]), ([5, 2], [5], []), ([9], [5], [])],
)
def test_begin_tokens_are_what_stands_before_a_text(whole: list[int], bare: list[int], expected: list[int]) -> None:
    """Begin tokens are kept, and an end token that a tokenizer adds is not."""
    assert begin_of(whole, bare) == expected
