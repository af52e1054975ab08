"""What a caller writes becomes no control token, in every kind of tokenizer. The oracle is transformers.

Each tokenizer is built twice. The two differ in the spelling of their control tokens only. A caller who writes the control
tokens of one writes ordinary text for the other, so transformers' tokens of the chat by the other are the right ones.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from service.chat import Conversation, RenderBounds
from service.engines.turbomind.model import HuggingFaceVocabulary, read
from service.prepare import ChatTokenizer

NAMES = ("s", "user", "end", "INST")
TRANSFORMERS: Any = PreTrainedTokenizerFast
THINK = "<think>"
"""A token that is not a control token: it is recognised everywhere."""
ASCII = [chr(code) for code in range(0x20, 0x7F)]
SPLITS: dict[str, Any] = {
    "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "bytes, a space before": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "spaces, first": lambda: pre_tokenizers.Metaspace(prepend_scheme="first"),
    "spaces, always": lambda: pre_tokenizers.Metaspace(prepend_scheme="always"),
    "none": lambda: None,
}
NORMALIZERS: dict[str, Any] = {
    "none": lambda: None,
    "NFKC": normalizers.NFKC,
    "lower case": normalizers.Lowercase,
    "spaces": lambda: normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}
Flags = tuple[bool, bool, bool, bool]
FLAGS = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())
"""lstrip, rstrip, normalized, single_word."""


BRACKETS = dict(zip("<|>", "[+]", strict=True))
"""Those of control tokens in one tokenizer and in the other. No caller writes the latter."""


def spelled(name: str, other: bool) -> str:
    return "".join(BRACKETS[each] if other and each in BRACKETS else each for each in f"<|{name}|>")


def tokenizer(split: str, normalizer: str, flags: tuple[Flags, ...], *, other: bool) -> Tokenizer:
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), *ASCII, "▁", *map(chr, range(0xA0, 0x180))})
    vocabulary = {letter: index for index, letter in enumerate(["<unk>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.normalizer = SPLITS[split](), NORMALIZERS[normalizer]()
    made.add_tokens(
        [
            AddedToken(
                spelled(name, other), lstrip=lstrip, rstrip=rstrip, normalized=normalized, single_word=word, special=True
            )
            for name, (lstrip, rstrip, normalized, word) in zip(NAMES, flags, strict=True)
        ]
    )
    made.add_tokens([AddedToken(THINK, normalized=False)])
    begin = spelled("s", other)
    made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
    return made


def template(*, other: bool) -> str:
    """Writes control tokens with and without white space around them, and one of the caller's strings stripped."""
    begin, user, end, inst = (spelled(name, other) for name in NAMES)
    return (
        f"{begin}{{% for m in messages %}}{user} {{{{ m.content }}}} {end}\n{inst}{{{{ m.content | trim }}}}{inst}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{user}{{% endif %}}"
    )


@cache
def folder(path: Path) -> Path:
    config = {"num_attention_heads": 1, "max_position_embeddings": 8, "vocab_size": 1000, "num_hidden_layers": 1, "head_dim": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


def vocabulary(path: Path, made: Tokenizer) -> HuggingFaceVocabulary:
    made.save(str(folder(path) / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template(other=False)}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    return HuggingFaceVocabulary(read(path))


PARTS = " ;  ;\n;a;Hi;<|;|>;<|END|>;＜|end|>;é;x y"
WORDS = st.sampled_from([*(spelled(name, False) for name in NAMES), THINK, *PARTS.split(";")])
CHATS = st.lists(st.lists(WORDS, max_size=5).map("".join), min_size=1, max_size=2)


@given(
    split=st.sampled_from(sorted(SPLITS)),
    normalizer=st.sampled_from(sorted(NORMALIZERS)),
    flags=st.tuples(*[FLAGS] * len(NAMES)),
    texts=CHATS,
)
def test_what_a_caller_writes_is_text_in_every_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, split: str, normalizer: str, flags: tuple[Flags, ...], texts: list[str]
) -> None:
    """The tokens of a chat are those that transformers makes of it where the caller's strings can spell no control token."""
    ours = vocabulary(tmp_path_factory.getbasetemp(), tokenizer(split, normalizer, flags, other=False))
    theirs: Any = TRANSFORMERS(
        tokenizer_object=tokenizer(split, normalizer, flags, other=True), chat_template=template(other=True)
    )
    chat = Conversation([{"role": "user", "content": text} for text in texts])
    chats = ChatTokenizer(ours)

    ids = chats.token_ids(chat, RenderBounds(), allow_control_tokens=False)

    # A control token that the tokenizer does not find where the template writes it is text in both, spelled differently.
    letters = {theirs.convert_tokens_to_ids(there): theirs.convert_tokens_to_ids(here) for here, there in BRACKETS.items()}
    expected = theirs.apply_chat_template(list(chat.messages), add_generation_prompt=True, return_dict=False)
    assert ids == [letters.get(token_id, token_id) for token_id in expected]


def test_a_character_that_is_none_is_refused(tmp_path: Path) -> None:
    """U+10FFFF stands for control tokens on the way, so a chat that has it together with a control token is refused."""
    plain = (False, False, False, False)
    ours = vocabulary(tmp_path, tokenizer("bytes", "none", (plain,) * len(NAMES), other=False))
    chat = Conversation([{"role": "user", "content": "<|end|>\U0010ffff"}])
    chats = ChatTokenizer(ours)

    with pytest.raises(ValueError, match="has the character U\\+10FFFF"):
        chats.token_ids(chat, RenderBounds(), allow_control_tokens=False)
