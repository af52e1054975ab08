"""Programs as processes: signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "proto"
PROGRAM = """
import asyncio, sys
from serving import logs
from serving.program import DRAINED, StartupError, install_signal_handlers, run

async def main(stop):
    {first}
    print("up", flush=True)
    {body}
    return DRAINED

logs.setup("{form}")
sys.exit(run("program", main))
"""


def started(body: str, first: str = "install_signal_handlers(stop)", form: str = "human") -> subprocess.Popen[str]:
    """A program with this body in its main, up and running."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(first=first, body=body, form=form)],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    _, errors = process.communicate(timeout=50)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    """SIGTERM and SIGINT set the event once main has installed the handlers; what main then returns is the exit code."""
    process = started("await stop.wait(); print('drained')")
    process.send_signal(number)

    code, errors = ended(process)
    assert code == 0
    assert f"{number.name}: stopping" in errors


@pytest.mark.parametrize("body", ["await asyncio.to_thread(__import__('time').sleep, 600)", "__import__('time').sleep(600)"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_at_once_what_has_not_begun_to_serve(number: signal.Signals, body: str) -> None:
    """Until main installs the handlers both signals are a good end, whatever a thread, or the loop itself, is at work on."""
    process = started(body, first="")
    process.send_signal(number)

    code, errors = ended(process)
    assert code == 0
    assert f"{number.name}: stopping" in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, code: int) -> None:
    """Who asks twice in the same way does not wait for a drain, nor for threads that hang."""
    process = started("await stop.wait(); print('draining', flush=True); await asyncio.to_thread(__import__('time').sleep, 60)")
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "draining\n"
    process.send_signal(number)

    assert ended(process)[0] == code


def test_a_hook_and_a_supervisor_may_both_ask() -> None:
    """SIGINT and then SIGTERM are one wish: the drain goes on, and its exit code is 0."""
    process = started("await stop.wait(); print('draining', flush=True); await asyncio.to_thread(sys.stdin.readline)")
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "SIGTERM: stopping" not in process.stderr.readline():
        assert process.poll() is None

    assert process.communicate("\n", timeout=20)[0] == ""
    assert process.returncode == 0


def test_a_program_that_cannot_start_says_why_in_one_line() -> None:
    """A StartupError is its message on stderr behind the program's name, and its exit code, without a traceback."""
    assert ended(started("raise StartupError('the port\\nis \\033[1mtaken')")) == (1, "program: the port is \\x1b[1mtaken\n")
    assert ended(started("raise StartupError('bad', exit_code=2)"))[0] == 2


def test_a_program_with_a_json_log_says_why_in_one_record() -> None:
    """A StartupError is one JSON record of level CRITICAL where the log is JSON, whatever level is logged."""
    code, errors = ended(
        started("logs.setup('json', 'ERROR'); raise StartupError('the port\\nis taken', exit_code=2)", form="json")
    )

    record = json.loads(errors)
    assert (code, record.pop("time")[-1]) == (2, "Z")
    assert record == {"level": "CRITICAL", "logger": "program", "message": "the port is taken", "exit_code": 2}


def test_a_failure_is_logged_with_its_traceback() -> None:
    """Any other exception ends the program with 1, and the log has where it came from."""
    code, errors = ended(started("raise ValueError('odd')"))

    assert code == 1
    assert "ValueError: odd" in errors
    assert "Traceback" in errors
