"""Response formats on TurboMind: checked in a child process, with a stand-in for TurboMind's library, and then compiled."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from ostinato.v1.types_pb2 import ResponseFormat as Format

from service.engines.grammars import Checker
from service.engines.turbomind.grammars import ACCEPT, FILL, LIMITS, MATCHER, WALK_TOKENS, Formats, checker, source_of

MATCHERS = r"""
#include <string.h>
typedef struct { int *mask; int device[2], dimensions; char code, bits; short lanes; long *shape; } Tensor;
void matcher(long *self, long grammar, const char *stops, int ends, int back) __asm__("%s");
void matcher(long *self, long grammar, const char *stops, int ends, int back) { self[0] = grammar, self[1] = 0; }
int fill(long *self, Tensor *out, int place, int debug) __asm__("%s");
int fill(long *self, Tensor *out, int place, int debug) {
  while (self[0] == 1 && self[1] == 200) {}
  memset(out->mask, 0, 4 * out->shape[0]);
  out->mask[0] = self[0] == 2 ? 0 : self[1] == 250 ? 4 : 5;
  return 1;
}
int accept(long *self, int token, int debug) __asm__("%s");
int accept(long *self, int token, int debug) { self[1]++; return 1; }
"""
"""Of grammar 1 a token is never found, and 2 allows none. Of the others tokens 0 and 2 may come, and after 250 of them 2."""
LIBRARY = """
import os, struct

__file__ = {path!r}

class TokenizerInfo:
    def __init__(self, pieces, kind, size, ends, prefix):
        self.told = f"{{pieces!r}} {{kind}} {{size}} {{ends}} {{prefix}}"

class GrammarCompiler:
    def __init__(self, info, threads, keeps):
        self.told = f"{{info.told}} {{threads}} {{keeps}}"

    def compile_regex(self, source):
        if source == "vocabulary":
            raise RuntimeError(self.told)
        if source == "bad":
            raise RuntimeError("[12:00:00] /build/grammar_parser.cc:564: EBNF parser error " + "x" * 500)
        if source == "check":
            raise RuntimeError("[12:00:00] /build/compiler.cc:3: Check failed: (x.is_y()) is false: Invalid tag")
        if source == "slow":
            while True:
                pass
        if source == "large":
            bytearray(1 << 30)
        if source == "ends the process":
            os.abort()
        number = {{"slow to follow": 1, "without an answer": 2}}.get(source, 3)
        return struct.unpack("d", struct.pack("q", number))[0]  # which CPython keeps where pybind11 keeps a pointer
"""


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Format(structural_tag="[]"), "must be a JSON object"),
        (Format(json_schema="{"), "is not JSON"),
        (Format(json_schema="3"), "an object or true"),
        (Format(json_schema="[" * 60_000), "nested too deeply|is not JSON"),
    ],
)
def test_what_no_compiler_need_see_is_refused(wanted: Format, text: str) -> None:
    """A format that is not JSON, or not of the right kind, is refused before it is compiled."""
    with pytest.raises(ValueError, match=text):
        source_of(wanted)


needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checker]:
    folder = tmp_path_factory.mktemp("library")
    (folder / "matchers.c").write_text(MATCHERS % (MATCHER, FILL, ACCEPT))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", "matchers.so", "matchers.c"], cwd=folder, check=True)
    library = folder / "_turbomind.py"
    library.write_text(LIBRARY.format(path=str(folder / "matchers.so")))
    found = checker(library, [b"a", b"\xff", b""], {2})
    yield found
    found.close()


@needs_a_compiler
def test_the_child_has_the_vocabulary(child: Checker) -> None:
    """Every byte of every token arrives; the child compiles in one thread, because a fork has no others."""
    with pytest.raises(ValueError, match="cannot be obeyed") as caught:
        child.check("regex", b"vocabulary")

    assert str(caught.value).endswith(r"[b'a', b'\xff', b''] 0 3 [2] False 1 False")


@needs_a_compiler
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("bad", "^cannot be obeyed: EBNF parser error$|^cannot be obeyed: EBNF parser error .{0,300}$"),
        ("check", "^cannot be obeyed: Invalid tag$"),
        ("slow", f"^takes more than {LIMITS.seconds:g} s of processor time to compile and to follow for {WALK_TOKENS} tokens$"),
        ("slow to follow", f"^takes more than {LIMITS.seconds:g} s of processor time "),
        ("without an answer", "^allows no answer$"),
        ("large", f"takes more than {LIMITS.memory_bytes >> 20} MiB$"),
        ("ends the process", "^cannot be compiled"),
    ],
)
def test_a_grammar_is_refused_with_its_reason_or_its_cost(child: Checker, source: str, why: str) -> None:
    """A grammar that is malformed, too dear to compile or to follow, fatal to the compiler or without an answer is refused, and
    the next one is checked as ever."""
    with pytest.raises(ValueError, match=why):
        child.check("regex", source.encode())
    child.check("regex", b"a+")


class Compiler:
    """Of the engine's process: it counts."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile_regex(self, source: str) -> object:
        self.compiled.append(source)
        return f"regex:{source}"

    def compile_structural_tag(self, source: str) -> object:
        return f"tag:{source}"


async def test_a_grammar_is_compiled_once_and_only_if_the_child_could() -> None:
    """What the child refuses is refused each time, and never reaches the engine's compiler."""
    asked: list[str] = []

    def check(kind: str, source: bytes) -> None:
        asked.append(source.decode())
        if b"dear" in source:
            raise ValueError("takes more than 2 s")

    compiler = Compiler()
    formats = Formats(cast(Checker, SimpleNamespace(check=check, close=lambda: None)), compiler)
    for _ in range(2):
        formats.check(Format(regex="a+"))
        with pytest.raises(ValueError, match="takes more than"):
            formats.check(Format(regex="dear"))
    ready = await formats.ready(Format(regex="a+"))
    grammar = await formats.ready(Format(ebnf='root ::= "a"'))
    formats.close()

    assert ready == "regex:a+"
    assert grammar == 'tag:{"type": "structural_tag", "format": {"type": "grammar", "grammar": "root ::= \\"a\\""}}'
    assert (asked[:2], len(asked), compiler.compiled) == (["a+", "dear"], 3, ["a+"])
