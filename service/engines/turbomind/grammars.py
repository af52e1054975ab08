"""Response formats: xgrammar, which is a part of TurboMind's library, compiles them.

A compilation cannot be interrupted; and TurboMind asks every grammar of a batch which tokens may come next before it makes
a token of any run, so a grammar that is dear to follow delays all others. So each is compiled first, and followed for some
tokens, by this module as the child of a `service.engines.grammars.Checker`. It loads that library alone, and needs no GPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_bool, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ostinato.errors import EngineFailed
from ostinato.v1 import types_pb2

from service.engines.grammars import Checker, Limits, cannot_be_obeyed, serve
from service.strict_json import object_of, schema_of

WALKS, WALK_TOKENS = 2, 256
"""How often a grammar is followed, and for how many tokens each time."""
LIMITS = Limits(seconds=2.0, memory_bytes=64 << 20, doing=f"compile and to follow for {WALK_TOKENS} tokens")
TRIES = 8
"""Of a draw, for a token that does not end the answer."""
KEPT = 128
"""Compiled grammars."""
RAW = 0
"""xgrammar's number of a vocabulary that is given as bytes."""
_PLACE = re.compile(r"^\[[\d:]+\] \S+: (Check failed: .*? is false: )?")
"""The time and the line of its source that xgrammar puts before its messages."""


def source_of(response_format: types_pb2.ResponseFormat) -> tuple[str, str]:
    """Kind of grammar, and the grammar. Raises ValueError for one that need not be compiled to be refused."""
    kind = response_format.WhichOneof("format")
    if kind == "json_schema":
        schema_of(response_format.json_schema)
        return kind, response_format.json_schema
    if kind == "regex":
        return kind, response_format.regex
    if kind == "ebnf":
        # The compiler has no method for a grammar alone.
        grammar = {"type": "grammar", "grammar": response_format.ebnf}
        return "structural_tag", json.dumps({"type": "structural_tag", "format": grammar})
    assert kind == "structural_tag", "Prepare refuses an empty one"
    object_of(response_format.structural_tag)
    return kind, response_format.structural_tag


class Formats:
    """Checks and compiles grammars, one at a time in a thread of its own."""

    def __init__(self, checker: Checker, compiler: Any) -> None:
        """Both are called in that thread. `compiler` is xgrammar's."""
        self._checker, self._compiler = checker, compiler
        self._thread = ThreadPoolExecutor(1, "xgrammar")
        self._started = lru_cache(KEPT)(self._start)

    def check(self, response_format: types_pb2.ResponseFormat) -> None:
        """Raises ValueError with xgrammar's message, or what the grammar costs. Any thread; waits."""
        self._started(*source_of(response_format)).result()

    async def ready(self, response_format: types_pb2.ResponseFormat) -> object:
        """The compiled grammar for `Native.start`. Raises EngineFailed: `check` may have run in another service."""
        try:
            return await asyncio.shield(asyncio.wrap_future(self._started(*source_of(response_format))))
        except ValueError as error:
            raise EngineFailed(f"parameters.response_format {error}") from error

    def _start(self, kind: str, source: str) -> Future[Any]:
        return self._thread.submit(self._compile, kind, source)

    def close(self) -> None:
        """Waits for the check of a grammar, and not for its compilation."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    def _compile(self, kind: str, source: str) -> Any:
        self._checker.check(kind, source.encode())
        return compiled(self._compiler, kind, source)


def compiled(compiler: Any, kind: str, source: str) -> Any:
    """Raises ValueError with xgrammar's message."""
    try:
        return getattr(compiler, f"compile_{kind}")(source)
    except MemoryError:
        raise
    except Exception as error:  # xgrammar may raise anything
        raise ValueError(cannot_be_obeyed(_PLACE.sub("", str(error)).strip() or type(error).__name__)) from error


def grammar_compiler(library: Any, pieces: Sequence[bytes], end_ids: Iterable[int], *, threads: int = 8) -> Any:
    """xgrammar's, with each token's bytes and the tokens that may end an answer. LMDeploy's own reads the vocabulary itself and
    guesses its encoding, wrongly for some converted tokenizers. `library` is the module `_turbomind`."""
    info = library.TokenizerInfo(list(pieces), RAW, len(pieces), sorted(end_ids), False)
    return library.GrammarCompiler(info, threads, False)  # it keeps none: a kept grammar is kept by `Formats`


def checker(library: Path, pieces: Sequence[bytes], end_ids: Iterable[int]) -> Checker:
    """`library` is the path of TurboMind's."""
    vocabulary = [[piece.decode("latin-1") for piece in pieces], sorted(end_ids)]
    return Checker(__name__, str(library), first=json.dumps(vocabulary).encode() + b"\n")


MATCHER = "_ZN8xgrammar14GrammarMatcherC1ERKNS_15CompiledGrammarESt8optionalISt6vectorIiSaIiEEEbi"
FILL = "_ZN8xgrammar14GrammarMatcher20FillNextTokenBitmaskEP8DLTensorib"
ACCEPT = "_ZN8xgrammar14GrammarMatcher11AcceptTokenEib"
VALUE_OFFSET = 16
"""Of the pointer to the C++ object in an instance of a class of pybind11."""


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, with one dimension, on a CPU."""

    _fields_ = (
        ("data", c_void_p), ("device", c_int32 * 2), ("dimensions", c_int32), ("code", c_uint8), ("bits", c_uint8),
        ("lanes", c_uint16), ("shape", c_void_p), ("strides", c_void_p), ("offset", c_uint64),
    )  # fmt: skip


class Matcher:
    """xgrammar's, which the module `_turbomind` does not export, at the beginning of an answer. It is never freed."""

    def __init__(self, library: ctypes.CDLL, grammar: object, size: int) -> None:
        """`size`: of the vocabulary."""
        self._library, self._size = library, size
        self._matcher, no_stop_tokens = (ctypes.create_string_buffer(64) for _ in range(2))
        self._mask = bytearray(4 * -(-size // 32))
        self._shape, self._strides = (c_int64 * 1)(len(self._mask) // 4), (c_int64 * 1)(1)
        self._words = (c_uint8 * len(self._mask)).from_buffer(self._mask)
        pointers = [ctypes.addressof(each) for each in (self._words, self._shape, self._strides)]
        self._tensor = _Tensor(pointers[0], (1, 0), 1, 0, 32, 1, *pointers[1:], 0)
        compiled = c_void_p.from_address(id(grammar) + VALUE_OFFSET)
        library[MATCHER](self._matcher, compiled, no_stop_tokens, c_bool(False), c_int(0))

    def allowed(self) -> NDArray[np.intp]:
        """The ids of the tokens that may come next."""
        self._library[FILL](self._matcher, ctypes.byref(self._tensor), c_int(0), c_bool(False))
        bits = np.unpackbits(np.frombuffer(self._mask, np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self._size])

    def accept(self, token_id: int) -> None:
        self._library[ACCEPT](self._matcher, c_int(token_id), c_bool(False))


def follow(matcher: Matcher, end_ids: Collection[int], chance: random.Random) -> bool:
    """Follows a grammar by arbitrary tokens, ends only where nothing else may come. False: it allows no answer."""
    for place in range(WALK_TOKENS):
        ids = matcher.allowed()
        if not ids.size:
            return bool(place)
        going_on = [each for each in (int(chance.choice(ids)) for _ in range(TRIES)) if each not in end_ids]
        if not going_on:
            break
        matcher.accept(going_on[0])
    return True


def _load(library: Path) -> Any:
    """The module `_turbomind`, without LMDeploy."""
    sys.setdlopenflags(os.RTLD_LAZY)  # no function of CUDA is called
    spec = spec_from_file_location("_turbomind", library)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(library: Path) -> None:
    """The child of `Checker`."""
    try:
        turbomind = _load(library)
    except ImportError:
        import_module("torch")  # CUDA's libraries may lie where only torch finds them
        turbomind = _load(library)
    symbols = ctypes.CDLL(turbomind.__file__, mode=os.RTLD_LAZY)
    pieces, end_ids = json.loads(sys.stdin.buffer.readline())
    compiler = grammar_compiler(turbomind, [piece.encode("latin-1") for piece in pieces], end_ids, threads=1)

    def problem(kind: str, source: str) -> str | None:
        try:
            grammar = compiled(compiler, kind, source)
        except ValueError as error:
            return str(error)
        for walk in range(WALKS):
            if not follow(Matcher(symbols, grammar, len(pieces)), end_ids, random.Random(walk)):  # noqa: S311  # no secret
                return "allows no answer"
        return None

    serve(sys.stdin.buffer, sys.stdout.buffer, problem, LIMITS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
