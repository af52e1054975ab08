"""Kills service and sidecar under load, and replays the whole journal on a warm and on a cold cache."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter

from ostinato.client import Client
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.compare import alone, divergence, introduce
from tests.gpu.fronts import Answers, SidecarFront
from tests.gpu.plan import Plan, say
from tests.gpu.prefix import alone as one_by_one
from tests.gpu.prefix import ladder, off
from tests.gpu.stack import START_SECONDS, Stack, running
from tests.gpu.traffic import Ask, mixed, plain
from tests.pair import samples

KILLS = 2
RECOVERED = re.compile(r"ostinato_comparisons_total(?=.*kind=\"recovery\")(?=.*\"diverged\")")
"""Items that ran again after a crash, with another answer."""
IN_FLIGHT = 4
"""Items that are running before the kill."""


async def crash(plan: Plan) -> None:
    """Kills under keyed load, partly streamed, partly with common beginnings. Every answer must come, be equal to the
    undisturbed one, and replay equal. With a prefix cache, the references are made without it."""
    reference = plan.reference
    shared: list[Ask] = []
    expected: Answers = {}
    if plan.engine == "turbomind":
        async with running(plan.model, plan.state, *plan.flags, *off(plan), engine=plan.engine) as stack:
            shared = ladder(min((await stack.front.describe()).context_tokens, 4096), few=True)
            reference, expected = await alone(stack, plan), await one_by_one(stack.front, shared)
    async with running(plan.model, plan.state, *plan.flags, sidecar=True, engine=plan.engine) as stack:
        model = await introduce(stack, "crash")
        reference = reference or await alone(stack, plan)
        expected |= reference.answers
        assert isinstance(stack.front, SidecarFront)
        total = max(plan.totals[:2])
        for what in ("service", "sidecar"):
            stack.front.round = f"killed {what}"
            stack.front.attempts.clear()
            everyone = mixed([*reference.asks, *shared], total + len(shared), seed=7, context_tokens=model.context_tokens)
            everyone = plain(everyone) if plan.engine == "scripted" else everyone
            answering = asyncio.create_task(stack.front.ask(everyone))
            began = time.monotonic()
            for _ in range(KILLS):
                await _in_flight(stack, answering)
                await asyncio.to_thread(_kill, stack, what)
            _judge(plan, stack, what, expected, await answering, len(everyone), time.monotonic() - began)
        verdicts = {"warm": await _replayed(stack)}
        connected = _connections(stack)
        await asyncio.to_thread(_kill, stack, "service")
        deadline = time.monotonic() + START_SECONDS
        while _connections(stack) == connected and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        verdicts["cold"] = await _replayed(stack)
        for cache, found in verdicts.items():
            plan.tell(f"replay   of the whole journal on a {cache} cache: {dict(found)}")
            if found.keys() != {"MATCH"}:
                plan.bad.append(f"replay on a {cache} cache: {dict(found)}")


def _kill(stack: Stack, what: str) -> None:
    """Kills a program and starts another one in its place."""
    if what == "service":
        stack.service.kill()
        stack.service = stack.start_service()
        stack.service.wait_for("serving", START_SECONDS)
    else:
        assert stack.sidecar is not None
        stack.sidecar.kill()
        stack.sidecar = stack.start_sidecar()
        stack.sidecar.wait_for("engine connected", 60.0)


def _connections(stack: Stack) -> int:
    assert stack.sidecar is not None
    return sum(record.get("message") == "engine connected" for record in stack.sidecar.records())


def _judge(plan: Plan, stack: Stack, what: str, expected: Answers, answers: Answers, count: int, seconds: float) -> None:
    """The answers of one round of kills."""
    assert isinstance(stack.front, SidecarFront)
    tokens, bits = divergence(expected, answers, list(expected))
    again = sum(attempt > 1 for attempt in stack.front.attempts.values())
    cached = sum(answer.cached_tokens for answer in answers.values() if isinstance(answer, types_pb2.Output))
    plan.tell(
        f"crash    {KILLS} kills of the {what} in {seconds:.0f} s: {len(tokens)}+{len(bits)} of {len(expected)} differ,"
        f" {again} of {count} items run again, {cached} prompt tokens from the cache"
    )
    broken = {name: str(answer)[:120] for name, answer in answers.items() if isinstance(answer, OstinatoError)}
    if broken:
        say(f"   {len(broken)} failed: {list(broken.items())[:3]}")
    if tokens or bits or not again:
        plan.bad.append(f"crash: {len(tokens)}+{len(bits)} differ after a kill {(tokens + bits)[:12]}; {again} were run again")
    recovered = {name: value for name, value in _samples(stack).items() if RECOVERED.match(name)}
    if any(recovered.values()):
        plan.bad.append(f"crash: {recovered}")


async def _in_flight(stack: Stack, answering: asyncio.Task[object]) -> None:
    """Waits until the engine runs many of them and some have ended."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not answering.done():
        if _samples(stack).get("ostinato_inflight_items", 0) >= IN_FLIGHT:
            await asyncio.sleep(0.3)
            return
        await asyncio.sleep(0.02)


async def _replayed(stack: Stack) -> Counter[str]:
    """Verdicts of the whole journal, counted by name; a failed run counts by its error code."""
    found = Counter[str]()
    async with Client(stack.public) as client:
        last = (await client.head()).last_sequence
        async for response in client.replay(1, last, concurrency=64):
            if response.passed_over:
                continue
            comparison = response.comparison
            name = types_pb2.Verdict.Name(comparison.verdict).removeprefix("VERDICT_")
            found[f"code {comparison.status.code}" if comparison.HasField("status") else name] += 1
    return found


def _samples(stack: Stack) -> dict[str, float]:
    assert stack.sidecar is not None
    return samples(int(str(stack.sidecar.wait_for("metrics")["port"])))
