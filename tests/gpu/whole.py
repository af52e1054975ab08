"""Both programs together: a service that is killed under load, the journal run again, and what the sidecar costs."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter

from ostinato.client import Client
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.parts import Plan, alone, digest, divergence, introduce, say
from tests.gpu.stack import START_SECONDS, SidecarFront, Stack, running
from tests.gpu.traffic import fillers, mixed, targets

PATH_TOKENS = 512
"""Of each answer: long enough that what a call costs once does not matter."""


async def crash(plan: Plan) -> list[str]:
    """The service is killed twice under keyed load: every answer comes, equal to the undisturbed one, and replays equal."""
    asks, total = targets(plan.targets), max(plan.totals[0], plan.targets)
    async with running(plan.model, plan.state, *plan.flags, sidecar=True, engine=plan.engine) as stack:
        await introduce(stack, "crash")
        expected = await alone(stack.front, asks)
        assert isinstance(stack.front, SidecarFront)
        stack.front.round = "crash"
        everyone = mixed(asks, total, seed=7)
        answering = asyncio.create_task(stack.front.ask(everyone))
        began = time.monotonic()
        for _ in range(2):
            await _in_flight(stack, answering)
            await asyncio.to_thread(stack.service.kill)
            stack.service = stack.start_service()
            await asyncio.to_thread(stack.service.wait_for, "serving", START_SECONDS)
        answers = await answering
        tokens, bits = divergence(expected, answers, [ask.name for ask in asks])
        again = sum(attempt > 1 for attempt in stack.front.attempts.values())
        say(f"   {len(everyone)} keyed items through two kills in {time.monotonic() - began:.1f} s, {again} of them run again")
        broken = {name: str(answer)[:120] for name, answer in answers.items() if isinstance(answer, OstinatoError)}
        if broken:
            say(f"   {len(broken)} failed: {list(broken.items())[:3]}")
        if tokens or bits or not again:
            plan.bad.append(f"crash: {len(tokens)}+{len(bits)} of {len(asks)} differ after a kill; {again} were run again")
        recovered = _comparisons(stack, "recovery")
        if any("diverged" in verdict for verdict in recovered):
            plan.bad.append(f"crash: {recovered}")
        verdicts = await _replayed(stack)
        if verdicts.keys() != {"MATCH"}:
            plan.bad.append(f"replay: {dict(verdicts)}")
        return [
            f"crash    {len(tokens)}+{len(bits)} of {len(asks)} differ, {again} items run again, digest {digest(expected)}",
            f"replay   of the whole journal: {dict(verdicts)}",
        ]


async def path(plan: Plan) -> list[str]:
    """One large batch: the engine driven directly, and by way of client, sidecar and journal, in turns."""
    batch, rates = plan.batches[-1], dict[str, float]()
    asks = fillers(batch, PATH_TOKENS)
    flags = ("--self-test", "off", *plan.flags)
    for title, sidecar in (("direct", False), ("whole", True)):
        async with running(plan.model, plan.state, *flags, sidecar=sidecar, engine=plan.engine) as stack:
            await introduce(stack, title)
            for _ in range(3):
                began = time.monotonic()
                if isinstance(stack.front, SidecarFront):
                    response = await stack.front.client.generate([ask.item for ask in asks], timeout=300.0)
                    made = sum(len(result.output.token_ids) for result in response.results)
                    seconds = time.monotonic() - began
                else:
                    answers = await stack.front.ask(asks)
                    made = sum(len(each.token_ids) for each in answers.values() if not isinstance(each, OstinatoError))
                    seconds = stack.front.seconds
                rates[title] = max(rates.get(title, 0.0), made / seconds)
    return [f"path     batch of {batch}: {rates['whole']:.0f} / {rates['direct']:.0f} = {rates['whole'] / rates['direct']:.2f}"]


async def _in_flight(stack: Stack, answering: asyncio.Task[object]) -> None:
    """Until the engine holds many of them and some are on their way."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not answering.done():
        if _sample(stack, "ostinato_inflight_items") >= 4:
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


def _comparisons(stack: Stack, kind: str) -> list[str]:
    return [line for line in _page(stack) if line.startswith("ostinato_comparisons_total") and f'kind="{kind}"' in line]


def _sample(stack: Stack, name: str) -> float:
    return sum(float(line.split()[-1]) for line in _page(stack) if line.startswith(name + " "))


def _page(stack: Stack) -> list[str]:
    assert stack.sidecar is not None
    port = stack.sidecar.wait_for("metrics")["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return [str(line) for line in page.read().decode().splitlines()]
