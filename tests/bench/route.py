"""The route of one prompt with one token through the code: client, sidecar and service in one process, under `sys.setprofile`.

    calls      of Python functions of ours, in all threads; a coroutine that resumes is a call, a comprehension is none
    functions  how many of them, and `files`: in how many
    moves      calls whose file is not that of the call before
    stops      files from which a call enters another one; the others are leaves and only return to their caller

Ours are proto/ostinato, proto/serving, service and sidecar, without generated code. The second table has the calls of an item
among many, which share messages and commits. The third is the way of a sequence from its birth to its receipt: every stop from
the order's core on, once, with the function that is entered first.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import re
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

from ostinato.client import Client
from ostinato.errors import OstinatoError
from serving import program

from tests.bench.table import Options, Table, median

ROOT = Path(__file__).parents[2]
OURS = re.compile(rf"{re.escape(str(ROOT))}/((?:proto/ostinato|proto/serving|service|sidecar)/(?!.*_pb2).*\.py)$")
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
CORE = "sidecar/core/"
WARM_UP, ROUNDS = 12, 9
"""Prompts. After the first ones a sender knows that it is alone."""
MANY, MANY_ROUNDS = ((64, 1), (8, 64)), 5
"""Clients, and items in the request of each."""
NAMES = ["calls", "functions", "files", "moves", "stops"]

Calls = list[tuple[CodeType, CodeType | None]]
"""Each with its caller, where Python has one."""


class Route:
    """The calls of one prompt, in order."""

    def __init__(self, seen: Calls) -> None:
        self.calls: list[tuple[str, str]] = []
        self._passing = set[str]()
        for code, caller in seen:
            file, name = _file(code), code.co_qualname
            if file is not None and not name.endswith(COMPREHENSIONS):
                self.calls.append((file, name))
                came_from = caller and _file(caller)
                if came_from and came_from != file:
                    self._passing.add(came_from)

    def counts(self) -> list[int]:
        """As NAMES has them."""
        files = [file for file, _ in self.calls]
        moves = sum(before != after for before, after in itertools.pairwise(files))
        return [len(files), len(set(self.calls)), len(set(files)), moves, len(self._passing)]

    def stops(self) -> list[str]:
        """From the order's core to the client."""
        born = next(place for place, (file, _) in enumerate(self.calls) if file.startswith(CORE))
        entered: dict[str, str] = {}
        for file, function in self.calls[born:]:
            if file in self._passing:
                entered.setdefault(file, function)
        return [f"{file}:{function}" for file, function in entered.items()]


def _file(code: CodeType) -> str | None:
    """Relative to the checkout; None: it is not ours."""
    match = OURS.match(code.co_filename)
    return match and match.group(1)


async def route(_options: Options) -> list[Table]:
    """Of several prompts the one with the fewest calls: in the others a timer ran, too."""
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, _profiler() as profiled:
        async with _pair(Path(folder)) as client:
            for _ in range(WARM_UP):
                await _prompt(client)
            routes = [Route(await profiled(lambda: _prompt(client))) for _ in range(ROUNDS)]
            many = [[Route(await profiled(partial(_prompts, client, *each))) for _ in range(MANY_ROUNDS)] for each in MANY]
    shortest = min(routes, key=lambda found: len(found.calls))
    table = Table("The route of one prompt with one token", ["", *NAMES])
    table.rows.append(["client, sidecar and service", *map(str, shortest.counts())])
    shared = Table("Calls an item, with one token each", ["clients", "items in a request", "calls"])
    for (clients, items), found in zip(MANY, many, strict=True):
        calls = median([len(each.calls) for each in found]) / (clients * items)
        shared.rows.append([str(clients), str(items), f"{calls:.0f}"])
    listed = Table("The stops of a sequence, from the order's core to the client", ["stop", "number"])
    listed.rows += [[stop, str(number)] for number, stop in enumerate(shortest.stops(), 1)]
    return [table, shared, listed]


async def _prompt(client: Client, items: int = 1) -> None:
    await client.generate(["Shanghai is"] * items, max_new_tokens=1, ignore_eos=True)


async def _prompts(client: Client, clients: int, items: int) -> None:
    await asyncio.gather(*(_prompt(client, items) for _ in range(clients)))


@contextlib.contextmanager
def _profiler() -> Iterator[Callable[[Callable[[], Awaitable[None]]], Awaitable[Calls]]]:
    """A function that gives the calls of a request; within the context, those of new threads, too."""
    seen: Calls | None = None

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and seen is not None:
            seen.append((frame.f_code, frame.f_back and frame.f_back.f_code))

    async def profiled(request: Callable[[], Awaitable[None]]) -> Calls:
        nonlocal seen
        seen = taken = Calls()
        sys.setprofile(note)
        try:
            await request()
        finally:
            sys.setprofile(None)
            seen = None
        return taken

    threading.setprofile(note)
    try:
        yield profiled
    finally:
        threading.setprofile(None)


@contextlib.asynccontextmanager
async def _pair(folder: Path) -> AsyncIterator[Client]:
    """Both programs, as tasks of this loop, and a client of theirs."""
    stop = asyncio.Event()
    engine, listen = f"unix:{folder}/engine.sock", f"unix:{folder}/sidecar.sock"
    quiet = ["--metrics", "", "--log-level", "WARNING"]
    service = ["--engine", "scripted", "--listen", engine, "--state-dir", str(folder), *quiet]
    quiet[-1] = "warning"
    journal = ["--journal", str(folder / "journal.sqlite"), "--journal-reserve-bytes", "0"]
    still = ["--audit-rate", "0", "--canary-seconds", "0", "--tick-seconds", "60"]
    sidecar = ["--engine", engine, "--listen", listen, *journal, *still, *quiet]
    with mock.patch.object(program, "install_signal_handlers"):
        running = [asyncio.ensure_future(_main(*each)(stop)) for each in (("service", service), ("sidecar", sidecar))]
    try:
        async with Client(listen) as client:
            while True:
                with contextlib.suppress(OstinatoError):
                    await _prompt(client)
                    break
                assert not any(task.done() for task in running), running
                await asyncio.sleep(0.05)
            yield client
    finally:
        stop.set()
        await asyncio.gather(*running)


def _main(name: str, arguments: Sequence[str]) -> Callable[[asyncio.Event], Awaitable[int]]:
    """The coroutine function that a program runs."""
    with (
        mock.patch.object(program, "run", return_value=0) as run,
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(f"{name}.__main__").main()
    main: Callable[[asyncio.Event], Awaitable[int]] = run.call_args.args[1]
    return main
