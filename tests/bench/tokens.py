"""Tokens a second of the llama engine, through the whole path."""

from __future__ import annotations

import asyncio
import time

from ostinato.client import Client

from tests.bench.table import Table, count, median
from tests.pair import Pair

PROMPT, TOKENS = "Shanghai is a city", 64
ITEMS = (1, 8)


async def measure(rounds: int) -> Table:
    """One request at a time, of so many items."""
    seen: dict[int, list[float]] = {}
    with Pair(engine="llama", service=["--self-test", "off"]) as pair:
        await asyncio.to_thread(pair.start)
        async with Client(pair.target) as client:
            model = await client.model()
            await client.generate(PROMPT, max_new_tokens=4)
            for _ in range(rounds):
                for items in ITEMS:
                    began = time.perf_counter()
                    await client.generate([PROMPT] * items, max_new_tokens=TOKENS, ignore_eos=True)
                    seen.setdefault(items, []).append(items * TOKENS / (time.perf_counter() - began))
    note = f"{TOKENS} tokens an item, prompt included in the time. Model {model.name}."
    table = Table(
        "Tokens of the llama engine through the whole path", ["items in the request", "tokens/s", "tokens/s an item"], note
    )
    for items, rates in seen.items():
        table.rows.append([str(items), count(median(rates)), count(median(rates) / items)])
    return table
