"""What a replay has done so far, in a file: an interrupted one goes on where it was, and runs nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import typer

from ostinato.cli import files, show
from ostinato.v1 import sequencer_pb2

NOT_COMPARED, PASSED_OVER = "not compared", "passed over"


class State:
    """A line that says which replay this is, then a line for each response, as they come.

    `about`: log_id, first and last sequence, and against (None: the sidecar itself). An item that could not be run is not done:
    whoever goes on tries it again.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.first, self.last = int(about["first"]), int(about["last"])
        self.log_id, self.against = str(about["log_id"]), about["against"]
        self.verdicts: Counter[str] = Counter()
        """By word, those two included."""
        self._low = self.first
        """Everything below is done."""
        self._done: set[int] = set()
        """Of the rest."""
        self._about = about
        self._file: TextIO | None = None
        self._bytes = 0
        """Of it that can be read."""

    @classmethod
    def read(cls, path: Path) -> State:
        """What a file says, to go on with. A last line that was cut short is none."""
        name, content = files.read(path)
        whole = content[: content.rfind(b"\n") + 1]
        try:
            about, *lines = [json.loads(line) for _, line in files.lines(name, whole)]
            state = cls(path, about)
            for line in lines:
                state._count(line["sequences"], line["verdict"])
        except (ValueError, LookupError, TypeError):
            raise typer.BadParameter(f"{name}: is no state of a replay") from None
        state._bytes = len(whole)
        return state

    def __enter__(self) -> Self:
        """Opens the file, if there can be one: without it a replay is none the worse until it is interrupted."""
        try:
            self._file = self.path.open("r+" if self._bytes else "x", encoding="utf-8")
            self._file.seek(self._file.truncate(self._bytes))
        except OSError as error:
            show.note(f"warning: this replay could not be resumed: {self.path}: {error.strerror}")
        if not self._bytes:
            self._write(self._about)
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves no file behind where nothing is left to do, or nothing was done."""
        if self._file is not None:
            self._file.close()
            if not self.resumable:
                self.path.unlink(missing_ok=True)

    @property
    def seen(self) -> int:
        """Items that are done."""
        return self._low - self.first + len(self._done)

    @property
    def total(self) -> int:
        return self.last - self.first + 1

    @property
    def resumable(self) -> bool:
        """Whether the file is worth keeping."""
        return self._file is not None and 0 < self.seen < self.total

    def left(self) -> Iterator[tuple[int, int]]:
        """Ranges of what is not done, ascending."""
        first = self._low
        for sequence in (*sorted(self._done), self.last + 1):
            if first < sequence:
                yield first, sequence - 1
            first = sequence + 1

    def take(self, response: sequencer_pb2.ReplayResponse) -> None:
        """One response more."""
        comparison = response.comparison
        if comparison.HasField("status"):
            self.verdicts[NOT_COMPARED] += 1
            return
        sequences = list(response.passed_over) or [comparison.sequence]
        verdict = PASSED_OVER if response.passed_over else show.word(comparison, "verdict")
        self._count(sequences, verdict)
        self._write({"sequences": sequences, "verdict": verdict})

    def _count(self, sequences: list[int], verdict: str) -> None:
        self.verdicts[verdict] += len(sequences)
        self._done.update(sequences)
        while self._low in self._done:
            self._done.remove(self._low)
            self._low += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            print(json.dumps(line), file=self._file, flush=True)
