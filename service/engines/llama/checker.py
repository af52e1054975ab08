"""Whether llguidance accepts a grammar, found out in a process apart.

A few hundred bytes of JSON schema can keep llguidance busy for minutes, with no way to interrupt it; it says why it rejects a
grammar only on its standard error; and where it fails badly, it takes its process with it. So each grammar from outside is
compiled first in a child that may die of it: `python -m service.engines.llama.checker MODEL`, one line of JSON in ([kind,
source]), one line out (null, or what is wrong).
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import IO

from service.engines.llama.grammar import Grammar, GrammarLost
from service.engines.llama.library import library
from service.engines.llama.vocabulary import LlamaVocabulary

CPU_SECONDS_MAX = 0.5
"""For one grammar, of processor time, which does not depend on what else the machine does."""
ANSWER_SECONDS_MAX = 30.0
"""Of the clock, for a child that hangs; its start is in it."""
EXPLANATION_CHARACTERS_MAX = 300
_ERRORS_ONLY = 1
_POINTED_AT = re.compile(r"\d+ \| ")


class Checker:
    """Starts its child when it is first asked, and again when it has lost one. Safe in any thread."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def check(self, kind: str, source: bytes) -> None:
        """Raises ValueError with what llguidance says against the grammar, or that it takes too long to compile."""
        with self._lock:
            if self._closed:
                raise ValueError("cannot be checked any more: the engine has closed")
            child = self._child = self._child or self._start()
            answer = self._ask(child, json.dumps([kind, source.decode()]).encode() + b"\n")
            if not answer:
                self._stop()
                slow = child.returncode == -signal.SIGPROF
                raise ValueError(f"takes more than {CPU_SECONDS_MAX} s to compile" if slow else "cannot be compiled")
        if (problem := json.loads(answer)) is not None:
            raise ValueError(problem)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            start_new_session=True,  # what is typed at the terminal is not meant for it
        )

    def _ask(self, child: subprocess.Popen[bytes], question: bytes) -> bytes:
        """A line, or nothing if the child is gone or as good as gone."""
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
                child.wait()  # it ended by itself; its exit code says how
            else:
                child.kill()
        self._child = None


def main(model: Path, questions: IO[bytes], answers: IO[bytes]) -> None:
    """The child: answer until nobody asks."""
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
        judge = Judge(model, errors)
        for question in questions:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_MAX)
            problem = judge.problem(*json.loads(question))
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(json.dumps(problem).encode() + b"\n")
            answers.flush()


class Judge:
    """Compiles grammars and reads what llguidance writes about them."""

    def __init__(self, model: Path, errors: IO[bytes]) -> None:
        """`errors` is a file, where standard error goes."""
        self._library, self._errors = library(), errors
        self._vocabulary = LlamaVocabulary(self._library, model)
        self._library.set_verbosity(_ERRORS_ONLY)
        self.problem("regex", "a")  # builds what all grammars need

    def problem(self, kind: str, source: str) -> str | None:
        """What is wrong with a grammar, if anything is."""
        self._errors.seek(0)
        self._errors.truncate()
        grammar = Grammar(self._library, self._vocabulary.handle, self._vocabulary.size, kind, source.encode())
        try:
            return None if grammar.allowed().any() else "allows no answer"
        except GrammarLost:
            return self._explanation()
        finally:
            grammar.close()

    def _explanation(self) -> str:
        self._library.flush_log()
        self._errors.seek(0)
        return explanation(self._errors.read().decode(errors="replace"))


def explanation(text: str) -> str:
    """What llguidance wrote, in one line: without its own state, and without what it points at."""
    lines = [line.strip() for line in text.partition("<state>")[0].removeprefix("llg error: ").splitlines()]
    told = " ".join(line for line in lines if line.strip("^") and not _POINTED_AT.match(line))
    if told == "NoExtensionBias":
        return "allows no answer"
    told = told or "llguidance does not say why"
    return f"cannot be obeyed: {shorten(told, EXPLANATION_CHARACTERS_MAX, placeholder=' ...')}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
