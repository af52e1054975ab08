"""Tokens per second: EXACT and stock over the service's stream, LMDeploy's bare pipeline, and the whole path."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence

from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.fronts import Answers, Front, SidecarFront
from tests.gpu.plan import Plan, say
from tests.gpu.stack import Stack, python
from tests.gpu.traffic import contexts, fillers, long_prompts

TOKENS = 192
"""Of each answer."""
PROMPTS, WORDS_EACH = 64, 1200
"""Of the prefill."""
CONTEXTS = {"4k x1": (3900, 1), "4k x16": (3900, 16), "16k x1": (16000, 1), "16k x4": (16000, 4)}
"""Prompt tokens and batch: decoding behind long prompts."""
SHORT, LONG = 2, 130
"""Tokens of two answers. The difference of their times is decoding only."""
PATH_TOKENS = 512
"""Of each answer on the whole path; long enough that the cost per call does not matter."""
BARE_SECONDS = 300.0
STREAMED = " streamed"
"""Suffix of cells in which all requests stream."""


async def measure(front: Front, plan: Plan, title: str) -> dict[str, float]:
    """By cell, the better of two. Only one cell streams."""
    found: dict[str, float] = {}
    await front.ask(fillers(4, 8))
    for batch in plan.batches:
        if plan.late():
            break
        found[str(batch)] = max([await _rate(front, batch, stream=False) for _ in range(2)])
    if not plan.late():
        largest = plan.batches[-1]
        found[f"{largest}{STREAMED}"] = await _rate(front, largest, stream=True)
        answers = await front.ask(long_prompts(PROMPTS, WORDS_EACH))
        found["prefill"] = sum(answer.prompt_tokens for answer in _outputs(answers)) / front.seconds
        if len(_outputs(answers)) != PROMPTS:
            plan.bad.append(f"{title}: {PROMPTS - len(_outputs(answers))} long prompts failed")
        found |= await _behind_long_prompts(front, plan, (await front.describe()).context_tokens)
    say(f"   {title} tokens/s: " + ", ".join(f"{key} {value:.0f}" for key, value in found.items()))
    return found


async def _rate(front: Front, batch: int, *, stream: bool) -> float:
    answers = await front.ask(fillers(batch, TOKENS), stream=stream)
    return sum(len(answer.token_ids) for answer in _outputs(answers)) / front.seconds


async def _behind_long_prompts(front: Front, plan: Plan, context_tokens: int) -> dict[str, float]:
    found = {}
    for cell, (tokens, batch) in CONTEXTS.items():
        if plan.late() or tokens + LONG > context_tokens:
            continue
        seconds = {}
        for new in (SHORT, LONG):
            best = math.inf
            for _ in range(2):
                await front.ask(contexts(batch, tokens, new))
                best = min(best, front.seconds)
            seconds[new] = best
        found[cell] = batch * (LONG - SHORT) / max(seconds[LONG] - seconds[SHORT], 1e-9)
    return found


def _outputs(answers: Answers) -> list[types_pb2.Output]:
    return [answer for answer in answers.values() if not isinstance(answer, OstinatoError)]


async def bare(plan: Plan, parts: Sequence[str]) -> None:
    """Measures LMDeploy's own pipeline in another process: "speed", "worth" or both."""
    batches = ",".join(map(str, plan.batches))
    arguments = ["-m", "tests.gpu.bare", str(plan.model), "--batches", batches, "--parts", ",".join(parts)]
    arguments += ["--trials", str(plan.trials), *plan.flags]
    process = await python(*arguments)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), BARE_SECONDS)
    except TimeoutError:
        process.kill()
        raise
    lines = output.decode(errors="replace").replace("\r", "\n").splitlines()
    told = [line for line in lines if line.startswith('{"bare"')]
    if not told:
        raise AssertionError("the bare pipeline measured nothing:\n" + "\n".join(lines[-30:]))
    found = json.loads(told[-1])
    say(
        f"== bare pipeline: {found['bare']}, up after {found['started_seconds']:.1f} s, detokenises by itself: {found['rates']}"
    )
    say("\n".join(line for line in lines if line.startswith("   bare")))
    plan.rates["bare"], plan.rates["bare worth"] = found["rates"], found["worth"]
    plan.bad += found["bad"]


def table(rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    """EXACT / stock service / bare pipeline, EXACT's ratio to both, and the geometric means of the ratios: without those of
    streams, where the pipeline's own detokenising decides."""
    if "exact" not in rates:
        return []
    lines = [f"speed    {'tokens/s':>12} {'EXACT':>9} {'stock':>9} {'bare':>9}   EXACT/stock EXACT/bare"]
    ratios: dict[str, list[float]] = {"stock": [], "bare": []}
    for cell, ours in rates["exact"].items():
        shown = []
        for other in ratios:
            theirs = rates.get(other, {}).get(cell)
            if theirs and not cell.endswith(STREAMED):
                ratios[other].append(ours / theirs)
            shown.append((f"{theirs:9.0f}", f"{ours / theirs:.2f}") if theirs else ("        -", "-"))
        lines.append(f"speed    {cell:>12} {ours:9.0f} {shown[0][0]} {shown[1][0]}   {shown[0][1]:>11} {shown[1][1]:>10}")
    means = [f"{_geometric(each):.3f}" if each else "-" for each in ratios.values()]
    lines.append(f"speed    {'geom. mean':>12} {'':29}   {means[0]:>11} {means[1]:>10}")
    return lines


def _geometric(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


async def path(stack: Stack, plan: Plan, title: str) -> None:
    """One large batch, three times, driven directly or through client, sidecar and journal, with the processor time of each
    program."""
    asks = fillers(plan.batches[-1], PATH_TOKENS)
    best, told = 0.0, ""
    for _ in range(3):
        before, began = stack.processor_seconds(), time.monotonic()
        if isinstance(stack.front, SidecarFront):
            response = await stack.front.client.generate([ask.item for ask in asks], timeout=300.0)
            made = sum(len(result.output.token_ids) for result in response.results)
            seconds = time.monotonic() - began
        else:
            made = sum(len(answer.token_ids) for answer in _outputs(await stack.front.ask(asks)))
            seconds = stack.front.seconds
        if made / seconds > best:
            best, after = made / seconds, stack.processor_seconds()
            costs = (f"{name} {1e6 * (after[name] - before[name]) / max(made, 1):.2f}" for name in after)
            told = f"{made} tokens in {seconds:.2f} s; processor microseconds a token: {', '.join(costs)}"
    plan.rates.setdefault("path", {})[title] = best
    plan.tell(f"path     {title}, batch of {len(asks)}: {best:.0f} tokens/s, {told}")
