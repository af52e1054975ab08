"""`python -m tests.gpu.scoreboard MODEL`: the determinism tests that vLLM and SGLang publish, with their parameters.

Asked of our service, and of the same service without what makes it exact: the control, which must fail.

`--engine llama` asks the CPU engine, with fewer trials and shorter texts; its control is a KV cache of 16 bits.

vLLM    tests/v1/determinism: needle, logprobs of a batch of 1 against 32, mixed prefill, prefix cold against hot
SGLang  sglang.test.test_deterministic: single, mixed, prefix, radix cache
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import types_pb2

from tests.gpu.compare import grade
from tests.gpu.fronts import Front
from tests.gpu.plan import Plan, say
from tests.gpu.prefix import alone, tokens
from tests.gpu.stack import running
from tests.gpu.traffic import WORDS, Ask, ask_of


@dataclass(frozen=True, slots=True)
class Size:
    """The defaults are those of the projects."""

    needle_trials: int = 5
    needle_batch: tuple[int, int] = (64, 128)
    needle_words: tuple[int, int] = (1024, 2048)
    needle_tokens: int = 128
    prefill_words: tuple[int, int] = (200, 900)
    prefill_batches: tuple[int, ...] = (*range(1, 11), 15, 16, 17)
    trials: int = 50
    tokens: int = 100
    long_words: int = 2500
    prefixes: tuple[int, ...] = (1, 511, 2048, 4097)
    shared_words: int = 1200


CPU = Size(1, (4, 6), (30, 50), 12, (40, 110), (1, 3, 6), 5, 8, 120, (1, 65, 191, 320), 120)
CONTROLS = {"turbomind": ("--no-exact",), "llama": ("--kv", "f16", "--ubatch", "512", "--threads", "2")}
CONTEXT = ("--context-tokens", "8192")
"""Of the GPU: for prompts of 4,097 tokens."""
FEYNMAN = "Tell me about Richard Feynman: "
NUMBERS = (
    "Generate 1000 random numbers. Go directly into it, don't say Sure and don't say here are numbers."
    " Just start with a number."
)
Row = tuple[str, str, int, int]
"""Whose test, its name, how many answers were compared, and how many were wrong."""


def _ask(name: str, prompt: str | Sequence[int], **given: Any) -> Ask:
    return ask_of(name, prompt, **({"ignore_eos": True, "logprobs": 5} | given))


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(least, most + 1)))


def _key(answer: object) -> bytes:
    """What must be equal: tokens and logprob bits."""
    assert isinstance(answer, types_pb2.Output), answer
    return output_digest(answer) + logprobs_digest(answer)


async def _needle(front: Front, size: Size) -> AsyncIterator[Row]:
    """One prompt alone, and at a random place in batches of random size among random prompts."""
    for temperature in (0.0, 0.6):
        given = {"temperature": temperature, "top_p": 0.95, "seed": 20240919, "max_new_tokens": size.needle_tokens}
        needle = _ask("needle", "There once was a ", **given)
        expected, draw, wrong = _key((await front.ask([needle]))["needle"]), random.Random(12345), 0
        for _ in range(size.needle_trials):
            count = draw.randrange(size.needle_batch[0], size.needle_batch[1] + 1)
            asks = [
                _ask(f"other {i}", _words(draw, *size.needle_words), **given | {"seed": i, "temperature": 0.3 * (i % 4)})
                for i in range(count - 1)
            ]
            asks.insert(draw.randrange(count), needle)
            wrong += _key((await front.ask(asks))["needle"]) != expected
        yield "vLLM", f"needle, temperature {temperature:g}", size.needle_trials, wrong


async def _logprobs(front: Front, size: Size) -> AsyncIterator[Row]:
    """32 prompts, each alone against all at once."""
    draw = random.Random(7)
    given = {"temperature": 0.6, "seed": 1234, "max_new_tokens": 16}
    asks = [_ask(f"prompt {i}", _words(draw, 10, 50), **given) for i in range(32)]
    single, together = await alone(front, asks), await front.ask(asks)
    yield "vLLM", "logprobs, batch of 1 against 32", 32, sum(_key(single[a.name]) != _key(together[a.name]) for a in asks)


async def _prefill(front: Front, size: Size) -> AsyncIterator[Row]:
    """Prompts of mixed lengths in batches of many sizes."""
    draw = random.Random(8)
    given = {"temperature": 0.6, "seed": 1234, "max_new_tokens": min(64, size.tokens)}
    pool = [_ask(f"prompt {i}", _words(draw, *size.prefill_words), **given) for i in range(max(size.prefill_batches))]
    single, compared, wrong = await alone(front, pool), 0, 0
    for count in size.prefill_batches:
        found = await front.ask(pool[:count])
        compared += count
        wrong += sum(_key(single[a.name]) != _key(found[a.name]) for a in pool[:count])
    yield "vLLM", "mixed prefill", compared, wrong


async def _hot(front: Front, size: Size) -> AsyncIterator[Row]:
    """Prompts with one beginning, cold, and again when that is cached. If there is a cache, it must be hit."""
    draw = random.Random(11)
    text = _words(draw, size.shared_words, size.shared_words)
    given = {"temperature": 0.6, "seed": 1234, "max_new_tokens": min(64, size.tokens)}
    asks = [_ask(f"question {i}", f"{text} {_words(draw, 1, 40)}", **given) for i in range(8)]
    cold, hot, together = await alone(front, asks), await alone(front, asks), await front.ask(asks)
    wrong = sum(_key(cold[a.name]) != _key(found[a.name]) for found in (hot, together) for a in asks)
    hits = sum(answer.cached_tokens for answer in hot.values() if isinstance(answer, types_pb2.Output))
    caches = (await front.describe()).fingerprint.fields.get("prefix_cache") == "on"
    wrong += caches and not hits
    yield "vLLM", f"prefix cold against hot, {hits} tokens cached", 2 * len(asks), wrong


async def _unique(front: Front, size: Size) -> AsyncIterator[Row]:
    """Batches of 1, 2, 3 and so on of the same prompts: all answers to one prompt are equal."""
    text = tokens(max(size.prefixes), 4)
    kinds: dict[str, list[str | Sequence[int]]] = {
        "single": [FEYNMAN],
        "mixed": [FEYNMAN, NUMBERS, _words(random.Random(1), size.long_words, size.long_words)],
        f"prefix {', '.join(map(str, size.prefixes))}": [text[:count] for count in size.prefixes],
    }
    for temperature in (0.0, 1.0):
        given = {"temperature": temperature, "seed": 42, "max_new_tokens": size.tokens}
        for name, prompts in kinds.items():
            seen: list[set[bytes]] = [set() for _ in prompts]
            draw, compared = random.Random(9), 0
            for count in range(1, size.trials + 1):
                chosen = [draw.randrange(len(prompts)) for _ in range(count)]
                found = await front.ask([_ask(f"number {i}", prompts[each], **given) for i, each in enumerate(chosen)])
                compared += count
                for i, each in enumerate(chosen):
                    seen[each].add(_key(found[f"number {i}"]))
            yield "SGLang", f"{name}, temperature {temperature:g}", compared, sum(max(0, len(each) - 1) for each in seen)


async def _radix(front: Front, size: Size) -> AsyncIterator[Row]:
    """Prefixes of one text by rising length, so that the one before is cached; then each again."""
    text = tokens(max(size.prefixes) + 64, 5)
    given = {"temperature": 1.0, "seed": 42, "max_new_tokens": size.tokens}
    lengths = sorted({each + more for each in size.prefixes for more in (0, 1, 63)})
    asks = [_ask(f"prefix of {length}", text[:length], **given) for length in lengths]
    first, again = await alone(front, asks), await alone(front, asks[::-1])
    yield "SGLang", "radix cache", len(asks), sum(_key(first[a.name]) != _key(again[a.name]) for a in asks)


TESTS: tuple[Callable[[Front, Size], AsyncIterator[Row]], ...] = (_needle, _logprobs, _prefill, _hot, _unique, _radix)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one service."""

    grade: str
    rows: Mapping[tuple[str, str], Row]
    seconds: float

    @property
    def violations(self) -> int:
        return sum(row[3] for row in self.rows.values())


async def score(engine: str, model: Path | None, state: Path, flags: Sequence[str]) -> Score:
    """All tests, of one service."""
    size = CPU if engine == "llama" else Size()
    found: dict[tuple[str, str], Row] = {}
    async with running(model, state, *flags, engine=engine) as stack:
        described = await stack.front.describe()
        say(f"== {' '.join(flags) or 'as it is'}: {grade(described)}: {described.grade_reason}")
        began = time.monotonic()
        for test in TESTS:
            async for row in test(stack.front, size):
                found[row[0], row[1].partition(", ")[0] if "cached" in row[1] else row[1]] = row
                say(f"   {row[0]} {row[1]}: {row[3]} of {row[2]}, {time.monotonic() - began:.0f} s")
    return Score(grade(described), found, time.monotonic() - began)


def table(ours: Mapping[tuple[str, str], Row], control: Mapping[tuple[str, str], Row]) -> list[str]:
    """In Markdown."""
    lines = ["| test | answers compared | violations | control |", "| --- | ---: | ---: | ---: |"]
    for key, (whose, name, compared, wrong) in ours.items():
        theirs = control.get(key)
        lines.append(f"| {whose} {name} | {compared:,} | {wrong} | {theirs[3] if theirs else ''} |")
    return lines


async def board(engine: str, model: Path | None, state: Path, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The table, with a last line for both services, and what is wrong."""
    ours = await score(engine, model, state, flags)
    control = await score(engine, model, state, (*flags, *CONTROLS[engine], "--self-test", "off"))
    lines = table(ours.rows, control.rows)
    told = f"{ours.grade}: {ours.violations} violations, {ours.seconds:.0f} s"
    lines.append(f"{told}; control: {control.violations}, {control.seconds:.0f} s")
    bad = [] if ours.grade == "EXACT" else [f"scoreboard: {ours.grade} was earned"]
    if ours.violations:
        bad.append(f"scoreboard: {ours.violations} violations")
    if not control.violations:
        bad.append("scoreboard: the control violates nothing, so that nothing was shown")
    return lines, bad


async def part(plan: Plan) -> None:
    """Of the GPU check."""
    lines, bad = await board(plan.engine, plan.model, plan.state, (*plan.flags, *CONTEXT))
    plan.lines += lines
    plan.bad += bad


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.scoreboard")
    parser.add_argument("model", type=Path, nargs="?", help="a folder; llama has one of its own")
    parser.add_argument("--engine", default="turbomind", choices=sorted(CONTROLS))
    parser.add_argument("--flags", default="", help="more flags of the service, in one text")
    given = parser.parse_args()
    flags = (*(CONTEXT if given.engine == "turbomind" else ()), *shlex.split(given.flags))
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as state:
        lines, bad = asyncio.run(board(given.engine, given.model, Path(state), flags))
    say("")
    for line in (*lines, *(f"BAD {text}" for text in bad)):
        say(line)
    sys.stdout.flush()
    os._exit(1 if bad else 0)


if __name__ == "__main__":
    main()
