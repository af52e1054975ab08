"""A model's folder: what its files say, their digests, its tokens and its chat template."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.chat import ChatTemplate, Conversation, RenderBounds
from service.engines import huggingface
from service.engines.base import EngineUnusable, Span
from service.engines.turbomind.host import module

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin")
_NESTED = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Model:
    """What config.json says and TurboMind does not report."""

    path: Path
    context_tokens_max: int
    vocabulary_size: int
    """Of the model; a tokenizer may have fewer tokens."""
    layers: int
    heads: int
    kv_heads: int
    """In the cache. Latent attention (MLA) has one."""
    head_dim: int
    quantisation: str
    """Of the weights: "none", or a method."""
    experts: int
    """0: not a mixture of experts."""
    tuned_layers: int
    """The first layers that TurboMind has to time its kernels with, so that there is one with experts among them."""
    end_ids: frozenset[int]
    config_digest: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def own_kernels(self) -> bool:
        """Whether TurboMind's own kernels serve some of its products: quantised weights, and experts."""
        return self.quantisation != "none" or self.experts > 0


def read(path: Path | None) -> Model:
    """Raises EngineUnusable with what is missing."""
    if path is None:
        raise EngineUnusable("--engine turbomind needs --model: a folder with config.json, safetensors and a tokenizer")
    path = path.resolve()
    try:
        raw = (path / "config.json").read_bytes()
        whole = json.loads(raw)
        config = next((whole[name] for name in _NESTED if isinstance(whole.get(name), dict)), whole)
        heads = int(config["num_attention_heads"])
        latent = int(config.get("kv_lora_rank") or 0)
        return Model(
            path=path,
            context_tokens_max=int(config["max_position_embeddings"]),
            vocabulary_size=int(config["vocab_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=1 if latent else int(config.get("num_key_value_heads") or heads),
            head_dim=latent + int(config["qk_rope_head_dim"])
            if latent
            else int(config.get("head_dim") or config["hidden_size"] // heads),
            quantisation=str((whole.get("quantization_config") or {}).get("quant_method", "none")),
            experts=max(int(config.get(name) or 0) for name in _EXPERTS),
            tuned_layers=1 + _dense_layers(config),
            end_ids=_end_ids(path, whole),
            config_digest=hashlib.sha256(raw).hexdigest(),
        )
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        advice = "name a folder that has config.json" if missing else "let this user read it"
        file = error.filename or path / "config.json"
        raise EngineUnusable(f"--model: {path} cannot be read as a model: {file}: {error.strerror}; {advice}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineUnusable(f"--model: {path}/config.json is not that of a text model: {error!r}") from error


def _dense_layers(config: Mapping[str, Any]) -> int:
    """The layers before the first one with experts."""
    if "sparse" in (types := config.get("mlp_layer_types") or ()):
        return int(types.index("sparse"))
    if config.get("n_routed_experts"):
        return int(config.get("first_k_dense_replace", 1))
    only = config.get("mlp_only_layers") or ()
    return next(layer for layer in itertools.count() if layer not in only)


def _end_ids(path: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """From generation_config.json, or from config.json if that has none."""
    try:
        own = json.loads((path / "generation_config.json").read_bytes())
    except FileNotFoundError:
        own = {}
    given = own.get("eos_token_id", config.get("eos_token_id"))
    return frozenset(int(each) for each in (given if isinstance(given, list) else [given]) if each is not None)


def weights_digest(path: Path) -> str:
    """SHA-256 over the names and SHA-256 of the weight files, read by several threads: about a second for each 1 to 2 GB.
    Raises EngineUnusable if there are none, or one cannot be read."""
    files = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise EngineUnusable(f"--model: {path} has no weights: no file is named {' or '.join(WEIGHTS)}")
    return _digest_of(files)


def tokenizer_digest(path: Path) -> str:
    """The same for the tokenizer's files."""
    return _digest_of([file for name in TOKENIZER_FILES if os.path.lexists(file := path / name)])


def _digest_of(files: Iterable[Path]) -> str:
    paths = list(files)
    try:
        with ThreadPoolExecutor() as threads:
            digests = list(threads.map(_sha256, paths))
    except OSError as error:
        raise EngineUnusable(f"{error.filename} cannot be read: {error.strerror}; let this user read it") from error
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_log = logging.getLogger(__name__)

_SHRINKS: Mapping[str | None, int] = {None: 1, "NFC": 3}
"""The most by which a normalizer shortens a text in UTF-8; another one may drop any of it."""


class HuggingFaceVocabulary:
    """A `service.engines.base.Vocabulary` of Hugging Face's tokenizers library."""

    def __init__(self, model: Model) -> None:
        """Raises EngineUnusable if the model has no such tokenizer."""
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
        self._special, self._plain, self._marked = (tokenizers.Tokenizer.from_str(layout) for _ in range(3))
        self._plain.encode_special_tokens = self._marked.encode_special_tokens = True  # control tokens in a text are text
        for each in (self._special, self._plain, self._marked):
            each.no_truncation()
            each.no_padding()
        self.size = model.vocabulary_size
        own = self._hf.eos_token_id
        self.end_ids = frozenset(each for each in (*model.end_ids, own) if each is not None and each < self.size)
        added = {token_id: (each.content, each.special) for token_id, each in backend.get_added_tokens_decoder().items()}
        self.pieces = pieces(backend.get_vocab(with_added_tokens=True), added, self.size, byte_level=is_byte_level(layout))
        names = {token_id: text for token_id, (text, control) in added.items() if control and token_id < self.size}
        self.controls: Mapping[str, int] = {text: token_id for token_id, text in names.items()}
        self.written: Sequence[bytes] = [piece or names.get(each, "").encode() for each, piece in enumerate(self.pieces)]
        self._places = self._add_places(tokenizers.AddedToken, backend.get_added_tokens_decoder())
        self._templates = self._compiled()
        normalizer = (json.loads(layout).get("normalizer") or {}).get("type")
        texts = [*self.pieces, *(content.encode() for content, _ in added.values())]
        self.source_bytes_max = _SHRINKS[normalizer] * max(map(len, texts)) if normalizer in _SHRINKS else None
        self._begin = begin_of(
            self._special.encode("a", add_special_tokens=True).ids, self._special.encode("a", add_special_tokens=False).ids
        )

    def _compiled(self) -> Mapping[str, ChatTemplate]:
        """By name: a model may have one for chats with tools."""
        given = self._hf.chat_template
        if isinstance(given, str):
            given = {"default": given}
        self.template: str | None = (given or {}).get("tool_use") or (given or {}).get("default")
        tokens = {name: str(token) for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)}
        try:
            return {name: ChatTemplate(source, tokens) for name, source in (given or {}).items()}
        except ValueError as error:
            _log.warning("no chat with this model", extra={"reason": str(error)})
            return {}

    @property
    def chat(self) -> bool:
        return "default" in self._templates

    @property
    def template_digest(self) -> str:
        """SHA-256, or "none"."""
        template = self._hf.chat_template
        return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else "none"

    def encode(self, text: str, *, special: bool, most: int = sys.maxsize) -> list[int]:
        return self._begun((self._special if special else self._plain).encode(text, add_special_tokens=False).ids)

    def encode_at(self, text: str, places: Sequence[Span], *, most: int = sys.maxsize) -> list[int]:
        if _PLACE in text:
            raise ValueError(f"it has the character U+{ord(_PLACE):X}, which is none")
        while True:
            parts, starts, done, length = list[str](), list[int](), 0, 0
            for first, last in places:
                parts += [text[done:first], _place(self.controls[text[first:last]])]
                starts.append(length + first - done)
                done, length = last, length + first - done + len(parts[-1])
            found = self._marked.encode("".join([*parts, text[done:]]), add_special_tokens=False)
            taken = [span for token_id, span in zip(found.ids, found.offsets, strict=True) if token_id in self._places]
            if len(taken) == len(places):
                return self._begun([self._places.get(token_id, token_id) for token_id in found.ids])
            # Some are text to this tokenizer: it looks for them after it has changed the text, or between words only.
            places = [place for place, at in zip(places, starts, strict=True) if any(a <= at < b for a, b in taken)]

    def _begun(self, ids: Sequence[int]) -> list[int]:
        return list(ids) if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def _add_places(self, kind: Any, added: Mapping[int, Any]) -> Mapping[int, int]:
        """Adds a token for the place of each control token, which is found where and as the control token is. Control tokens by
        the ids of these."""
        controls = {token_id: added[token_id] for token_id in self.controls.values()}
        self._marked.add_tokens(
            [
                kind(
                    _place(token_id), single_word=each.single_word, lstrip=each.lstrip, rstrip=each.rstrip,
                    normalized=each.normalized, special=False,
                )
                for token_id, each in controls.items()
            ]
        )  # fmt: skip
        return {self._marked.token_to_id(_place(token_id)): token_id for token_id in controls}

    def render(self, given: Conversation, bounds: RenderBounds) -> str:
        template = self._templates.get("tool_use" if given.tools and "tool_use" in self._templates else "default")
        assert template is not None, "Prepare refuses a chat where there is no template"
        return template.render(given, bounds)

    def files(self) -> Mapping[str, bytes]:
        template = self._hf.chat_template
        config = huggingface.config(
            template=template if isinstance(template, str) else None, begin=self._hf.bos_token, end=self._hf.eos_token
        )
        return {huggingface.TOKENIZER: self._layout.encode(), huggingface.CONFIG: config}


_PLACE = "\U0010ffff"
"""Begins what stands for a control token in a text. Unicode will never give it a meaning."""


def _place(token_id: int) -> str:
    return f"{_PLACE}{chr(0xF0000 + token_id // 4096)}{chr(0xF0000 + token_id % 4096)}"


def is_byte_level(layout: str) -> bool:
    """Whether tokens have a printable character for each byte, as in GPT-2, and are not text with a mark for spaces.
    `layout`: the tokenizer's description."""
    described = json.loads(layout)
    return '"type": "ByteLevel"' in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])


def pieces(tokens: Mapping[str, int], added: Mapping[int, tuple[str, bool]], size: int, *, byte_level: bool) -> Sequence[bytes]:
    """The bytes that each of `size` tokens adds to the text. `added` has literal tokens, or, if True, control tokens, which add
    none. Ids that the tokenizer does not know add none."""
    found = [b""] * size
    letters = {letter: bytes([byte]) for byte, letter in enumerate(huggingface.letters())}
    for token, token_id in tokens.items():
        if token_id >= size:
            continue
        text, control = added.get(token_id, (token, False))
        if token_id in added:
            found[token_id] = b"" if control else text.encode()
        elif byte_level:
            found[token_id] = b"".join(letters.get(letter) or letter.encode() for letter in token)
        else:
            found[token_id] = _sentencepiece(token)
    return found


def begin_of(whole: Sequence[int], bare: Sequence[int]) -> list[int]:
    """The tokens that a tokenizer adds before a text. What it adds after the text is left out, because the answer follows
    there."""
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
