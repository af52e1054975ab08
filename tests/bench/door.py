"""What the sidecar adds at a given pace, and the most that it passes on: single items, batches, streamed tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from ostinato.client import Client

from tests.bench.loop import Round, closed_loop, middle, summary
from tests.bench.overhead import PROMPT, TOKENS, Direct, Seen, Way, one_round, unary
from tests.bench.table import Table, count, median, millis
from tests.pair import Pair, Program

PACES = (50, 200, 500)
FAN_ITEMS, FAN_TOKENS = 64, 256
"""Of a streamed request."""


async def measure(rounds: int, seconds: float) -> list[Table]:
    """All in turn; the engine alone is driven over an Execute stream of another service."""
    with Pair() as through, Pair() as alone:
        await asyncio.to_thread(through.start)
        bare: Program = await asyncio.to_thread(alone.start_service)
        await asyncio.to_thread(bare.wait_for, "serving")
        assert through.service is not None and through.sidecar is not None
        programs = through.service, through.sidecar
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(Client(through.target))
            direct = await stack.enter_async_context(Direct(alone.engine_address))
            engine = Way("engine alone", lambda: direct.run(stream=False), bare)
            single = Way("single items", lambda: unary(client, 1), *programs)
            await closed_loop(8, 0.5, engine.request)
            await closed_loop(8, 0.5, single.request)
            paced = await _paces(engine, single, rounds, seconds)
            most = (
                (single, 64),
                (Way("batches of 64", lambda: unary(client, 64), *programs, items=64), 8),
                (Way(f"streams of {FAN_ITEMS} items", lambda: _fan(client), *programs, items=FAN_ITEMS), 4),
            )
            return [paced, await _saturation(most, rounds, seconds)]


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


async def _saturation(most: tuple[tuple[Way, int], ...], rounds: int, seconds: float) -> Table:
    note = f"{TOKENS} tokens an item; {FAN_TOKENS} where they are streamed, each token as soon as it is made."
    columns = ["", "clients", "items/s", "tokens/s", "sidecar ms/item", "sidecar µs/token", "service ms/item"]
    table = Table("The most that passes", columns, note)
    seen: dict[str, list[Seen]] = {}
    for _ in range(rounds):
        for way, clients in most:
            seen.setdefault(way.name, []).append(await one_round(way, clients, seconds))
    for way, clients in most:
        tokens = FAN_TOKENS if "streams" in way.name else TOKENS
        items = median([each.loop.per_second for each in seen[way.name]])
        sidecar = median([each.sidecar or 0.0 for each in seen[way.name]])
        service = median([each.service for each in seen[way.name]])
        cells = [count(items), count(items * tokens), millis(sidecar), f"{sidecar / tokens * 1e6:.3g}", millis(service)]
        table.rows.append([way.name, str(clients), *cells])
    return table
