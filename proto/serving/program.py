"""The life of a program: signals, exit codes, traces.

    0    drained: it was told to stop and stopped in order, or it had served nothing yet
    1    failed
    2    the configuration is bad
    130  a second SIGINT arrived before it had stopped
    143  a second SIGTERM, likewise

There are no others, so a supervisor can tell a drained program from a failed one and from a bad configuration.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from ostinato import tracing
from serving.logs import report_failure

DRAINED, FAILED, BAD_CONFIGURATION = 0, 1, 2
STOPS = (signal.SIGTERM, signal.SIGINT)
OBJECTS_MAX = 10_000
"""New objects before a garbage collection, instead of Python's 700: 64 items are thousands of objects, without a cycle."""

_log = logging.getLogger(__name__)


class StartupError(Exception):
    """The program cannot run here. The message says why in one line, and no traceback is needed."""

    def __init__(self, message: str, *, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(program: str, main: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> int:
    """Runs `main` on an event loop of its own and returns the exit code for `sys.exit`. `program`: its name in messages.

    SIGTERM and SIGINT end the process at once, even within a library's call, until `main` passes the event that it is given to
    `install_signal_handlers`. After that they set the event, and `main` finishes its work and returns. The same signal again
    ends the process at once, with its threads. The other signal does not: a hook may send SIGINT before a supervisor sends
    SIGTERM, and both mean one drain.
    """
    gc.freeze()  # imported modules stay, so they need no collection
    gc.set_threshold(OBJECTS_MAX)
    for number in STOPS:
        signal.signal(number, _exit)
    try:
        return asyncio.run(main(asyncio.Event()))
    except StartupError as error:
        report_failure(program, str(error), error.exit_code)
        return error.exit_code
    except Exception:  # noqa: BLE001  # nothing above catches it
        _log.exception("failed")
        return FAILED


@contextmanager
def configuring(what: str) -> Iterator[None]:
    """Around what is made of a setting. Raises StartupError for a ValueError. `what`: the flag, and its file, if any."""
    try:
        yield
    except ValueError as error:
        raise StartupError(f"{what}: {error}", exit_code=BAD_CONFIGURATION) from error


@contextmanager
def exporting_traces(target: str, service: str, instance: str = "") -> Iterator[None]:
    """Exports spans as `tracing.start` does, if they are on, while the context lasts. Raises StartupError."""
    try:
        tracing.start(target, service, instance or str(uuid.uuid4()), os.environ)
    except ValueError as error:
        raise StartupError(str(error), exit_code=BAD_CONFIGURATION) from None
    try:
        yield
    finally:
        tracing.stop()


def install_signal_handlers(stop: asyncio.Event) -> None:
    """From now on SIGTERM and SIGINT set the event."""
    seen: set[signal.Signals] = set()
    loop = asyncio.get_running_loop()
    for number in STOPS:
        loop.add_signal_handler(number, _on_signal, number, seen, stop)


def _exit(number: int, _frame: object) -> None:
    try:
        _log.info("%s: stopping, nothing was served yet", signal.Signals(number).name)
        logging.shutdown()
    finally:
        os._exit(DRAINED)


def _on_signal(number: signal.Signals, seen: set[signal.Signals], stop: asyncio.Event) -> None:
    if number in seen:
        _log.warning("%s again: exiting at once", number.name)
        logging.shutdown()
        os._exit(128 + number)
    seen.add(number)
    _log.info("%s: stopping", number.name)
    stop.set()
