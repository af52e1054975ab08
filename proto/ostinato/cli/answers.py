"""The file of `generate --output`: a line for each prompt, in the prompts' order, a whole batch at a time.

A line is a Result in protobuf's JSON, with the prompt's `line` and the `key` of its batch in front. The key says what was asked
(see `bulk`), so whoever goes on knows whether these are answers to what is asked now.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from ostinato import errors
from ostinato.cli import show
from ostinato.cli.batches import Batch
from ostinato.cli.prompts import Prompt
from ostinato.v1 import types_pb2

_BEGINNING = b'{"line": '


class Answers:
    """The file, open for one run alone. First `kept` is asked for each batch until it has none; from there on `write`."""

    def __init__(self, path: Path) -> None:
        """Wrong usage for what is no file, or another run's."""
        self._path, self._lines = path, 0
        try:
            if path.exists() and not path.is_file():
                raise typer.BadParameter(f"--output: {path} is no file: it is read, to go on where it ends")
            self._file = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise typer.BadParameter(f"--output: {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise typer.BadParameter(f"--output: another run writes to {path}") from None

    def close(self) -> None:
        with suppress(OSError):  # of what there was no room for, which has been said
            self._file.close()

    def kept(self, batch: Batch) -> list[dict[str, Any]] | None:
        """The answers to this batch that are there; None: not all of them, and what there was of the last one is gone.
        Wrong usage where something else is in their place."""
        start, found = self._file.tell(), []
        for prompt in batch.part:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                    raise self._other(prompt)  # not one of ours that was cut short
                self._file.seek(start)
                self._file.truncate()
                return None
            found.append(self._answer(line, batch, prompt))
        self._lines += len(found)
        return found

    def write(self, batch: Batch, results: Sequence[types_pb2.Result]) -> list[dict[str, Any]]:
        """The answers to a batch, as they are written. Raises an OSError where there is no room."""
        if len(results) != len(batch.part):
            raise errors.Internal(f"{len(results)} answers to {len(batch.part)} prompts")
        key = batch.request.idempotency_key
        made = [
            {"line": _line(prompt), "key": key, **show.as_dict(result)}
            for prompt, result in zip(batch.part, results, strict=True)
        ]
        self._file.write("".join(f"{json.dumps(each)}\n" for each in made).encode())
        self._file.flush()
        return made

    def end(self) -> None:
        """Wrong usage where there is more than was asked for."""
        if self._file.read(1):
            raise typer.BadParameter(f"--output: {self._path} has more than the {self._lines} answers that were asked for")

    def _answer(self, line: bytes, batch: Batch, prompt: Prompt) -> dict[str, Any]:
        try:
            answer = json.loads(line)
            if answer["key"] == batch.request.idempotency_key and "sequence" in answer:
                return dict(answer)
        except (ValueError, TypeError, LookupError):
            pass
        raise self._other(prompt)

    def _other(self, prompt: Prompt) -> typer.BadParameter:
        return typer.BadParameter(
            f"--output: what {self._path} has for {prompt.place} was asked otherwise: another prompt, parameter, --key, --batch"
            " or model's limit; or it is another kind of file"
        )


def _line(prompt: Prompt) -> int:
    return int(prompt.place.rpartition(":")[2])
