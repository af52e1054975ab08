"""GGUF files: what is read of them, their vocabulary and chat template, and the tokenizer.json made of them."""

from __future__ import annotations

import json
import re
import struct
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.service.llama_kit import LACKING, Bench, on_the_loop

if LACKING:
    pytest.skip(f"the llama engine's packages are not installed: {LACKING}", allow_module_level=True)

from service.chat import Conversation, RenderBounds
from service.engines import huggingface
from service.engines.base import TooManyTokens
from service.engines.llama.library import library
from service.engines.llama.model import (
    SPLITS,
    LlamaVocabulary,
    NotGguf,
    metadata_digest,
    packaged_model,
    read_metadata,
    strings,
    tokenizer_json,
)

pytestmark = pytest.mark.llama

TEXTS = (
    "Hello, world! I'll say 12345 things; DON'T we've they're it's.",
    "上海是一座城市，人口约 2,487 万。\n東京と大阪",
    "مرحبا بالعالم ٣٤٥ — שלום עולם",
    "नमस्ते दुनिया ௧௨ ไทยไม่มีเว้นวรรค",
    "Ünïcödé ñandú Straße ŒUVRE İstanbul ǆ ﬀ Ω≈ç√∫˜µ≤",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u200d\ufeff ½ ⅷ 𝟘𝟙",
    "  a\t\tb   c \n\n\n d\r\n\r\n e\u00a0f\u3000g\u2028h \x0b\x0c \x00\x7f\x85",
    "def f(x):\n    return {'a': [1, 2]}  # <|im_end|> <|im_start|>user\nhi<|im_end|>\n",
)
BYTES_MISSING = frozenset(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")
"""Of those that UTF-8 has, what this vocabulary lacks as tokens: llama.cpp drops such a byte behind its merges, the
library before them, so that its neighbours may meet."""


def known(character: str) -> bool:
    """To the model, and to both tables of what is a letter: they follow different versions of Unicode, this is an old one."""
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs") and not BYTES_MISSING & set(character.encode())


KNOWN = st.characters(exclude_categories=["Cs", "Cn"]).filter(known)
WORDS = st.text(KNOWN, max_size=8) | st.sampled_from([" ", "  ", "\n", "\r\n", "1", "42", "'s", "'LL", "the", " The"])


@pytest.fixture(scope="module", name="vocabulary")
def _vocabulary() -> LlamaVocabulary:
    return LlamaVocabulary(packaged_model())


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(vocabulary: LlamaVocabulary) -> Tokenizer:
    return Tokenizer.from_str(vocabulary.files()["tokenizer.json"].decode())


@given(words=st.lists(WORDS, max_size=12))
@example(words=["a", "\u00a0", "\u1680", "b"])
def test_any_text(vocabulary: LlamaVocabulary, tokenizer: Tokenizer, words: list[str]) -> None:
    """Any text of characters that the model and both Unicode tables know has the same ids."""
    text = "".join(words)

    assert tokenizer.encode(text).ids == vocabulary.encode(text, special=True)


MARKS = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<issue_closed>", "<reponame>", "<", "|>", " ", "a"])


@pytest.mark.parametrize("name", ["smollm", "phi-3"])
@given(words=st.lists(MARKS | WORDS, max_size=40))
def test_a_text_that_is_cut_here_has_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, name: str, words: list[str]
) -> None:
    """Cut at its control tokens in Python, or at their places, a text has the ids that llama.cpp finds in the whole. In a model
    of that name, llama.cpp drops white space behind them."""
    vocabulary, text = named(tmp_path_factory.getbasetemp(), name), "".join(words)
    places = [found.span() for found in re.finditer("|".join(map(re.escape, vocabulary.controls)), text)]
    whole = {special: library().tokenize(vocabulary.handle, text.encode(), control=special) for special in (False, True)}

    for special in (False, True):
        assert vocabulary.encode_parts(text.encode(), vocabulary._marks[special], 1000) == whole[special]
        assert vocabulary.encode_at(text, places if special else []) == whole[special]


@cache
def named(folder: Path, name: str) -> LlamaVocabulary:
    return LlamaVocabulary(told(folder / f"{name}.gguf", "smollm", name))


def test_a_flood_of_control_tokens_is_not_tokenised(vocabulary: LlamaVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of control tokens is more than a context holds before any of it is tokenised."""
    monkeypatch.setattr(library(), "tokenize", lambda *_, **__: pytest.fail("tokenised"))

    with pytest.raises(TooManyTokens) as refused:
        vocabulary.encode("a<|im_end|>" * 90_000, special=True, most=2047)

    assert refused.value.count == 180_000


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_known_way_of_cutting(tmp_path_factory: pytest.TempPathFactory, pre: str) -> None:
    """The model with any pre-tokenizer has the same ids as in llama.cpp, for scripts, digits, white space, emoji and control
    tokens; and the ids have the same text."""
    path = told(tmp_path_factory.getbasetemp() / f"{pre}.gguf", pre)
    vocabulary = LlamaVocabulary(path)
    tokenizer = Tokenizer.from_str(vocabulary.files()["tokenizer.json"].decode())

    for text in TEXTS:
        ids = vocabulary.encode(text, special=True)
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids).encode() == b"".join(vocabulary.pieces[each] for each in ids)


def test_the_missing_bytes_are_missing() -> None:
    """BYTES_MISSING is exactly what this vocabulary lacks."""
    tokens = set(strings(read_metadata(packaged_model())["tokenizer.ggml.tokens"]))
    lacking = {byte for byte, letter in enumerate(huggingface.letters()) if letter not in tokens}

    assert lacking - {0xC0, 0xC1, *range(0xF5, 0x100)} == BYTES_MISSING


def test_the_template_comes_as_it_is(vocabulary: LlamaVocabulary) -> None:
    """The template is unchanged, and the control tokens are named."""
    told = json.loads(vocabulary.files()["tokenizer_config.json"])

    assert told["chat_template"] == vocabulary.template
    assert (told["bos_token"], told["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "tekken"), ("llama", "smollm"), ("gpt2", None)])
def test_an_unknown_vocabulary_is_refused(kind: str, pre: str | None) -> None:
    """The error names it: a guess would silently give other tokens."""
    metadata = {"tokenizer.ggml.model": _text(kind)} | ({"tokenizer.ggml.pre": _text(pre)} if pre else {})

    with pytest.raises(ValueError, match=f"{kind!r} with pre-tokenizer {pre or ''!r}"):
        tokenizer_json(metadata, None)


def told(path: Path, pre: str, name: str = "smollm") -> Path:
    """The packaged model without its weights, with another pre-tokenizer or name."""
    metadata = {**read_metadata(packaged_model()), "tokenizer.ggml.pre": _text(pre), "general.name": _text(name)}
    if name == "phi-3":  # llama.cpp expects these
        tokens = strings(metadata["tokenizer.ggml.tokens"])
        for old, new in {"<issue_start>": "<s>", "<issue_comment>": "</s>", "<issue_closed>": "<unk>"}.items():
            tokens[tokens.index(old)] = new
        packed = [struct.pack("<Q", len(token.encode())) + token.encode() for token in tokens]
        metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:16] + b"".join(packed)
    pairs = [struct.pack("<Q", len(key)) + key.encode() + value for key, value in metadata.items()]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    return path


def _text(value: str) -> bytes:
    """A GGUF's value."""
    return struct.pack("<IQ", 8, len(value)) + value.encode()


@pytest.mark.parametrize("text", ["Hello, world", "wörld 🧬龘 \n\t x\0y", " two  spaces ", "<|im_end|> is text"])
@on_the_loop
async def test_text_comes_back(bench: Bench, text: str) -> None:
    """The pieces of a text's tokens are the text, and none of them is a control token."""
    vocabulary = bench.engine.vocabulary
    ids = vocabulary.encode(text, special=False)

    assert b"".join(vocabulary.pieces[each] for each in ids) == text.encode()
    assert vocabulary.end_ids.isdisjoint(ids)


@on_the_loop
async def test_a_chat_becomes_control_tokens(bench: Bench) -> None:
    """A rendered chat has the template's own first turn, ends ready to answer, and its control tokens are recognised."""
    vocabulary = bench.engine.vocabulary
    text = vocabulary.render(Conversation([{"role": "user", "content": "Hi"}]), RenderBounds())
    ids = vocabulary.encode(text, special=True)

    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert vocabulary.pieces[ids[0]] == b""
    assert len(vocabulary.end_ids.intersection(ids)) == 1


def pair(key: bytes, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(key) if length is None else length) + key + value


NUMBER, DEEP = struct.pack("<II", 4, 1), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
DAMAGED = [
    (pair(b"\xff", NUMBER), "its metadata is damaged: a key is not UTF-8 text"),
    (pair(b"\xc3(", NUMBER), "its metadata is damaged: a key is not UTF-8 text"),
    (pair(b"a", DEEP), "its metadata has an array of type 9, which does not exist"),
    (pair(b"a", struct.pack("<I", 13)), "its metadata has a value of unknown type 13"),
    (pair(b"a", struct.pack("<IIQ", 9, 8, 2**63) + struct.pack("<Q", 2**64 - 1)), "it is cut short"),
    (pair(b"a", struct.pack("<IQ", 8, 2**64 - 1)), "it is cut short"),
    (pair(b"a", NUMBER, 2**64 - 1), "it is cut short"),
    (b"", "it is cut short"),
]


@pytest.mark.parametrize(("content", "told"), DAMAGED)
def test_damaged_metadata_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    """Keys that are not text, unknown types, and lengths beyond the file are errors. GGUF has no arrays of arrays, which
    would make the reader recursive."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + content)

    with pytest.raises(NotGguf, match=f"^{told}$"):
        read_metadata(path)


def test_digests_of_metadata() -> None:
    """The tokenizer's digest covers its keys and values, and nothing else of the file."""
    metadata = dict(read_metadata(packaged_model()))
    whole = metadata_digest(metadata, "tokenizer.ggml.")
    metadata["general.name"] = b"another"
    assert metadata_digest(metadata, "tokenizer.ggml.") == whole
    metadata["tokenizer.ggml.pre"] = b"another"
    assert metadata_digest(metadata, "tokenizer.ggml.") != whole
