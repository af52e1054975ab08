"""What the sidecar adds at a given pace, and the most that it passes on: single items, batches, streamed tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from ostinato.client import Client

from tests.bench.loop import Round, closed_loop, middle, summary
from tests.bench.overhead import PROMPT, TOKENS, Direct, Seen, Way, one_round, unary
from tests.bench.table import Table, count, median, millis
from tests.pair import ROOT, Pair, Program

PACES = (50, 200, 500)
FAN_ITEMS, FAN_TOKENS = 64, 256
"""Of a streamed request."""


async def measure(rounds: int, seconds: float, beside: Path | None) -> list[Table]:
    """All in turn; the engine alone is driven over an Execute stream of another service. `beside`: another checkout, whose
    programs are driven by the same client, in the same rounds."""
    async with AsyncExitStack() as stack:
        through = await _pair(stack, ROOT)
        alone = stack.enter_context(Pair())
        bare: Program = await asyncio.to_thread(alone.start_service)
        await asyncio.to_thread(bare.wait_for, "serving")
        direct = await stack.enter_async_context(Direct(alone.engine_address))
        engine = Way("engine alone", lambda: direct.run(stream=False), bare)
        await closed_loop(8, 0.5, engine.request)
        single, *_ = ways = await _ways(stack, through, "")
        paced = await _paces(engine, single[0], rounds, seconds)
        if beside is not None:
            others = await _ways(stack, await _pair(stack, beside), ", beside")
            ways = [way for both in zip(others, ways, strict=True) for way in both]
        return [paced, await _saturation(ways, rounds, seconds)]


async def _pair(stack: AsyncExitStack, root: Path) -> Pair:
    pair = stack.enter_context(Pair(root=root))
    await asyncio.to_thread(pair.start)
    return pair


async def _ways(stack: AsyncExitStack, pair: Pair, mark: str) -> list[tuple[Way, int]]:
    """What is sent through a pair, and by how many clients."""
    assert pair.service is not None and pair.sidecar is not None
    client, programs = await stack.enter_async_context(Client(pair.target)), (pair.service, pair.sidecar)
    ways = [
        (Way(f"single items{mark}", lambda: unary(client, 1), *programs), 64),
        (Way(f"single items{mark}", lambda: unary(client, 1), *programs), 1),
        (Way(f"batches of 64{mark}", lambda: unary(client, 64), *programs, items=64), 8),
        (Way(f"streams of {FAN_ITEMS} items{mark}", lambda: _fan(client), *programs, items=FAN_ITEMS), 4),
    ]
    for way, _ in ways:
        await closed_loop(8, 0.3, way.request)
    return ways


async def _fan(client: Client) -> None:
    async for _ in client.stream([PROMPT] * FAN_ITEMS, max_new_tokens=FAN_TOKENS, ignore_eos=True):
        pass


async def open_loop(per_second: int, seconds: float, request: Callable[[], Awaitable[object]]) -> Round:
    """Requests leave at random moments, however long those before them take."""
    taken, tasks, began = list[float](), list[asyncio.Task[None]](), time.perf_counter()

    async def one(due: float) -> None:
        await request()
        taken.append(time.perf_counter() - due)

    due, pace = began, random.Random(0)
    while (due := due + pace.expovariate(per_second)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(max(due, time.perf_counter()))))
    await asyncio.gather(*tasks)
    return summary(taken, time.perf_counter() - began)


async def _paces(engine: Way, single: Way, rounds: int, seconds: float) -> Table:
    note = (
        f"One item of {TOKENS} tokens in a request; requests leave at random moments, from one client. "
        "What is added is the difference of the medians."
    )
    columns = ["requests/s", "engine alone p50 ms", "p99 ms", "added p50 ms", "added p99 ms", "sidecar ms/item"]
    table = Table("What the sidecar adds", columns, note)
    for per_second in PACES:
        seen: dict[str, list[Seen]] = {engine.name: [], single.name: []}
        for _ in range(rounds):
            for way in (engine, single):
                seen[way.name].append(await one_round(way, per_second, seconds, open_loop))
        alone, through = (middle([each.loop for each in seen[way.name]]) for way in (engine, single))
        added = [millis(through.p50 - alone.p50), millis(through.p99 - alone.p99)]
        cost = median([each.sidecar or 0.0 for each in seen[single.name]])
        table.rows.append([str(per_second), millis(alone.p50), millis(alone.p99), *added, millis(cost)])
    return table


async def _saturation(ways: Sequence[tuple[Way, int]], rounds: int, seconds: float) -> Table:
    note = (
        f"{TOKENS} tokens an item; {FAN_TOKENS} where they are streamed, each token as soon as it is made. Processor time is "
        "that of all three programs, the client's with them."
    )
    columns = ["", "clients", "items/s", "tokens/s", "sidecar ms/item", "service ms/item", "client ms/item", "all, ms/item"]
    table = Table("The most that passes", columns, note)
    seen: dict[tuple[str, int], list[Seen]] = {}
    for number in range(rounds):
        for way, clients in ways[:: -1 if number % 2 else 1]:
            seen.setdefault((way.name, clients), []).append(await one_round(way, clients, seconds))
    for way, clients in ways:
        own, tokens = seen[way.name, clients], FAN_TOKENS if "streams" in way.name else TOKENS
        items = median([each.loop.per_second for each in own])
        costs = [median([getattr(each, name) for each in own]) for name in ("sidecar", "service", "client")]
        cells = [count(items), count(items * tokens), *map(millis, costs), millis(sum(costs))]
        table.rows.append([way.name, str(clients), *cells])
    return table
