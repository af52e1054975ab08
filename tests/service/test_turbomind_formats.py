"""Response formats before a run has them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ostinato.v1 import types_pb2

from service.engines.sources import SOURCE_BYTES_MAX
from service.engines.turbomind import formats as formats_module
from service.engines.turbomind.formats import Formats, source_of

Format = types_pb2.ResponseFormat


class Compiler:
    """Counts, and refuses what holds "bad"."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []

    def compile_json_schema(self, source: str) -> object:
        return self._take("json", source)

    def compile_regex(self, source: str) -> object:
        return self._take("regex", source)

    def _take(self, kind: str, source: str) -> object:
        self.compiled.append((kind, source))
        if "bad" in source:
            raise RuntimeError("[12:00:00] grammar_parser.cc: unbalanced " + "x" * 500)
        return f"{kind}:{source}"


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Format(), "is empty"),
        (Format(json_schema="{"), "is not JSON"),
        (Format(json_schema="3"), "an object or true"),
        (Format(json_schema="[" * 100_000), "must be at most"),
        (Format(json_schema="[" * 60_000), "nested too deeply|is not JSON"),
        (Format(regex="a" * (SOURCE_BYTES_MAX + 1)), "must be at most"),
    ],
)
def test_what_no_compiler_need_see_is_refused(wanted: types_pb2.ResponseFormat, text: str) -> None:
    """Before it costs anything."""
    with pytest.raises(ValueError, match=text):
        source_of(wanted)


async def test_a_grammar_is_compiled_once() -> None:
    """For every check and run that follows; one that cannot be obeyed is refused each time, in few words."""
    compiler = Compiler()
    formats = Formats(lambda: compiler)
    told = []
    for _ in range(2):
        formats.check(Format(regex="a+"))
        with pytest.raises(ValueError, match="cannot be obeyed: .*unbalanced") as caught:
            formats.check(Format(json_schema='{"bad": 1}'))
        told.append(str(caught.value))
    ready = await formats.ready(Format(regex="a+"))
    formats.close()

    assert ready == "regex:a+"
    assert compiler.compiled == [("regex", "a+"), ("json", '{"bad": 1}')]
    assert max(map(len, told)) < 350


async def test_a_grammar_that_takes_too_long_is_refused_and_blocks_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """xgrammar cannot be interrupted: what comes after is refused until it is done."""
    monkeypatch.setattr(formats_module, "COMPILE_SECONDS_MAX", 0.05)
    released = threading.Event()

    class Slow(Compiler):
        def compile_regex(self, source: str) -> object:
            released.wait(5)
            return super().compile_regex(source)

    slow: Any = Slow()
    formats = Formats(lambda: slow)
    with pytest.raises(ValueError, match="takes more than"):
        formats.check(Format(regex="slow"))
    with pytest.raises(ValueError, match="or waits for another that does"):
        await formats.ready(Format(regex="other"))
    released.set()
    monkeypatch.setattr(formats_module, "COMPILE_SECONDS_MAX", 5.0)
    ready = await formats.ready(Format(regex="other"))
    formats.close()

    assert ready == "regex:other"
