"""Hugging Face's files, read by Hugging Face's own library: they make the tokens and the text that the service makes."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from service.chat import ChatTemplate, Conversation, RenderBounds
from service.engines.huggingface import config, letters
from service.engines.scripted import CONTROLS, ByteVocabulary

VOCABULARY = ByteVocabulary()
FILES = VOCABULARY.files()
TOKENIZER = Tokenizer.from_str(FILES["tokenizer.json"].decode())
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WRITTEN = st.lists(TEXT | st.sampled_from(list(CONTROLS))).map("".join)


@given(WRITTEN)
def test_a_text_has_the_same_tokens(text: str) -> None:
    """With control tokens recognised, behind the begin token, which a rendered chat may have already."""
    bare = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert VOCABULARY.encode(text, special=True) == (bare if text.startswith("<|begin|>") else TOKENIZER.encode(text).ids)


@given(WRITTEN)
def test_tokens_have_the_same_text(text: str) -> None:
    """Control tokens have none, here as there."""
    ids = VOCABULARY.encode(text, special=True)

    assert TOKENIZER.decode(ids) == b"".join(VOCABULARY.pieces[each] for each in ids).decode()


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), TEXT)), st.none() | TEXT)
def test_a_chat_has_the_same_tokens(turns: list[tuple[str, str]], system: str | None) -> None:
    """The template in the files, rendered by a gateway, comes to what the service renders and tokenises."""
    messages = [{"role": role, "content": content} for role, content in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    told, chat = json.loads(FILES["tokenizer_config.json"]), Conversation(messages)
    template = ChatTemplate(told["chat_template"], {"bos_token": told["bos_token"], "eos_token": told["eos_token"]})

    rendered = TOKENIZER.encode(template.render(chat, RenderBounds()), add_special_tokens=False).ids
    assert rendered == VOCABULARY.encode(VOCABULARY.render(chat, RenderBounds()), special=True)


def test_letters_are_the_library_s() -> None:
    """The same 256; which byte each stands for, the round trip above tells."""
    assert sorted(letters()) == sorted(ByteLevel.alphabet())


def test_what_a_model_does_not_have_is_not_written() -> None:
    """No null in tokenizer_config.json: a reader may take it for text."""
    assert json.loads(config(template=None, begin=None, end="</s>")) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
    }
