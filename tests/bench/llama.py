"""The CPU engine: starts, tokens a second, and the first token behind its prefix cache."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

from ostinato.client import Client

from tests.bench.table import Options, Table, count, median, millis
from tests.pair import Pair


def start_seconds(engine: str, state: Path | None = None) -> float:
    """One start of both, at once."""
    with Pair(engine=engine, state=state) as pair:
        began = time.perf_counter()
        pair.start()
        return time.perf_counter() - began


def starts(options: Options) -> list[Table]:
    """The llama engine once with an empty state directory each round, then with what that start has kept."""
    seen: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        seen.setdefault("scripted engine", []).append(start_seconds("scripted"))
        if options.llama:
            with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
                state = Path(folder)
                seen.setdefault("llama engine, first start: self-test", []).append(start_seconds("llama", state))
                seen.setdefault("llama engine, its proof kept", []).append(start_seconds("llama", state))
    table = Table("Start of both programs to ready, seconds", ["", "median", "worst"], f"{options.rounds} starts of each kind.")
    for name, all_seconds in seen.items():
        table.rows.append([name, count(median(all_seconds)), count(max(all_seconds))])
    return [table]


PROMPT, TOKENS = "Shanghai is a city", 64
ITEMS = (1, 8)


async def tokens(options: Options) -> list[Table]:
    """One request at a time, with one item and with several."""
    seen: dict[int, list[float]] = {}
    with Pair(engine="llama", service=["--self-test", "off"]) as pair:
        await asyncio.to_thread(pair.start)
        async with Client(pair.target) as client:
            model = await client.model()
            await client.generate(PROMPT, max_new_tokens=4)
            for _ in range(options.rounds):
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
    return [table]


PROMPT_TOKENS = 1000
IDS = range(1000, 40_000)


async def prefix(options: Options) -> list[Table]:
    """Each round a prompt of its own, asked three times at each of two pairs in turn."""
    note = (
        f"A prompt of {PROMPT_TOKENS:,} random tokens, streamed, alone; medians of {options.rounds} prompts, each asked again "
        "twice."
    )
    table = Table("First token on the CPU engine, ms", ["", "a new prompt", "the same prompt again"], note)
    new: dict[str, list[float]] = {"on": [], "off": []}
    again: dict[str, list[float]] = {"on": [], "off": []}
    on, off = (Pair(engine="llama", service=["--prefix-cache", each, "--self-test", "off"]) for each in ("on", "off"))
    with on, off:
        for pair in (on, off):
            await asyncio.to_thread(pair.start)
        for number in range(options.rounds):
            prompt = random.Random(number).choices(IDS, k=PROMPT_TOKENS)
            for cache, pair in (("on", on), ("off", off)):
                async with Client(pair.target) as client:
                    new[cache].append(await _first_token(client, prompt))
                    again[cache] += [await _first_token(client, prompt) for _ in range(2)]
    for cache in ("off", "on"):
        table.rows.append([f"--prefix-cache {cache}", millis(median(new[cache])), millis(median(again[cache]))])
    return [table]


async def _first_token(client: Client, prompt: list[int]) -> float:
    """Seconds."""
    began = time.perf_counter()
    async with aclosing(client.stream([prompt], max_new_tokens=2, ignore_eos=True)) as events:
        async for event in events:
            if event.HasField("tokens"):
                return time.perf_counter() - began
    raise AssertionError("no token came")
