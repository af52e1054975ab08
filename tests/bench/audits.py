"""What audits cost the callers: the same load on three pairs that differ in nothing but their audit rate, in turn."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from ostinato.client import Client

from tests.bench.loop import middle
from tests.bench.overhead import TOKENS, Seen, Way, one_round, unary
from tests.bench.table import Table, median
from tests.pair import Pair

RATES = ("0", "0.01", "0.1")
CLIENTS = (1, 16)


async def measure(rounds: int, seconds: float) -> Table:
    """Every rate in every round, each time in the other order."""
    seen: dict[tuple[int, str], list[Seen]] = {}
    async with AsyncExitStack() as stack:
        ways: dict[str, Way] = {}
        for rate in RATES:
            pair = stack.enter_context(Pair(sidecar=["--audit-rate", rate]))
            await asyncio.to_thread(pair.start)
            client = await stack.enter_async_context(Client(pair.target))
            assert pair.service is not None
            ways[rate] = Way(rate, partial(unary, client, 1), pair.service, pair.sidecar)
            await one_round(ways[rate], 4, 0.5)
        for number in range(rounds):
            for requesters in CLIENTS:
                for rate in RATES if number % 2 else reversed(RATES):
                    seen.setdefault((requesters, rate), []).append(await one_round(ways[rate], requesters, seconds))
    return _table(seen)


def _table(seen: dict[tuple[int, str], list[Seen]]) -> Table:
    note = (
        f"The scripted engine, one item of {TOKENS} tokens in a request, unseeded; each rate is a pair of its own, and all "
        "three take turns. The last three columns are against the same round without audits, the median of all rounds; "
        "processor time is that of both programs."
    )
    columns = ["audit rate", "clients", "items/s", "p50 ms", "p99 ms", "items/s", "p99 ms", "processor"]
    table = Table("Cost of audits", columns, note)
    for requesters, rate in sorted(seen):
        rounds = seen[requesters, rate]
        pairs = list(zip(rounds, seen[requesters, RATES[0]], strict=True))
        against = [
            f"{(median([some.loop.per_second / none.loop.per_second for some, none in pairs]) - 1) * 100:+.1f} %",
            f"{median([some.loop.p99 - none.loop.p99 for some, none in pairs]) * 1000:+.2f}",
            f"{(median([_processor(some) / _processor(none) for some, none in pairs]) - 1) * 100:+.1f} %",
        ]
        cells = middle([each.loop for each in rounds]).cells()
        table.rows.append([rate, str(requesters), *cells, *(["", "", ""] if rate == RATES[0] else against)])
    return table


def _processor(seen: Seen) -> float:
    return (seen.sidecar or 0.0) + seen.service
