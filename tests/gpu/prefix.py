"""The prefix cache: prompts with equal beginnings, compared with the same requests alone on a service without it.

ladder          prefixes of one text, with every rest; and siblings, which share a part of it
conversations   answers come back in prompts
producers       cancelled while others wait for their blocks
eviction        a cache so small that blocks are evicted and computed again
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ostinato.v1 import types_pb2

from service.engines.turbomind.overrides import RESUME
from tests.gpu.compare import divergence, grade, introduce
from tests.gpu.fronts import Answers, Front
from tests.gpu.plan import Plan, say
from tests.gpu.stack import Stack, running
from tests.gpu.traffic import Ask, ask_of, random_ids
from tests.pair import samples

NEW_TOKENS = 24
TEXT_TOKENS = 2000
RUNGS = (*range(60, 200), *range(255, 259), *range(511, 515), *range(1023, 1027), 1500, 1537, 1538)
LONG_RUNGS = (4095, 4096, 4097, 8191, 8192, 8193, 16001, 24001)
"""Only those that fit in the context."""
SHARED = (64, 65, 127, 128, 129, 130, 640, 641, 700)
"""Tokens that siblings share."""
SIBLINGS = 40
SYSTEM_TOKENS, USER_TOKENS = 500, 60
PRODUCERS, PRODUCER_TOKENS = 32, 3000
SMALL = ("--cache-fraction", "0.012", "--runs", "64")
"""Flags of a service with a small cache, for a model of 1 to 2 GB."""
FLOOD = 1.5
"""Tokens that are requested in between, as a multiple of the cache."""
FLOOD_TOKENS = 1500


@dataclass(frozen=True, slots=True)
class Size:
    """How many requests there are."""

    conversations: int = 64
    turns: int = 10
    rounds: int = 2
    few: bool = False
    """Every third rung only."""


def off(plan: Plan) -> tuple[str, ...]:
    """Flags of the service that makes the references."""
    return ("--prefix-cache", "off", "--self-test", "off") if plan.engine == "turbomind" else ()


def ladder(context_tokens: int, *, few: bool = False) -> list[Ask]:
    """Prompts with every rest, unordered; the siblings last."""
    text = tokens(max(TEXT_TOKENS, min(context_tokens, LONG_RUNGS[-1] + 1)), 3)
    lengths = [*RUNGS[:: 3 if few else 1], *LONG_RUNGS]
    lengths += [length for length in RUNGS if few and length % 64 < 2]
    asks = [_ask(f"rung {n}", text[:n], n) for n in sorted(set(lengths)) if n + NEW_TOKENS <= context_tokens]
    for number in range(SIBLINGS):
        draw = random.Random(100 + number)
        own = random_ids(draw, draw.randrange(1, 90))
        asks.append(_ask(f"sibling {number}", text[: SHARED[number % len(SHARED)]] + own, number))
    return asks


def tokens(count: int, seed: int) -> list[int]:
    return random_ids(random.Random(seed), count)


def _ask(name: str, ids: Sequence[int], seed: int, new: int = NEW_TOKENS) -> Ask:
    given = {"max_new_tokens": new, "ignore_eos": True, "logprobs": 5, "top_k": 40}
    return ask_of(name, ids, seed=seed, temperature=0.0 if seed % 4 == 3 else 0.9, **given)


async def alone(front: Front, asks: Sequence[Ask]) -> Answers:
    """The answers, one request at a time."""
    answers: Answers = {}
    for ask in asks:
        answers |= await front.ask([ask])
    return answers


async def converse(front: Front, size: Size, *, by_one: bool, new: int = NEW_TOKENS, logprobs: int | None = 5) -> Answers:
    """Every conversation's turns, one request at a time or all conversations at once; `front.seconds` is that of all turns."""
    histories = {number: tokens(SYSTEM_TOKENS, 1) for number in range(size.conversations)}
    answers: Answers = {}
    seconds = 0.0
    for turn in range(size.turns):
        asks = {}
        for number, history in histories.items():
            said = history + tokens(USER_TOKENS + number % 7, 1000 * number + turn)
            asks[number] = _ask(f"{number}, turn {turn}", said, 1000 * number + turn, new + (13 * number + turn) % 11)
            asks[number].item.parameters.ClearField("logprobs")
            if logprobs is not None:
                asks[number].item.parameters.logprobs = logprobs
        began = time.monotonic()
        found = await alone(front, list(asks.values())) if by_one else await front.ask(list(asks.values()))
        seconds += time.monotonic() - began if by_one else front.seconds
        for number, ask in asks.items():
            answer = found[ask.name]
            assert isinstance(answer, types_pb2.Output), f"turn {ask.name}: {answer}"
            histories[number] = [*ask.item.token_ids.ids, *answer.token_ids]
        answers |= found
    front.seconds = seconds
    return answers


def producers(seed: int) -> tuple[list[Ask], list[Ask]]:
    """Long prompts that are cancelled while they run, and prompts that share their beginnings."""
    draw = random.Random(seed)
    leaving, staying = [], []
    for number in range(PRODUCERS):
        text = tokens(PRODUCER_TOKENS, 1000 * seed + number)
        after = 0.3 * draw.random()
        cancelled = _ask(f"producer {seed}-{number}", text, number)
        leaving.append(replace(cancelled, after=after, leaves=True, leaves_after=0.15 * draw.random()))
        for place, shared in enumerate((PRODUCER_TOKENS, 64 * draw.randrange(1, 46) + draw.choice((0, 1, 2, 63)))):
            ids = text[:shared] + tokens(draw.randrange(1, 80) if place == 0 else 0, 77_000 + number)
            ask = _ask(f"follower {seed}-{number}-{place}", ids, number)
            staying.append(replace(ask, after=after + 0.15 * draw.random()))
    return leaving, staying


class Check:
    """Compares a service with a prefix cache with references made without one."""

    def __init__(self, plan: Plan, title: str, *, must_match: bool = True) -> None:
        self._plan, self._title, self._must_match = plan, title, must_match
        self.cells: list[str] = []
        self.differed = 0

    def compare(self, what: str, expected: Answers, actual: Answers) -> None:
        """Adds a cell. A difference is an error if they must match."""
        found, bits = divergence(expected, actual, list(expected))
        cached = sum(answer.cached_tokens for answer in actual.values() if isinstance(answer, types_pb2.Output))
        self.cells.append(f"{what} {len(found)}+{len(bits)} of {len(expected)}")
        told = f"{len(found)} differ in tokens {found[:8]}, {len(bits)} in logprob bits only {bits[:8]}"
        say(f"   {what}: {told}, {cached} prompt tokens from the cache")
        self.differed += len(found) + len(bits)
        if (found or bits) and self._must_match:
            self._plan.bad.append(f"{self._title}: {self.cells[-1]} diverged {(found + bits)[:8]}")

    async def ladder(self, front: Front, expected: Answers, asks: Sequence[Ask], rounds: int) -> None:
        """Alone twice, then all at once in shuffled orders."""
        for number in range(rounds):
            self.compare(f"ladder alone, round {number + 1}", expected, await alone(front, asks))
        for number in range(rounds):
            shuffled = list(asks)
            random.Random(number).shuffle(shuffled)
            self.compare(f"ladder together, round {number + 1}", expected, await front.ask(shuffled))


async def prefix(plan: Plan, size: Size | None = None) -> None:
    """Ladder, conversations, cancelled producers and the control, of one model."""
    size = size or Size()
    rounds = size.rounds
    followers = [producers(seed) for seed in range(1, rounds + 1)]
    async with running(plan.model, plan.state, *plan.flags, *off(plan), engine=plan.engine) as stack:
        model = await introduce(stack, "without a prefix cache")
        began = time.monotonic()
        asks = ladder(model.context_tokens, few=size.few)
        expected = await alone(stack.front, asks)
        talked = await converse(stack.front, size, by_one=True)
        followed = await alone(stack.front, [ask for _, staying in followers for ask in staying])
        say(f"   references: {len(expected) + len(talked) + len(followed)} alone in {time.monotonic() - began:.0f} s")
    check = Check(plan, "prefix")
    async with running(plan.model, plan.state, "--self-test", "full", *plan.flags, engine=plan.engine) as stack:
        model = await introduce(stack, "with its prefix cache")
        on_plan(plan, model)
        await check.ladder(stack.front, expected, asks, rounds)
        for number in range(rounds):
            began = time.monotonic()
            check.compare(f"conversations, round {number + 1}", talked, await converse(stack.front, size, by_one=False))
            say(f"   {time.monotonic() - began:.1f} s")
        for leaving, staying in followers:
            answers = await stack.front.ask([*leaving, *staying])
            check.compare("behind cancelled producers", {ask.name: followed[ask.name] for ask in staying}, answers)
        plan.tell(f"prefix   {'; '.join(check.cells)}")
        plan.tell(f"prefix   {counters(stack)}")
        if (await stack.front.describe()).grade != model.grade:
            plan.bad.append("prefix: the grade was lost on the way")
    if plan.engine == "turbomind":
        await control(plan, expected, asks)


async def control(plan: Plan, expected: Answers, asks: Sequence[Ask]) -> None:
    """The control: without the override something must differ."""
    check = Check(plan, "without the override", must_match=False)
    omit = {"OSTINATO_TURBOMIND_OMIT": RESUME}
    async with running(plan.model, plan.state, *plan.flags, env=omit, engine=plan.engine) as stack:
        model = await introduce(stack, "without the override resume")
        await check.ladder(stack.front, expected, asks, 1)
    plan.tell(f"control  without the override {grade(model)}; {'; '.join(check.cells)}")
    if not check.differed:
        plan.bad.append("prefix: without the override nothing differs, so that EXACT shows nothing here")


def on_plan(plan: Plan, model: types_pb2.Model) -> None:
    """Checks that the cache is on and the grade is EXACT, or the comparison shows nothing."""
    told = f"{grade(model)}, prefix_cache {model.fingerprint.fields.get('prefix_cache')}: {model.grade_reason}"
    if plan.engine == "turbomind" and model.fingerprint.fields.get("prefix_cache") != "on":
        plan.bad.append(f"prefix: the cache is not on: {told}")
    if model.grade != types_pb2.GRADE_EXACT:
        plan.bad.append(f"prefix: the self-test earns no EXACT: {told}")


async def evict(plan: Plan) -> None:
    """Blocks are evicted and computed again: of a prompt that is repeated much later nothing is cached, and of one that is
    repeated at once all is."""
    async with running(plan.model, plan.state, *plan.flags, *SMALL, *off(plan), engine=plan.engine) as stack:
        model = await introduce(stack, "small, without a prefix cache")
        asks = ladder(min(model.context_tokens, 4096), few=True)
        expected = await alone(stack.front, asks)
    check = Check(plan, "eviction")
    async with running(plan.model, plan.state, *plan.flags, *SMALL, engine=plan.engine) as stack:
        model = await introduce(stack, "small, with its prefix cache")
        on_plan(plan, model)
        await check.ladder(stack.front, expected, asks, 1)
        held = next(
            (int(str(record["blocks"])) for record in stack.service.records() if record.get("message") == "KV cache"), 0
        )
        for number in range(2):
            count = int(FLOOD * 64 * (held + 64)) // FLOOD_TOKENS + 1
            flood = [_ask(f"flood {number}-{i}", tokens(FLOOD_TOKENS, 9000 + 500 * number + i), i, 2) for i in range(count)]
            await stack.front.ask(flood)
            gone = await stack.front.ask([asks[-1 - SIBLINGS]])
            back = await stack.front.ask([asks[-1 - SIBLINGS]])
            seen = [answer.cached_tokens for answer in (*gone.values(), *back.values()) if isinstance(answer, types_pb2.Output)]
            plan.tell(
                f"evicted  {held} blocks, behind {count} prompts of {FLOOD_TOKENS}: of a rung {seen[0]} cached, again {seen[1]}"
            )
            if seen[0] or not seen[1]:
                plan.bad.append(f"eviction: {seen} cached tokens show none")
            shuffled = list(asks)
            random.Random(number).shuffle(shuffled)
            check.compare(f"after eviction {number + 1}", expected, await stack.front.ask([*shuffled, *flood[:8]]))
        plan.tell(f"evicted  {'; '.join(check.cells)}; {counters(stack)}")
        if (await stack.front.describe()).grade != model.grade:
            plan.bad.append("eviction: the grade was lost on the way")


COUNTED = ("lmdeploy_cached_tokens_total", "ostinato_engine_preemptions_total", "ostinato_engine_override_corrected_total")


def counters(stack: Stack) -> dict[str, int]:
    """As Prometheus sees them."""
    return {name: int(value) for name, value in samples(stack.metrics_port).items() if name.startswith(COUNTED)}
