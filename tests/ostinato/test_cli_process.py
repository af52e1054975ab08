"""The command as a process: signals, pipes, exit codes, and what it loads."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import ostinato

from tests.ostinato.fake import Fake, start
from tests.waiting import until


def _run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def _waits_for_more(process: subprocess.Popen[str]) -> bool:
    """Whether it has read all that was written, and sleeps."""
    assert process.stdin is not None
    unread = int.from_bytes(fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)), sys.byteorder)
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return not unread and state == "S"


@pytest.mark.parametrize("arguments", [("generate", "a"), ("generate", "a", "--stream"), ("tail", "--follow")])
def test_an_interrupt_cancels_the_call(elsewhere: tuple[Fake, str], arguments: tuple[str, ...]) -> None:
    """Ctrl-C exits 130 without a message, and the call is cancelled."""
    fake, target = elsewhere
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))
    fake.script["GenerateStream"].append([lambda: asyncio.sleep(1000)])
    method = {"generate": "Generate", "tail": "Tail"}[arguments[0]] + "Stream" * ("--stream" in arguments)
    with start(*arguments, target=target) as process:
        until(lambda: fake.count(method))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")

    assert process.returncode == 130
    until(lambda: fake.calls[-1].cancelled)


def test_an_interrupt_ends_the_reading_of_prompts(elsewhere: tuple[Fake, str]) -> None:
    """One Ctrl-C is enough while the command waits for stdin."""
    with start("generate", "-", target=elsewhere[1]) as process:
        assert process.stdin is not None
        os.write(process.stdin.fileno(), b"a")
        until(lambda: _waits_for_more(process))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.communicate() == ("", "")


def test_a_reader_may_leave(elsewhere: tuple[Fake, str]) -> None:
    """Lines of tail --follow reach a pipe at once. A closed pipe ends the command without a message, and cancels its call."""
    fake, target = elsewhere
    assert _run("generate", "a", target=target)[0] == 0
    with start("tail", "--payloads", "--follow", "--json", target=target) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["header"]["index"] == "1"
        process.stdout.close()

        assert _run("generate", *"abcd", target=target)[0] == 0

        assert process.wait(30) == 141
        assert process.stderr.read() == ""
    until(lambda: next(call for call in fake.calls if call.method == "Tail").cancelled)


def test_nobody_there_is_said_in_two_lines() -> None:
    """If no sidecar listens, the error names the target and what to try, without gRPC's own logs, and the exit code is 1."""
    code, out, err = _run("generate", "a")
    first, second = err.splitlines()
    assert (code, out) == (1, "")
    assert first.startswith("error: DISCONNECTED: failed to connect")
    assert second == "  Is a sidecar running at 127.0.0.1:1? Choose another with --target or OSTINATO_TARGET."


def test_a_deadline_is_an_error(elsewhere: tuple[Fake, str]) -> None:
    """An expired --timeout is a failed call."""
    fake, target = elsewhere
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))
    code, _, err = _run("--timeout", "0.3", "generate", "a", target=target)
    assert (code, err.startswith("error: DEADLINE_EXCEEDED: ")) == (1, True)


def test_a_pipe_gets_plain_text(elsewhere: tuple[Fake, str]) -> None:
    """Without a terminal there are no escape codes and no boxes, also for wrong usage; characters that the output's encoding
    lacks are escaped."""
    fake, target = elsewhere
    for arguments in (("generate", *"abcd"), ("--help",), ("nonsense",)):
        _, out, err = _run(*arguments, target=target)
        assert (out + err).isascii()
        assert "\x1b" not in out + err
        assert not any(line.endswith(" ") for line in out.splitlines())
    fake.records[1].result.output.text = "né"
    _, out, _ = _run("get", "1", target=target, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert out.splitlines()[-1].endswith(r"n\xe9")


def test_the_version_is_the_packages() -> None:
    """--version prints the command's name and the package's version."""
    assert _run("--version") == (0, f"ostinato {ostinato.__version__}\n", "")


def test_a_shell_completes_commands() -> None:
    """--help shows how to install the completion, and the completion finds commands by their beginning."""
    asked = {"_OSTINATO_COMPLETE": "complete_bash", "COMP_WORDS": "ostinato ser", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['ostinato']; from ostinato.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.split() == ["serve", "service"]
    assert "--install-completion" in _run("--help")[1]


def test_standard_output_is_full(elsewhere: tuple[Fake, str]) -> None:
    """A full stdout ends the command with one line and exit code 1."""
    with Path("/dev/full").open("w") as full:
        code, _, err = _run("head", target=elsewhere[1], stdout=full)

    assert (code, err) == (1, "error: No space left on device\n")
