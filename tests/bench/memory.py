"""What a program holds: the sidecar after many items and with many open requests, and a bulk run of the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path

from ostinato.client import Client

from tests.bench.table import Options, Table, count, processor_seconds
from tests.pair import Pair, Program

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
    """The sidecar's memory before any work, and after these items."""
    with Pair(sidecar=["--log-level", "info"]) as pair:
        await asyncio.to_thread(pair.start)
        before, numbers = Memory.of(pair.sidecar.pid), counting()
        async with Client(pair.target) as client:

            async def batches() -> None:
                while (number := next(numbers)) < items // BATCH:
                    prompts = [f"Prompt {(number * BATCH + position) % PROMPTS}" for position in range(BATCH)]
                    response = await client.generate(prompts, max_new_tokens=TOKENS, ignore_eos=True)
                    assert all(result.HasField("output") for result in response.results)

            await asyncio.gather(*(batches() for _ in range(CLIENTS)))
        return before, Memory.of(pair.sidecar.pid)


async def memory(options: Options) -> list[Table]:
    before, after = await hold(options.items)
    note = f"Unseeded items of {TOKENS} tokens in batches of {BATCH}, {PROMPTS} different prompts, {CLIENTS} clients."
    table = Table("Memory of the sidecar, resident", ["", "MB"], note)
    table.rows.append(["ready, before any work", count(before.now)])
    table.rows.append([f"after {options.items:,} items", count(after.now)])
    table.rows.append(["at its peak", count(after.peak)])
    return [table]


CROWDS = (10, 1_000, 10_000)
SCRIPT = json.dumps({"rules": [{"do": "hang"}]})
CROWD_FLAGS = ["--queue-items-max", "20000", "--calls-max", "20000", "--connection-calls-max", "20000"]
CROWD_FLAGS += ["--request-bytes-max", str(1 << 30)]
DEADLINE_SECONDS, IDLE_SECONDS = 600.0, 10.0


async def crowd(_: Options) -> list[Table]:
    """More and more requests on one pair, whose engine never ends one."""
    note = (
        "Requests of one item with a deadline, most of which wait for the engine. Leaving: all their callers go at once; "
        "the outcomes are durable at the end of it."
    )
    table = Table("Open requests", ["open", "MB", "processor ms in an idle second", "leaving, processor ms a request"], note)
    flags = ["--script", SCRIPT, "--self-test", "off"]
    for open_requests in CROWDS:
        with Pair(service=flags, sidecar=CROWD_FLAGS) as pair:
            await asyncio.to_thread(pair.start)
            async with Client(pair.target) as client:
                table.rows.append([f"{open_requests:,}", *await _crowd(client, pair, pair.sidecar, open_requests)])
    return [table]


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


FILE_BATCH, CONCURRENCY = 32, 4
FEW = 1_000


@dataclass(frozen=True, slots=True)
class Run:
    """One command, from its start to its end."""

    seconds: float
    peak_mb: float
    summary: dict[str, object]


def run(pair: Pair, file: Path) -> Run:
    command = [sys.executable, "-m", "ostinato.cli", "--target", pair.target, "--json", "generate", "--file", str(file)]
    command += ["--output", str(file.with_suffix(".answers")), "--batch", str(FILE_BATCH), "--concurrency", str(CONCURRENCY)]
    command += ["--max-new-tokens", str(TOKENS), "--ignore-eos"]
    begun, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            # Looked at while it lasts: the peak that wait4 tells of a child counts what this process held when it was forked.
            with contextlib.suppress(OSError, KeyError):  # it has ended
                peak = max(peak, Memory.of(process.pid).peak)
            time.sleep(0.02)
        assert process.stdout is not None
        summary = json.load(process.stdout)
    assert process.returncode == 0, summary
    return Run(time.monotonic() - begun, peak, summary)


def bulk(options: Options) -> list[Table]:
    """Of few lines and of many, and of many whose answers are there."""
    note = (
        f"Unseeded lines of 200 characters, {TOKENS} tokens each, scripted engine; batches of {FILE_BATCH}, {CONCURRENCY} at "
        "once."
    )
    table = Table("Bulk runs", ["lines", "seconds", "peak resident MB"], note)
    with Pair() as pair:
        pair.start()
        for name, number in (("few", FEW), ("many", options.items), ("many", options.items)):
            file = pair.folder / f"{name}.jsonl"
            if not file.exists():
                with file.open("w") as out:
                    out.writelines(f"{json.dumps(f'Prompt {each} '.ljust(200, '.'))}\n" for each in range(number))
            done = run(pair, file)
            assert done.summary["items"] == number
            what = " (all kept)" if done.summary["kept"] else ""
            table.rows.append([f"{number:,}{what}", f"{done.seconds:.1f}", count(done.peak_mb)])
    return [table]
