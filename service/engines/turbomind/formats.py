"""Response formats, as TurboMind's xgrammar obeys them."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from textwrap import shorten
from typing import Any

from ostinato.v1 import types_pb2

from service.engines.sources import bounded, schema_of

KEPT = 128
"""Compiled grammars."""
COMPILE_SECONDS_MAX = 10.0
WAITING_MAX = 64
"""Grammars that may wait for the one that is being compiled."""
EXPLANATION_CHARACTERS_MAX = 300
SLOW = f"takes more than {COMPILE_SECONDS_MAX:g} s to compile, or waits for another that does"


def source_of(response_format: types_pb2.ResponseFormat) -> tuple[str, str]:
    """Kind of grammar and the grammar. Raises ValueError for what no compiler need see."""
    kind = response_format.WhichOneof("format")
    if kind == "json_schema":
        schema_of(response_format.json_schema)
        return kind, response_format.json_schema
    if kind == "regex":
        return kind, bounded(response_format.regex)
    raise ValueError("is empty")


class Formats:
    """Compiles grammars, one at a time and in a thread of its own: xgrammar can be kept busy for long by little text, and
    cannot be interrupted. A grammar that takes too long is refused; until it is done, so are all that come after it."""

    def __init__(self, compiler: Callable[[], Any]) -> None:
        """`compiler` gives xgrammar's compiler, in that thread, when the first grammar comes."""
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "xgrammar")
        self._futures: OrderedDict[tuple[str, str], Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, response_format: types_pb2.ResponseFormat) -> None:
        """Raises ValueError with what xgrammar says against it. Any thread; waits."""
        try:
            self._compiled(response_format).result(COMPILE_SECONDS_MAX)
        except TimeoutError:
            raise ValueError(SLOW) from None

    async def ready(self, response_format: types_pb2.ResponseFormat) -> object:
        """The grammar, as `Native.start` takes it. Raises ValueError likewise."""
        compiled = asyncio.wrap_future(self._compiled(response_format))
        try:
            return await asyncio.wait_for(asyncio.shield(compiled), COMPILE_SECONDS_MAX)
        except TimeoutError:
            raise ValueError(SLOW) from None

    def _compiled(self, response_format: types_pb2.ResponseFormat) -> Future[Any]:
        key = source_of(response_format)
        with self._lock:
            future = self._futures.get(key)
            if future is None:
                if sum(not each.done() for each in self._futures.values()) >= WAITING_MAX:
                    raise ValueError("cannot be compiled now: too many others wait")
                future = self._futures[key] = self._thread.submit(self._compile, *key)
            self._futures.move_to_end(key)
            while len(self._futures) > KEPT:
                self._futures.popitem(last=False)
        return future

    def close(self) -> None:
        """What is being compiled ends when it ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, kind: str, source: str) -> Any:
        try:
            compiler = self._compiler()
            return compiler.compile_json_schema(source) if kind == "json_schema" else compiler.compile_regex(source)
        except Exception as error:  # C++ throws what it likes
            told = shorten(str(error), EXPLANATION_CHARACTERS_MAX, placeholder=" ...") or type(error).__name__
            raise ValueError(f"cannot be obeyed: {told}") from error
