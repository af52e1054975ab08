"""Response formats, as llguidance obeys them."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from ostinato.v1 import types_pb2

from service.engines.llama.library import CANDIDATE, Library
from service.engines.sources import bounded, schema_of

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written on one line, as Python's json.dumps does: with free white space, a small model may never leave it."""


class GrammarLost(Exception):
    """llguidance has given up, and would let every token pass."""


class Grammar:
    """One answer's way through a grammar; it belongs to one thread."""

    def __init__(self, library: Library, vocabulary: int, size: int, kind: str, source: bytes) -> None:
        """`vocabulary` is a handle, `size` its number of tokens; the rest is from `source_of`."""
        self._library = library
        self._sampler = library.grammar(vocabulary, kind, source)
        self._tokens = np.zeros(size, CANDIDATE)
        self._tokens["id"] = np.arange(size)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by id. Raises GrammarLost.

        A grammar always forbids something, control tokens if nothing else; llguidance shows a failure by forbidding nothing.
        """
        self._tokens["logit"] = 0
        self._library.apply(self._sampler, self._tokens)
        allowed: NDArray[np.bool_] = self._tokens["logit"] == 0
        if allowed.all():
            raise GrammarLost("llguidance has given the grammar up")
        return allowed

    def accept(self, token_id: int) -> None:
        """Go on behind a token, which must be allowed."""
        self._library.accept(self._sampler, token_id)

    def close(self) -> None:
        self._library.free_sampler(self._sampler)


def source_of(response_format: types_pb2.ResponseFormat) -> tuple[str, bytes]:
    """What llguidance calls this kind of grammar, and the grammar. Raises ValueError for what it need not see."""
    if response_format.WhichOneof("format") == "json_schema":
        # A schema that says itself how white space is to be written has its way.
        return "json", json.dumps({"x-guidance": SEPARATORS} | schema_of(response_format.json_schema)).encode()
    if response_format.WhichOneof("format") == "regex":
        if "\0" in response_format.regex:
            raise ValueError("holds a NUL character; write \\x00")
        return "regex", bounded(response_format.regex).encode()
    raise ValueError("is empty")
