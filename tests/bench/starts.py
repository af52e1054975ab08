"""From the start of both programs to an engine that is connected."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench.table import Table, count, median
from tests.pair import Pair


def seconds(engine: str, state: Path | None = None) -> float:
    """One start of both, at once."""
    with Pair(engine=engine, state=state) as pair:
        began = time.perf_counter()
        pair.start()
        return time.perf_counter() - began


def measure(rounds: int, *, llama: bool) -> Table:
    """The llama engine once with an empty state directory each round, then with what that start has kept."""
    seen: dict[str, list[float]] = {}
    for _ in range(rounds):
        seen.setdefault("scripted engine", []).append(seconds("scripted"))
        if llama:
            with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
                state = Path(folder)
                seen.setdefault("llama engine, first start: self-test", []).append(seconds("llama", state))
                seen.setdefault("llama engine, its proof kept", []).append(seconds("llama", state))
    table = Table("Start of both programs to ready, seconds", ["", "median", "worst"], f"{rounds} starts of each kind.")
    for name, all_seconds in seen.items():
        table.rows.append([name, count(median(all_seconds)), count(max(all_seconds))])
    return table
