"""How long running streams wait for their next token while a long prompt is computed."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from tests.gpu.compare import introduce
from tests.gpu.fronts import ServiceFront
from tests.gpu.plan import Plan
from tests.gpu.stack import running
from tests.gpu.traffic import Ask, ask_of, random_ids

CONTEXT_TOKENS, LONG_TOKENS, SHORT_TOKENS = 32_768, 32_000, 40
STREAMS, NEW_TOKENS = 32, 420
AFTER_SECONDS = 1.2
"""The long prompt comes when all streams run."""
GAP_SECONDS_MAX = 0.2
"""For a model of 8B."""
ROUNDS = 2


def asks(number: int) -> tuple[list[Ask], Ask, Ask]:
    """Streams, the long prompt, and a short one right behind it; no two of all rounds begin alike."""
    draw = random.Random(number)

    def made(name: str, tokens: int, new: int, after: float) -> Ask:
        given = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0.9, "top_k": 40, "seed": number}
        return replace(ask_of(name, random_ids(draw, tokens), **given), after=after, streams=True)

    streams = [made(f"stream {index}", 24, NEW_TOKENS, 0.0) for index in range(STREAMS)]
    return streams, made("long", LONG_TOKENS, 2, AFTER_SECONDS), made("short", SHORT_TOKENS, 2, AFTER_SECONDS + 0.02)


async def gap(plan: Plan) -> None:
    """With the prefix cache and without it, the best of a few rounds."""
    for cache in ("on", "off"):
        flags = (*plan.flags, "--context-tokens", str(CONTEXT_TOKENS), "--prefix-cache", cache, "--self-test", "off")
        async with running(plan.model, plan.state, *flags, engine=plan.engine) as stack:
            await introduce(stack, f"long prompts, prefix cache {cache}")
            front = stack.front
            assert isinstance(front, ServiceFront), "the service is asked at its own stream"
            found = [await _round(front, number) for number in range(ROUNDS + 1)][1:]
        worst, first, behind = (min(each) for each in zip(*found, strict=True))
        plan.tell(
            f"gap      prefix cache {cache}: {1000 * worst:.0f} ms between tokens of {STREAMS} streams behind a prompt of"
            f" {LONG_TOKENS:,}; its first token after {1000 * first:.0f} ms, that of {SHORT_TOKENS} tokens sent next after"
            f" {1000 * behind:.0f} ms"
        )
        if worst > GAP_SECONDS_MAX:
            plan.bad.append(f"gap: {1000 * worst:.0f} ms, more than {1000 * GAP_SECONDS_MAX:.0f}")


async def _round(front: ServiceFront, number: int) -> tuple[float, float, float]:
    """Seconds: the worst gap of all streams, and to the first tokens of the long prompt and of the short one behind it."""
    streams, long, short = asks(number)
    await front.ask([*streams, long, short])
    gaps = [after - before for ask in streams for before, after in pairwise(front.arrivals[ask.name])]
    firsts = [front.arrivals[ask.name][0] - ask.after for ask in (long, short)]
    return max(gaps), firsts[0], firsts[1]
