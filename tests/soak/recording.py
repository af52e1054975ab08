"""`python -m tests.soak.recording`: the service itself, whose scripted engine writes down what is submitted to it.

One line for each submission, `purpose sequence attempt`, at the end of the file that SUBMISSIONS names. A line is written by
the time the engine has the run, so the file outlives a kill.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ostinato.v1 import engine_pb2

from service import __main__ as program
from service.engines import scripted
from service.engines.base import Run
from tests.pair import Pair, Program


class Submission(NamedTuple):
    purpose: int
    sequence: int
    attempt: int


class RecordingEngine(scripted.ScriptedEngine):
    """Leaves a trace outside its process."""

    _file = -1

    def submit(self, run: Run) -> None:
        if self._file < 0:
            self._file = os.open(os.environ["SUBMISSIONS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, f"{run.purpose} {run.sequence} {run.attempt}\n".encode())
        super().submit(run)


class RecordedPair(Pair):
    """A pair whose service is this one, in every one of its lives."""

    @property
    def record(self) -> Path:
        return self.folder / "submissions"

    def submissions(self) -> list[Submission]:
        """Of PRIMARY runs, in the order in which the engines got them."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        every = [Submission(*map(int, line.split())) for line in lines]
        return [one for one in every if one.purpose == engine_pb2.PURPOSE_PRIMARY]

    def _program(self, name: str, args: list[str]) -> Program:
        module = "tests.soak.recording" if name == "service" else name
        return Program(module, args, {"SUBMISSIONS": str(self.record)})


if __name__ == "__main__":
    scripted.ScriptedEngine = RecordingEngine  # type: ignore[misc]
    program.main()
