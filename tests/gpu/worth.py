"""The gain of the prefix cache: requests with one system prompt, and conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ostinato.errors import OstinatoError

from tests.gpu.fronts import Front
from tests.gpu.plan import Plan, say
from tests.gpu.prefix import Size, converse, tokens
from tests.gpu.traffic import Ask, ask_of, random_ids

SYSTEM_TOKENS, OWN_TOKENS, NEW_TOKENS = 3000, 64, 64
REQUESTS = 256
ALONE = 8
CONVERSATION = Size(conversations=64, turns=10)
ANSWER_TOKENS = 100
SHARED, FIRST, TURNS = "shared prompt", "its first token", "conversation"
CELLS = {SHARED: "requests/s", FIRST: "1/s, alone", TURNS: "turns/s"}


def asks(name: str, count: int, new_tokens: int) -> list[Ask]:
    """Requests with the same system prompt and different rests."""
    system = tokens(SYSTEM_TOKENS, 7)
    found = []
    for number in range(count):
        ids = system + random_ids(random.Random(f"{name} {number}"), OWN_TOKENS)
        given = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0.9, "top_k": 40, "seed": number}
        found.append(ask_of(f"{name} {number}", ids, **given))
    return found


async def worth(front: Front, plan: Plan, title: str) -> dict[str, float]:
    """By cell, the best of `plan.trials` rounds; more is better."""
    found: dict[str, float] = {}
    context_tokens = (await front.describe()).context_tokens
    if plan.late() or context_tokens < SYSTEM_TOKENS + OWN_TOKENS + NEW_TOKENS:
        return found
    for number in range(2):
        await _timed(front, asks(f"warm-up {number}", 2, 4), plan, title)
    seconds = [await _timed(front, asks(f"round {number}", REQUESTS, NEW_TOKENS), plan, title) for number in range(plan.trials)]
    found[SHARED] = REQUESTS / min(seconds)
    firsts = [await _timed(front, asks(f"first {number}", 1, 1), plan, title) for number in range(ALONE)]
    found[FIRST] = 1 / min(firsts)
    talks: list[float] = []
    if not plan.late():
        for _ in range(max(2, plan.trials // 2)):
            await converse(front, CONVERSATION, by_one=False, new=ANSWER_TOKENS, logprobs=None)
            talks.append(front.seconds)
        found[TURNS] = CONVERSATION.conversations * CONVERSATION.turns / min(talks)
    say(
        f"   {title}: {SHARED} {found[SHARED]:.1f} requests/s of {[round(each, 2) for each in seconds]} s,"
        f" first token alone {1000 * min(firsts):.1f} ms, {TURNS} {found.get(TURNS, 0):.1f} turns/s of"
        f" {[round(each, 2) for each in talks]} s"
    )
    return found


async def _timed(front: Front, those: Sequence[Ask], plan: Plan, title: str) -> float:
    answers = await front.ask(those)
    failed = [str(answer) for answer in answers.values() if isinstance(answer, OstinatoError)]
    if failed:
        plan.bad.append(f"{title}: {len(failed)} of {len(those)} behind a shared prompt failed: {failed[0][:200]}")
    return front.seconds


def table(rates: dict[str, dict[str, float]]) -> list[str]:
    """EXACT and the bare pipeline side by side, with the ratio."""
    ours, bare = rates.get("exact worth", {}), rates.get("bare worth", {})
    return [
        f"worth    {cell:16} {ours[cell]:9.1f} {bare[cell]:9.1f} {unit:12} EXACT/bare {ours[cell] / bare[cell]:.3f}"
        for cell, unit in CELLS.items()
        if cell in ours and cell in bare
    ]
