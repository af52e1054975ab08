"""A grammar is compiled first in a child process, which can be ended: a few hundred bytes of JSON schema can keep a compiler
busy for minutes without a way to interrupt it, and some grammars end the process.

The child is `python -m MODULE ARGUMENTS…`. It loads the vocabulary once, and then reads lines of JSON, [kind, source], and
answers each with a line: null, or why the grammar is rejected. For each grammar it forks, and one that is too dear ends its own
fork.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import IO

ANSWER_SECONDS_MAX = 30.0
"""For an answer of the child, its start included."""
STACK_BYTES_MAX = 4 << 20
"""Less than a thread of the engine has: what passes here does not overflow there."""


EXPLANATION_CHARACTERS_MAX = 300


def cannot_be_obeyed(why: str) -> str:
    """The message for a grammar that a compiler rejects: `why` in one line, shortened."""
    return f"cannot be obeyed: {shorten(why, EXPLANATION_CHARACTERS_MAX, placeholder=' ...')}"


class Checker:
    """The parent's end. The child starts at the first check, and again when it has ended. Thread-safe."""

    def __init__(self, module: str, *arguments: str, first: bytes = b"") -> None:
        """`first`: bytes that the child reads before the first grammar."""
        self._command, self._first = [sys.executable, "-m", module, *arguments], first
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def check(self, kind: str, source: bytes) -> None:
        """Raises ValueError with the compiler's reason, or if it takes too long."""
        with self._lock:
            if self._closed:
                raise ValueError("cannot be checked any more: the engine has closed")
            question = json.dumps([kind, source.decode()]).encode() + b"\n"
            if self._child is None:
                self._child, question = self._start(), self._first + question
            answer = self._ask(self._child, question)
            if not answer:
                self._stop()
                raise ValueError("cannot be compiled")
        if (problem := json.loads(answer)) is not None:
            raise ValueError(problem)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            start_new_session=True,  # a Ctrl-C at the terminal must not reach it
        )

    def _ask(self, child: subprocess.Popen[bytes], question: bytes) -> bytes:
        """A line; empty if the child has ended or does not answer."""
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(question)
            child.stdin.flush()
        except BrokenPipeError:
            return b""
        ready, _, _ = select.select([child.stdout], [], [], ANSWER_SECONDS_MAX)
        return child.stdout.readline() if ready else b""

    def _stop(self) -> None:
        if self._child is None:
            return
        with suppress(BrokenPipeError), self._child as child:  # closes its pipes and waits for it
            if child.stdout is not None and select.select([child.stdout], [], [], 0)[0]:
                child.wait()
            else:
                child.kill()
        self._child = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one grammar may take."""

    seconds: float
    """Of processor time, which does not depend on the machine's other load."""
    memory_bytes: int
    """Address space beside the vocabulary's."""
    doing: str
    """What takes them."""


def serve(questions: IO[bytes], answers: IO[bytes], problem: Callable[[str, str], str | None], limits: Limits) -> None:
    """The child: answers until standard input is closed. `problem` says why a grammar is rejected, or None."""
    for question in questions:
        kind, source = json.loads(question)
        answers.write(json.dumps(_forked(lambda: problem(kind, source), limits)).encode() + b"\n")  # noqa: B023  # called at once
        answers.flush()


def _forked(problem: Callable[[], str | None], limits: Limits) -> str | None:
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory_bytes,) * 2)
            resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES_MAX, resource.getrlimit(resource.RLIMIT_STACK)[1]))
            os.write(writing, json.dumps(problem()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if said:
        return None if (found := json.loads(said)) is None else str(found)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"takes more than {limits.seconds:g} s of processor time to {limits.doing}"
    return f"cannot be compiled, or takes more than {limits.memory_bytes >> 20} MiB"
