"""Files that a command reads, `-` for stdin, and the places in them that errors name."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import typer

STDIN = "-"
LINE_BYTES_MAX = 64 * 2**20
"""No sidecar takes more in one request."""


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


def each_line(path: Path | str) -> Iterator[tuple[str, bytes]]:
    """As `lines`, of a file of any length: read as they are wanted."""
    stdin = str(path) == STDIN
    try:
        with nullcontext(sys.stdin.buffer) if stdin else Path(path).open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                line = line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
                place = f"{'stdin' if stdin else path}:{number}"
                if len(line) > LINE_BYTES_MAX:
                    raise typer.BadParameter(f"{place}: longer than {LINE_BYTES_MAX} bytes")
                if line.strip():
                    yield place, line.removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
