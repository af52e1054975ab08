"""Files of JSON: prompts, histories, and what the commands print with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.message import Message

from ostinato.cli.session import STDIN, usage
from ostinato.signature import opened
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

ADDED = {"line", "key"}
"""What `generate --output` puts before a Result."""
_BESIDE: Mapping[type[Message], set[str]] = {sequencer_pb2.Entry: {"decoded"}, types_pb2.Result: ADDED}
"""What the commands print beside a message's own fields."""
_KNOWN_BY: Sequence[tuple[set[str], type[Message]]] = (
    ({"root"}, types_pb2.SignedHead),
    ({"index", "entry_hash"}, sequencer_pb2.HeadResponse),
    ({"header", "previous_hash"}, types_pb2.Receipt),
    ({"header"}, sequencer_pb2.Entry),
    ({"results"}, generation_pb2.GenerateResponse),
    ({"items"}, sequencer_pb2.GetResponse),
    *(({name}, generation_pb2.GenerateEvent) for name in ("finished", "failed", "tokens", "restarted")),
    ({"admitted"}, sequencer_pb2.ItemRecord),
    *(({name}, types_pb2.Result) for name in ("output", "status", "receipt")),
)
"""The fields that a kind of message has; the first that fits counts."""
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
    kind = next((kind for fields, kind in _KNOWN_BY if fields <= names), None)
    if kind is None:
        raise json_format.ParseError(f"it is no {_KINDS}")
    if kind is sequencer_pb2.ItemRecord and isinstance(given["admitted"], dict) and "stamp" in given["admitted"]:
        kind = generation_pb2.GenerateEvent
    own = {name: value for name, value in given.items() if name not in _BESIDE.get(kind, ())}
    try:
        return json_format.ParseDict(own, kind())
    except RecursionError:
        raise json_format.ParseError("it is nested too deeply") from None
