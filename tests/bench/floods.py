"""What hostile callers do to the sidecar's memory, and to another tenant's requests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ostinato.client import Client
from serving import auth
from serving.auth import Role

from tests.bench.memory import Memory
from tests.bench.table import Options, Table, count, median, millis
from tests.pair import ROOT, Pair, Program, environment

LIMIT_MB = 1024
"""Of the sidecar's container. Above it the sidecar is killed."""
SECONDS, CALM_SECONDS = 10.0, 3.0
PAUSE_SECONDS = 0.02
SAMPLE_SECONDS = 0.01
STRANGER, TENANT = "no token", "a token"
MIX = "mix"
CASES = (
    *((name, STRANGER) for name in ("large", "empty_items", "resets", "small", "idle", "half_sent", "watchers")),
    *((name, TENANT) for name in ("large", "empty_items", "empty_messages", "resets", "small", "half_sent")),
    *((name, TENANT) for name in ("unread_streams", "unread_answers", "unread_records")),
    (MIX, f"{STRANGER} and {TENANT}"),
)


@dataclass(slots=True)
class Seen:
    """Of one flood: MB, seconds."""

    calm: float = 0.0
    peak: float = 0.0
    after: float = 0.0
    killed: float | None = None
    medians: tuple[float, float] = (0.0, 0.0)
    failed: int = 0

    def cells(self) -> list[str]:
        peak = f"killed after {self.killed:.1f} s" if self.killed is not None else count(self.peak)
        return [count(self.calm), peak, count(self.after), *map(millis, self.medians), str(self.failed)]


async def floods(options: Options) -> list[Table]:
    """Each on a pair of its own."""
    note = (
        f"Resident memory; above {LIMIT_MB} MB the sidecar is killed, as in its container. The other tenant sends one item of "
        f"4 tokens every {PAUSE_SECONDS * 1000:g} ms; its median before the flood and while it lasts ({SECONDS:g} s). Flood, "
        "sidecar, service and the other tenant share the cores."
    )
    columns = ["flood", "with", "MB before", "MB at the peak", "MB 3 s after", "median ms before", "ms meanwhile", "refused"]
    table = Table("Floods", columns, note)
    only = os.environ.get("FLOODS", "").split()
    for name, who in CASES:
        if only and name not in only and f"{name}:{who}" not in only:
            continue
        seen = await one(name, who, options.beside or ROOT)
        table.rows.append([name, who, *seen.cells()])
        print(name, who, seen, file=sys.stderr, flush=True)
    return [table]


async def one(name: str, who: str, root: Path) -> Seen:
    seen = Seen()
    with Pair(root=root) as pair:
        tokens = tokens_file(pair)
        await asyncio.to_thread(pair.start)
        async with Client(pair.target, token=tokens["zeta"]) as other:
            seen.calm = Memory.of(pair.sidecar.pid).now
            before = [await taken(other) for _ in range(30)]
            end = time.monotonic() + CALM_SECONDS
            before = [await taken(other) for _ in iter(lambda: time.monotonic() < end, False)]
            floods = begin(name, who, pair.target, tokens["acme"])
            watching = asyncio.create_task(watch(pair.sidecar, seen))
            meanwhile = list[float]()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and pair.sidecar.running:
                try:
                    meanwhile.append(await taken(other))
                except Exception:  # noqa: BLE001
                    seen.failed += 1
            for flood in floods:
                flood.kill()
                flood.wait()
            await asyncio.sleep(3)
            watching.cancel()
            seen.after = Memory.of(pair.sidecar.pid).now if pair.sidecar.running else 0.0
            seen.medians = median(before), median(meanwhile or [0.0])
    return seen


def tokens_file(pair: Pair) -> dict[str, str]:
    """Of two tenants; the sidecar gets the file."""
    made = {name: auth.new_token(name, Role.TENANT) for name in ("acme", "zeta")}
    listed = pair.folder / "tokens"
    listed.touch(mode=0o600)
    listed.write_text("\n".join(line for _, line in made.values()))
    pair.env["OSTINATO_SIDECAR_TOKENS"] = str(listed)
    return {name: token for name, (token, _) in made.items()}


def begin(name: str, who: str, target: str, token: str, seconds: float = SECONDS) -> list[subprocess.Popen[bytes]]:
    """Processes of the flood, or of all floods."""
    cases: Sequence[tuple[str, str]] = CASES[:-1] if name == MIX else [(name, who)]
    return [
        subprocess.Popen(
            [
                "nice",
                "-n",
                "19",
                sys.executable,
                "-m",
                "tests.floods",
                each,
                target,
                str(seconds),
                *([token] if whose == TENANT else []),
            ],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        for each, whose in cases
    ]


async def taken(client: Client) -> float:
    """Seconds of a small request."""
    await asyncio.sleep(PAUSE_SECONDS)
    sent = time.perf_counter()
    await client.generate("hello", max_new_tokens=4, timeout=10.0)
    return time.perf_counter() - sent


async def watch(sidecar: Program, seen: Seen) -> None:
    """Notes the peak, and kills at the limit."""
    begun = time.monotonic()
    while sidecar.running:
        seen.peak = max(seen.peak, Memory.of(sidecar.pid).now)
        if seen.peak > LIMIT_MB:
            seen.killed = time.monotonic() - begun
            await asyncio.to_thread(sidecar.kill)
        await asyncio.sleep(SAMPLE_SECONDS)
