"""What the benchmarks share: options, tables, loops of requests, and the processor time of a program.

This module and `door`, `bare` and `route` need grpcio, grpcio-status, grpcio-health-checking, grpcio-reflection, protobuf,
googleapis-common-protos, prometheus-client, apsw, msgspec and rich, and nothing else that pip installs.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from tests.pair import Program

ITEMS = 100_000

Request = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Options:
    """Of a benchmark; each uses those that it has a use for."""

    rounds: int = 5
    """Of each case; the median counts."""
    seconds: float = 2.0
    """Of a round that is a loop."""
    items: int = ITEMS
    llama: bool = True
    """Whether the llama engine is there."""
    beside: Path | None = None
    """Another checkout, measured in the same rounds."""


@dataclass(slots=True)
class Table:
    """One table: the first column names the case, the others are numbers."""

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """On the screen."""
        shown = RichTable(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for position, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if position else "left", no_wrap=not position)
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> str:
        """As a section of a page."""
        lines = [f"### {self.title}", "", " | ".join(["", *self.columns, ""]).strip()]
        lines.append(" | ".join(["", *("---:" if position else "---" for position in range(len(self.columns))), ""]).strip())
        lines += [" | ".join(["", *row, ""]).strip() for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def count(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def millis(seconds: float) -> str:
    return f"{seconds * 1000:.3g}"


@dataclass(frozen=True, slots=True)
class Round:
    """One loop of requests: requests a second, and their latencies in seconds."""

    per_second: float
    p50: float
    p99: float

    def cells(self) -> list[str]:
        """Of a table: a second, and milliseconds."""
        return [count(self.per_second), millis(self.p50), millis(self.p99)]


async def closed_loop(requesters: int, seconds: float, request: Request) -> Round:
    """So many requesters, each with one request at a time. Requests that are open at the end are awaited, and count."""
    taken, began = list[float](), time.perf_counter()

    async def requester() -> None:
        while (sent := time.perf_counter()) < began + seconds:
            await request()
            taken.append(time.perf_counter() - sent)

    await asyncio.gather(*(requester() for _ in range(requesters)))
    return summary(taken, time.perf_counter() - began)


async def open_loop(per_second: int, seconds: float, request: Request) -> Round:
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


def summary(taken: list[float], seconds: float) -> Round:
    """Of the latencies of a round."""
    taken.sort()
    return Round(len(taken) / seconds, taken[len(taken) // 2], taken[len(taken) * 99 // 100])


def middle(rounds: Sequence[Round]) -> Round:
    """The median of each number."""
    return Round(*(median([getattr(each, name) for each in rounds]) for name in ("per_second", "p50", "p99")))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have an item made, and the programs whose processor time it takes."""

    name: str
    request: Request
    service: Program
    front: Program | None = None
    """The sidecar, or what stands in its place."""
    items: int = 1
    """In a request."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One round of a way: its loop in items, and processor seconds an item."""

    loop: Round
    front: float
    service: float
    client: float


async def one_round(
    way: Way, clients: int, seconds: float, run: Callable[[int, float, Request], Awaitable[Round]] = closed_loop
) -> Seen:
    """`clients`: the first argument of the loop."""
    programs = [program for program in (way.service, way.front) if program is not None]
    before, began, client = [processor_seconds(program) for program in programs], time.perf_counter(), time.process_time()
    loop = await run(clients, seconds, way.request)
    client = time.process_time() - client
    items = loop.per_second * (time.perf_counter() - began) * way.items
    service, *front = ((processor_seconds(each) - first) / items for each, first in zip(programs, before, strict=True))
    loop = replace(loop, per_second=loop.per_second * way.items)
    return Seen(loop, front[0] if front else 0.0, service, client / items)


def processor_seconds(program: Program) -> float:
    """That it has used, in all of its threads."""
    fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
