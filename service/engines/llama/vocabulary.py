"""The model's tokens and its chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ostinato.v1 import types_pb2

from service.engines import huggingface
from service.engines.base import EngineUnusable
from service.engines.llama import bpe, gguf
from service.engines.llama.library import Library, library
from service.engines.llama.template import ChatTemplate

_log = logging.getLogger(__name__)


class LlamaVocabulary:
    """A `service.engines.base.Vocabulary`. It outlives its engine."""

    def __init__(self, library: Library, path: Path) -> None:
        """Of the GGUF at `path`. Raises EngineUnusable."""
        self._library = library
        self._path = path
        file = path.stat()
        model = _kept(path, file.st_size, file.st_mtime_ns)
        self.handle = library.vocabulary(model)
        self.size = library.size(self.handle)
        self.end_ids = frozenset(token_id for token_id in range(self.size) if library.is_end(self.handle, token_id))
        self._pieces = [library.piece(self.handle, token_id, control=False) for token_id in range(self.size)]
        begin, end = library.edge_ids(self.handle)
        self._begin = [begin] if begin is not None and library.wants_begin(self.handle) else []
        self.template = self._template_of(model)
        """As it stands in the file, if it does."""
        self._chat = self._template(begin, end)
        self._controls = self._written(begin), self._written(end)

    @property
    def chat(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = self._library.tokenize(self.handle, text.encode(), control=special)
        return ids if ids[:1] == self._begin else self._begin + ids

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def render(self, messages: Sequence[types_pb2.Message]) -> str:
        if self._chat is None:
            raise ValueError("the model has no chat template")
        return self._chat.render(messages)

    def files(self) -> Mapping[str, bytes]:
        begin, end = self._controls
        template = self.template
        if template is not None and self._begin and not self._writes_begin(begin):
            template = "{{ bos_token }}" + template
        return {
            huggingface.TOKENIZER: bpe.tokenizer_json(gguf.read_metadata(self._path), next(iter(self._begin), None)),
            huggingface.CONFIG: huggingface.config(template=template, begin=begin or None, end=end or None),
        }

    def _writes_begin(self, begin: str) -> bool:
        """Whether a chat has its begin token from the template; if not, `encode` puts it there, and a gateway does not."""
        return self._chat is not None and self._chat.render([types_pb2.Message(role="user", content="a")]).startswith(begin)

    def _template_of(self, model: int) -> str | None:
        try:
            return self._library.template(model)
        except UnicodeDecodeError:
            raise EngineUnusable(f"--model: {self._path}: its chat template is no UTF-8 text") from None

    def _template(self, begin: int | None, end: int | None) -> ChatTemplate | None:
        """None: there is none, or none that can be used."""
        if self.template is None:
            return None
        try:
            return ChatTemplate(self.template, begin=self._written(begin), end=self._written(end))
        except ValueError as error:
            _log.warning("no chat with this model", extra={"reason": str(error)})
            return None

    def _written(self, token_id: int | None) -> str:
        """A control token as text."""
        return "" if token_id is None else self._library.piece(self.handle, token_id, control=True).decode()


@cache
def _kept(path: Path, size: int, modified_nanoseconds: int) -> int:
    """The file's vocabulary, loaded alone and never freed: llguidance remembers a vocabulary by its address, which must not be
    given to another; and one may still be asked when its engine has closed."""
    return library().load(path, vocabulary_only=True)
