"""The first token of a prompt that is new, and of one that came before, on the CPU engine with and without its prefix cache."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing

from ostinato.client import Client

from tests.bench.table import Table, median, millis
from tests.pair import Pair

PROMPT_TOKENS = 1000
IDS = range(1000, 40_000)


async def measure(rounds: int) -> Table:
    """Each round a prompt of its own, asked three times at each of two pairs in turn."""
    note = f"A prompt of {PROMPT_TOKENS:,} random tokens, streamed, alone; medians of {rounds} prompts, each asked again twice."
    table = Table("First token on the CPU engine, ms", ["", "a new prompt", "the same prompt again"], note)
    new: dict[str, list[float]] = {"on": [], "off": []}
    again: dict[str, list[float]] = {"on": [], "off": []}
    on, off = (Pair(engine="llama", service=["--prefix-cache", each, "--self-test", "off"]) for each in ("on", "off"))
    with on, off:
        for pair in (on, off):
            await asyncio.to_thread(pair.start)
        for number in range(rounds):
            prompt = random.Random(number).choices(IDS, k=PROMPT_TOKENS)
            for cache, pair in (("on", on), ("off", off)):
                async with Client(pair.target) as client:
                    new[cache].append(await _first_token(client, prompt))
                    again[cache] += [await _first_token(client, prompt) for _ in range(2)]
    for cache in ("off", "on"):
        table.rows.append([f"--prefix-cache {cache}", millis(median(new[cache])), millis(median(again[cache]))])
    return table


async def _first_token(client: Client, prompt: list[int]) -> float:
    """Seconds."""
    began = time.perf_counter()
    async with aclosing(client.stream([prompt], max_new_tokens=2, ignore_eos=True)) as events:
        async for event in events:
            if event.HasField("tokens"):
                return time.perf_counter() - began
    raise AssertionError("no token came")
