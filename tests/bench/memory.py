"""What the sidecar holds after many items."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path

from ostinato.client import Client

from tests.bench.table import Table, count
from tests.pair import Pair

ITEMS = 100_000
BATCH, CLIENTS, TOKENS = 20, 16, 16
PROMPTS = 4_000
"""Different ones: as many as the sidecar compares unseeded answers of, so that it remembers all that it can."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process, in MB."""

    now: float
    peak: float

    @classmethod
    def of(cls, pid: int) -> Memory:
        status = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status))
        return cls(int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024)


async def hold(items: int) -> tuple[Memory, Memory]:
    """The sidecar's memory before any work, and after so many items."""
    with Pair(sidecar=["--log-level", "info"]) as pair:
        await asyncio.to_thread(pair.start)
        assert pair.sidecar is not None
        before, numbers = Memory.of(pair.sidecar.pid), counting()
        async with Client(pair.target) as client:

            async def batches() -> None:
                while (number := next(numbers)) < items // BATCH:
                    prompts = [f"Prompt {(number * BATCH + position) % PROMPTS}" for position in range(BATCH)]
                    response = await client.generate(prompts, max_new_tokens=TOKENS, ignore_eos=True)
                    assert all(result.HasField("output") for result in response.results)

            await asyncio.gather(*(batches() for _ in range(CLIENTS)))
        return before, Memory.of(pair.sidecar.pid)


async def measure(items: int = ITEMS) -> Table:
    before, after = await hold(items)
    note = f"Unseeded items of {TOKENS} tokens in batches of {BATCH}, {PROMPTS} different prompts, {CLIENTS} clients."
    table = Table("Memory of the sidecar, resident", ["", "MB"], note)
    table.rows.append(["ready, before any work", count(before.now)])
    table.rows.append([f"after {items:,} items", count(after.now)])
    table.rows.append(["at its peak", count(after.peak)])
    return table
