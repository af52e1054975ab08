"""Files that a command reads, `-` for stdin, and the places in them that errors name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import typer

STDIN = "-"


def read(path: Path | str) -> tuple[str, bytes]:
    """The file's name for people, and its content."""
    if str(path) == STDIN:
        return "stdin", sys.stdin.buffer.read()
    try:
        return str(path), Path(path).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None


def lines(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Place and content of each line that is not blank. A line feed ends a line, and nothing else: texts hold many others."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{name}:{number}", line.removesuffix(b"\r")
