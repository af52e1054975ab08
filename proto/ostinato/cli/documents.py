"""Files of JSON: prompts, histories, and what the commands print with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.message import Message

from ostinato.cli.session import STDIN, usage
from ostinato.signature import opened
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

ADDED = {"line", "key"}
"""What `generate --output` puts before a Result."""
_EVENTS = {"finished", "failed", "tokens", "restarted"}
_KINDS = "Result, GenerateResponse, GenerateEvent, ItemRecord, Receipt, Entry, SignedHead or DSSE envelope"


def loads(text: str | bytes) -> Any:
    """A JSON value. ValueError: it is none, or readers could take it differently (a name that is in one object twice, NaN)."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name}: given twice")
        made[name] = value
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}: is not a JSON number")


def content_of(path: Path) -> tuple[str, bytes]:
    """The file's name for messages, and its content."""
    if str(path) == STDIN:
        return "stdin", sys.stdin.buffer.read()
    with usage():
        return str(path), path.read_bytes()


def values(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Places and JSON values of a file of one value, or of one per line. A line that is no JSON is its exception."""
    try:
        yield name, loads(content)
    except (ValueError, RecursionError):
        # Only a line feed ends a line: texts contain other separators.
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                try:
                    value = loads(line)
                except (ValueError, RecursionError) as error:
                    value = error
                yield f"{name}:{number}", value


def messages(place: str, value: Any) -> Iterator[tuple[str, Any, Message | Exception]]:
    """Places, JSON values and messages of the contract in a value of `values`: itself, or those in a list. What is no message
    has an exception: a ParseError, or that of a line that is no JSON."""
    waiting = [(place, value)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, list):
            waiting += reversed([(f"{place}[{position}]", each) for position, each in enumerate(value)])
            continue
        try:
            yield place, value, value if isinstance(value, Exception) else _message(value)
        except json_format.ParseError as error:
            yield place, value, error


def _message(given: Any) -> Message:
    """Raises ParseError."""
    names = given.keys() if isinstance(given, dict) else set[str]()
    if "payloadType" in names:
        try:
            return opened(given)
        except ValueError as error:
            raise json_format.ParseError(str(error)) from None
    admitted = given["admitted"] if "admitted" in names else None
    if "root" in names:
        kind: type[Message] = types_pb2.SignedHead
    elif {"index", "entry_hash"} <= names:
        kind = sequencer_pb2.HeadResponse
    elif {"header", "previous_hash"} <= names:
        kind = types_pb2.Receipt
    elif "header" in names:
        kind, given = sequencer_pb2.Entry, _without(given, {"decoded"})
    elif "results" in names:
        kind = generation_pb2.GenerateResponse
    elif "items" in names:
        kind = sequencer_pb2.GetResponse
    elif names & _EVENTS or (isinstance(admitted, dict) and "stamp" in admitted):
        kind = generation_pb2.GenerateEvent
    elif "admitted" in names:
        kind = sequencer_pb2.ItemRecord
    elif names & {"output", "status", "receipt"}:
        kind, given = types_pb2.Result, _without(given, ADDED)
    else:
        raise json_format.ParseError(f"it is no {_KINDS}")
    try:
        return json_format.ParseDict(given, kind())
    except RecursionError:
        raise json_format.ParseError("it is nested too deeply") from None


def _without(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}
