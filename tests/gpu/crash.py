"""The service is killed under load, and afterwards the whole journal is run again."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter

from ostinato.client import Client
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.compare import alone, divergence, introduce
from tests.gpu.fronts import SidecarFront
from tests.gpu.plan import Plan, say
from tests.gpu.stack import START_SECONDS, Stack, running
from tests.gpu.traffic import mixed, plain

KILLS = 2
IN_FLIGHT = 4
"""Items that have to be under way before it is killed."""


async def crash(plan: Plan) -> None:
    """Kills under keyed load, some of it streamed: every answer comes, equal to the undisturbed one, and replays equal."""
    async with running(plan.model, plan.state, *plan.flags, sidecar=True, engine=plan.engine) as stack:
        model = await introduce(stack, "crash")
        reference = plan.reference or await alone(stack, plan)
        assert isinstance(stack.front, SidecarFront)
        stack.front.round = "crash"
        total = max(plan.totals[:2])
        everyone = mixed(reference.asks, total, seed=7, context_tokens=model.context_tokens)
        answering = asyncio.create_task(stack.front.ask(plain(everyone) if plan.engine == "scripted" else everyone))
        began = time.monotonic()
        for _ in range(KILLS):
            await _in_flight(stack, answering)
            await asyncio.to_thread(stack.service.kill)
            stack.service = stack.start_service()
            await asyncio.to_thread(stack.service.wait_for, "serving", START_SECONDS)
        answers = await answering
        tokens, bits = divergence(reference.answers, answers, [ask.name for ask in reference.asks])
        again = sum(attempt > 1 for attempt in stack.front.attempts.values())
        plan.tell(
            f"crash    {KILLS} kills in {time.monotonic() - began:.0f} s: {len(tokens)}+{len(bits)} of"
            f" {len(reference.asks)} differ, {again} of {len(everyone)} items run again"
        )
        broken = {name: str(answer)[:120] for name, answer in answers.items() if isinstance(answer, OstinatoError)}
        if broken:
            say(f"   {len(broken)} failed: {list(broken.items())[:3]}")
        if tokens or bits or not again:
            plan.bad.append(
                f"crash: {len(tokens)}+{len(bits)} differ after a kill {(tokens + bits)[:12]}; {again} were run again"
            )
        recovered = [
            line for line in _page(stack) if line.startswith("ostinato_comparisons_total") and 'kind="recovery"' in line
        ]
        if any('"diverged"' in line and not line.endswith(" 0.0") for line in recovered):
            plan.bad.append(f"crash: {recovered}")
        verdicts = await _replayed(stack)
        plan.tell(f"replay   of the whole journal: {dict(verdicts)}")
        if verdicts.keys() != {"MATCH"}:
            plan.bad.append(f"replay: {dict(verdicts)}")


async def _in_flight(stack: Stack, answering: asyncio.Task[object]) -> None:
    """Until the engine holds many of them and some are on their way."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not answering.done():
        if _sample(stack, "ostinato_inflight_items") >= IN_FLIGHT:
            await asyncio.sleep(0.3)
            return
        await asyncio.sleep(0.02)


async def _replayed(stack: Stack) -> Counter[str]:
    """Verdicts of the whole journal, by name; what could not run counts as its error's code."""
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


def _sample(stack: Stack, name: str) -> float:
    return sum(float(line.split()[-1]) for line in _page(stack) if line.startswith(name + " "))


def _page(stack: Stack) -> list[str]:
    assert stack.sidecar is not None
    port = stack.sidecar.wait_for("metrics")["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return [str(line) for line in page.read().decode().splitlines()]
