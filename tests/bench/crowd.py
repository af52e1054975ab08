"""What the sidecar holds and does while so many requests are open and nothing else happens."""

from __future__ import annotations

import asyncio
import json

from ostinato.client import Client

from tests.bench.memory import Memory
from tests.bench.overhead import processor_seconds
from tests.bench.table import Table, count
from tests.pair import Pair, Program

CROWDS = (10, 1_000, 10_000)
SCRIPT = json.dumps({"rules": [{"do": "hang"}]})
DEADLINE_SECONDS, IDLE_SECONDS = 600.0, 10.0


async def measure() -> Table:
    """More and more requests on one pair, whose engine never ends one."""
    note = (
        "Requests of one item with a deadline, most of which wait for the engine. Leaving: all their callers go at once; "
        "the outcomes are durable at the end of it."
    )
    table = Table("Open requests", ["open", "MB", "processor ms in an idle second", "leaving, processor ms a request"], note)
    flags = ["--script", SCRIPT, "--self-test", "off"]
    for crowd in CROWDS:
        with Pair(service=flags, sidecar=["--queue-items-max", "20000"]) as pair:
            await asyncio.to_thread(pair.start)
            assert pair.sidecar is not None
            async with Client(pair.target) as client:
                table.rows.append([f"{crowd:,}", *await _crowd(client, pair, pair.sidecar, crowd)])
    return table


async def _crowd(client: Client, pair: Pair, sidecar: Program, crowd: int) -> list[str]:
    calls = [asyncio.create_task(client.generate("Shanghai is", timeout=DEADLINE_SECONDS)) for _ in range(crowd)]
    await _until(pair, "ostinato_admitted_items_total", crowd)
    before = processor_seconds(sidecar)
    await asyncio.sleep(IDLE_SECONDS)
    idle = (processor_seconds(sidecar) - before) / IDLE_SECONDS
    memory, before = Memory.of(sidecar.pid).now, processor_seconds(sidecar)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await _until(pair, 'ostinato_ended_items_total{outcome="cancelled",reason="CANCELLED"}', crowd)
    leaving = (processor_seconds(sidecar) - before) / crowd
    return [count(memory), f"{idle * 1000:.3g}", f"{leaving * 1000:.3g}"]


async def _until(pair: Pair, sample: str, value: float) -> None:
    """Until a metric has this value. Raises TimeoutError."""
    async with asyncio.timeout(300):
        while (await asyncio.to_thread(pair.metrics)).get(sample, 0.0) < value:
            await asyncio.sleep(0.2)
