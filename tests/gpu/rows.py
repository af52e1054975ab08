"""`python -m tests.gpu.rows MODEL FOLDER`: many models and settings, two starts and one line each.

MODEL is a small, real model: it is a row itself, and the shapes use its tokenizer. Shapes are made in FOLDER, the next
one while a row runs, and removed after their last row. Every row has the self-test's grade; 32 targets alone without a
prefix cache, compared with those among 64 and among 256 with one; and prompts with equal beginnings and every rest,
alone and all at once.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ostinato.v1 import types_pb2

from tests.gpu import prefix, shapes
from tests.gpu.compare import alone, grade, introduce, together
from tests.gpu.parts import fingerprint, overrides_of
from tests.gpu.plan import Plan, Reference, arguments, conclude, names, plan_of, say, why
from tests.gpu.shapes import Making
from tests.gpu.stack import Stack, running

SEED = 4711
START_SECONDS = 240.0
"""Several times what the slowest row needs alone, so that a hanging row does not use up the others' time."""


@dataclass(frozen=True, slots=True)
class Row:
    """With an empty `shape`, MODEL itself."""

    name: str
    shape: str
    flags: str = ""


ROWS = (
    Row("SmolLM2 bf16", "", "--dtype bfloat16"),
    Row("1b bf16", "llama-1b"),
    Row("1b fp16", "llama-1b", "--dtype float16"),
    Row("1b 8 parts", "llama-1b", "--attention-splits 8"),
    Row("1.7b bf16", "qwen3-1.7b"),
    Row("1.7b kv8", "qwen3-1.7b", "--kv-bits 8"),
    Row("1.7b kv4", "qwen3-1.7b", "--kv-bits 4"),
    Row("1.7b 16k", "qwen3-1.7b", "--context-tokens 16384"),
    Row("1.7b 16k 1 part", "qwen3-1.7b", "--context-tokens 16384 --attention-splits 1"),
    Row("1.7b 32k", "qwen3-1.7b", "--context-tokens 32768"),
    Row("moe 64x8", "qwen3-moe"),
    Row("moe 64x4", "qwen3-moe-64x4"),
    Row("moe 128x8", "qwen3-moe-128x8"),
    Row("moe 128x4", "qwen3-moe-128x4"),
    Row("moe shared", "qwen2-moe"),
    Row("moe fp8", "qwen3-moe-fp8"),
    Row("moe awq", "qwen3-moe-awq"),
    Row("gpt-oss", "gpt-oss"),
    Row("mla", "glm4-moe-lite"),
    Row("8b awq", "llama-8b-awq"),
    Row("8b fp8", "llama-8b-fp8"),
    Row("8b bf16", "llama-8b"),
    Row("8b gptq", "llama-8b-gptq"),
    Row("bias bf16", "qwen2-1.5b"),
    Row("SmolLM2 fp16", "", "--dtype float16"),
)
"""Rows of one shape are together if that saves making it again."""


async def nothing() -> None:
    pass


async def measure(plan: Plan, title: str, once_up: Callable[[], Awaitable[None]] = nothing) -> tuple[Reference, str]:
    """One line from two starts: the answers of targets, and of prompts with equal beginnings, alone without a prefix cache,
    compared with those of a service with one. Adds to `plan.bad` what is wrong for an EXACT service."""
    began = time.monotonic()
    async with running(
        plan.model, plan.state, *plan.flags, *prefix.off(plan), engine=plan.engine, start_seconds=START_SECONDS
    ) as stack:
        model = await introduce(stack, f"{title}, without a prefix cache")
        await once_up()
        reference = await alone(stack, plan)
        asks = prefix.ladder(model.context_tokens, few=True)
        expected = await prefix.alone(stack.front, asks)
    async with running(plan.model, plan.state, *plan.flags, engine=plan.engine, start_seconds=START_SECONDS) as stack:
        model = await introduce(stack, title)
        reference = replace(reference, model=model)
        cells = await among(stack, reference, plan, title)
        check = prefix.Check(plan, title, must_match=model.grade == types_pb2.GRADE_EXACT)
        await check.ladder(stack.front, expected, asks, 1)
        cells += [
            f"{check.differed} on the ladder",
            str(prefix.counters(stack).get("lmdeploy_cached_tokens_total", 0)) + " cached",
        ]
    dtype = model.fingerprint.fields.get("dtype", "")
    reason = "" if model.grade == types_pb2.GRADE_EXACT else f" ({model.grade_reason[:110]})"
    diverged = f"of {len(reference.asks)} diverged {', '.join(cells)}"
    line = (
        f"{title:16} {dtype:8} {' '.join(plan.flags):32} {grade(model):11} {diverged:40}"
        f" digest {reference.digest} fingerprint {fingerprint(model)}, {time.monotonic() - began:.0f} s{reason}"
    )
    return reference, line


async def among(stack: Stack, reference: Reference, plan: Plan, title: str) -> list[str]:
    """For each total, how many diverged. An error ends it; the results so far are kept."""
    cells = []
    promised = reference.model.grade
    try:
        for total in plan.totals:
            if plan.late():
                cells.append(f"{total}: no time")
                continue
            tokens, bits = await together(stack.front, reference, total, SEED + total, plan)
            cells.append(f"{total}: {tokens}+{bits}")
            if (tokens or bits) and promised == types_pb2.GRADE_EXACT:
                plan.bad.append(f"{title}: {tokens}+{bits} diverged among {total}, and it says EXACT")
        say(f"   {overrides_of(stack)}")
        after = await stack.front.describe()
        if after.grade != promised:
            plan.bad.append(f"{title}: {grade(reference.model)} was lost on the way: {after.grade_reason}")
    except Exception as error:  # noqa: BLE001  # likewise
        plan.bad.append(f"{title}: {why(error)}")
        cells.append("then it FAILED")
    return cells


async def rows(plan: Plan, chosen: Sequence[Row], folder: Path, *, at_once: int = 1, layers: int = 0) -> None:
    """Runs rows while there is time, `at_once` at a time. The shapes of the next ones are made meanwhile."""
    making: dict[str, Making] = {}
    left, lock = Counter(row.shape for row in chosen), asyncio.Lock()
    waiting = deque(chosen)

    async def begin(*those: Row) -> None:
        async with lock:
            for row in those:
                if row.shape and row.shape not in making and plan.engine == "turbomind":
                    making[row.shape] = await shapes.begin(row.shape, plan.model, folder, layers)

    async def work() -> None:
        while waiting:
            row = waiting.popleft()
            if plan.late():
                plan.lines.append(f"{row.name:16} no time")
                continue
            try:
                await begin(row)
                model = await making[row.shape].ready() if row.shape in making else plan.model
                flags = tuple(shlex.split(row.flags)) if plan.engine == "turbomind" else ()
                own = Plan(
                    model, plan.state, (*plan.flags, *flags), plan.engine, plan.targets, plan.new_tokens, plan.totals,
                    deadline=plan.deadline, bad=plan.bad,
                )  # fmt: skip
                _, line = await measure(own, row.name, partial(begin, *list(waiting)[:1]))
            except Exception as error:  # noqa: BLE001  # a row that cannot be had says so, and the next one goes on
                line = f"{row.name:16} CANNOT: {why(error)}"
                plan.bad.append(line)
            plan.tell(line)
            left[row.shape] -= 1
            if row.shape in making and not left[row.shape]:
                await making.pop(row.shape).remove()

    await asyncio.gather(*(work() for _ in range(at_once)))
    for unused in making.values():
        await unused.remove()


def main() -> None:
    parser = arguments("python -m tests.gpu.rows")
    parser.add_argument("folder", type=Path, help="where shapes are made: room for two, 25 GB")
    parser.add_argument("--at-once", type=int, default=1, help="rows that run side by side; give each a --cache-fraction")
    parser.add_argument("--layers", type=int, default=0, help="of the shapes, for less time; 0: as many as they have")
    parser.add_argument("--rows", type=names, default=(), help=f"of {', '.join(row.name for row in ROWS)}; none: all")
    given, began = parser.parse_args(), time.monotonic()
    if unknown := set(given.rows) - {row.name for row in ROWS}:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: unknown")
    chosen = [row for row in ROWS if not given.rows or row.name in given.rows]
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as state:
        plan = plan_of(given, state)
        asyncio.run(rows(plan, chosen, given.folder, at_once=given.at_once, layers=given.layers))
        code = conclude(began, plan)
    os._exit(code)


if __name__ == "__main__":
    main()
