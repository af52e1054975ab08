"""Programs as children of this process: started, heard, and ended together.

A child is in a process group of its own, so that a Ctrl-C at the terminal reaches this process alone, which then ends the
children in order. If this process dies, the kernel tells them to end.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

HEARD = ("listening", "metrics", "engine loaded", "grade earned", "serving", "engine connected")
"""Log records of the programs that are waited for."""
LOG_BYTES_MAX = 16 << 20
"""Of one log file; the one before it is kept."""
CAUSES_MAX = 20
"""Lines that may say why a program ended."""
_CHUNK_BYTES = 1 << 16
_LAST_LINES_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_BAD_CONFIGURATION = 2

logging.raiseExceptions = False  # a full disk costs lines of a log file, and prints nothing


class Ended(Exception):
    """A program ended that should have gone on. `why` is one line."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


class Child:
    """A running program whose output goes to a log file and is searched for JSON records on the way."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: logging.Handler) -> None:
        self.name = name
        self._process = process
        loop = asyncio.get_running_loop()
        self._said: dict[str, asyncio.Future[Mapping[str, Any]]] = {message: loop.create_future() for message in HEARD}
        self._causes: deque[str] = deque(maxlen=CAUSES_MAX)
        self._log = logging.Logger(name)  # noqa: LOG001  # no part of this process's own logging
        self._log.addHandler(log)
        self._running = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Child:
        """Raises OSError."""
        handler = RotatingFileHandler(log, maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *command,
            env=variables,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        return cls(name, process, handler)

    async def said(self, message: str) -> Mapping[str, Any]:
        """The first log record with this message, one of HEARD. Raises Ended if the program ends without it."""
        record = self._said[message]
        either: set[asyncio.Future[Any]] = {record, self._running}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not record.done():
            raise self._cause()
        return record.result()

    async def ended(self) -> Ended:
        """Waits until the program has ended, and says why."""
        await asyncio.wait({self._running})
        return self._cause()

    async def stop(self, seconds: float | None) -> None:
        """SIGTERM, and SIGKILL after so many seconds; None: it takes as long as it takes."""
        self.signal(signal.SIGTERM)
        await asyncio.wait({self._running}, timeout=seconds)
        self.signal(signal.SIGKILL)
        await asyncio.wait({self._running})

    def signal(self, number: signal.Signals) -> None:
        """Sends it, SIGKILL to whatever the program has started too. Without effect on one that has ended."""
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _cause(self) -> Ended:
        code = self._process.returncode
        assert code is not None, "only of a program that has ended"
        if code < 0:
            return Ended(self.name, f"was ended by {signal.Signals(-code).name}")
        if not self._causes:
            return Ended(self.name, f"ended with exit code {code}")
        lines = list(self._causes) if code == _BAD_CONFIGURATION else [self._causes[-1]]
        return Ended(self.name, "; ".join(line.removeprefix(f"{self.name}: ") for line in lines))

    async def _run(self) -> None:
        """Until the program has ended and what it said has been read."""
        reading = asyncio.create_task(self._read())
        await self._process.wait()
        await asyncio.wait({reading}, timeout=_LAST_LINES_SECONDS)  # what it started may hold the pipe open
        reading.cancel()
        for handler in self._log.handlers:
            handler.close()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace"))
        if rest:
            self._take(rest.decode(errors="replace"))

    def _take(self, line: str) -> None:
        self._log.info("%s", line)
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            if line.strip():
                self._causes.append(line.strip())
            return
        said = self._said.get(str(record.get("message")))
        if said is not None and not said.done():
            said.set_result(record)
        if record.get("level") in ("ERROR", "CRITICAL"):
            last = str(record.get("exception", "")).strip().rpartition("\n")[2]
            self._causes.append(f"{record.get('message')}: {last}" if last else str(record.get("message")))


def _end_with_parent() -> None:
    """In the child, before its program: SIGTERM from the kernel when the parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
