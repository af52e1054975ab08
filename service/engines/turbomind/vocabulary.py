"""The model's tokens and its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ostinato.v1 import types_pb2

from service.engines import huggingface
from service.engines.base import EngineUnusable
from service.engines.turbomind.host import module
from service.engines.turbomind.model import Model

Kind = Literal["byte-level", "sentencepiece"]
"""How a vocabulary writes bytes: GPT-2's way, each byte a printable character; or as text, with a mark for spaces."""


class HuggingFaceVocabulary:
    """A `service.engines.base.Vocabulary`, of a tokenizer that Hugging Face's Rust library runs."""

    def __init__(self, model: Model) -> None:
        """Raises EngineUnusable for a model without such a tokenizer."""
        transformers, tokenizers = module("transformers"), module("tokenizers")
        try:
            self._hf = transformers.AutoTokenizer.from_pretrained(str(model.path))
            backend: Any = self._hf.backend_tokenizer
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise EngineUnusable(
                f"--model: {model.path} has no tokenizer that can be used: {error}; it needs tokenizer.json"
            ) from error
        layout = backend.to_str()
        self._layout: str = layout
        self._special = tokenizers.Tokenizer.from_str(layout)
        self._plain = tokenizers.Tokenizer.from_str(layout)
        self._plain.encode_special_tokens = True  # as text, that is
        for each in (self._special, self._plain):
            each.no_truncation()
            each.no_padding()
        self.size = model.vocabulary_size
        own = self._hf.eos_token_id
        self.end_ids = frozenset(each for each in (*model.end_ids, own) if each is not None and each < self.size)
        added = {token_id: (each.content, each.special) for token_id, each in backend.get_added_tokens_decoder().items()}
        self.pieces = pieces(backend.get_vocab(with_added_tokens=True), added, kind_of(layout), self.size)
        self._begin = begin_of(
            self._special.encode("a", add_special_tokens=True).ids, self._special.encode("a", add_special_tokens=False).ids
        )

    @property
    def chat(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def template_digest(self) -> str:
        """SHA-256, or "none"."""
        template = self._hf.chat_template
        return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else "none"

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`; with `special` after the model's begin tokens, unless the text has them written out."""
        if not special:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        ids = list(self._special.encode(text, add_special_tokens=False).ids)
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids

    def piece(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def render(self, messages: Sequence[types_pb2.Message]) -> str:
        """The chat as the model's own template writes it. Raises ValueError with what the template says against it."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(str(error) or type(error).__name__) from error
        return str(text)

    def files(self) -> Mapping[str, bytes]:
        """See base.Vocabulary."""
        template = self._hf.chat_template
        config = huggingface.config(
            template=template if isinstance(template, str) else None, begin=self._hf.bos_token, end=self._hf.eos_token
        )
        return {huggingface.TOKENIZER: self._layout.encode(), huggingface.CONFIG: config}


def kind_of(layout: str) -> Kind:
    """From the tokenizer's description in JSON."""
    described = json.loads(layout)
    kinds = set(_types(described.get("decoder"))) | set(_types(described.get("pre_tokenizer")))
    return "byte-level" if "ByteLevel" in kinds else "sentencepiece"


def _types(part: Any) -> Iterable[str]:
    """Of a part and the parts in it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ())):
            yield from _types(inner)


def pieces(tokens: Mapping[str, int], added: Mapping[int, tuple[str, bool]], kind: Kind, size: int) -> list[bytes]:
    """The bytes that each of `size` tokens adds to the text. `added` has tokens that are text as they stand, or, where True,
    control tokens, which add none; nor do ids that the tokenizer does not know."""
    found = [b""] * size
    letters = {letter: bytes([byte]) for byte, letter in enumerate(huggingface.letters())}
    for token, token_id in tokens.items():
        if token_id >= size:
            continue
        text, control = added.get(token_id, (token, False))
        if token_id in added:
            found[token_id] = b"" if control else text.encode()
        elif kind == "byte-level":
            found[token_id] = b"".join(letters.get(letter) or letter.encode() for letter in token)
        else:
            found[token_id] = _sentencepiece(token)
    return found


def begin_of(whole: Sequence[int], bare: Sequence[int]) -> list[int]:
    """What a tokenizer puts before a text; what it may put behind is not wanted, for the answer follows there."""
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return list(whole[:start])
    return []


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode()
