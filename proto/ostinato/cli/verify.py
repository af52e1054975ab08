"""`ostinato verify`: verifies receipts and entries from files alone, without a sidecar."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from ostinato import chain
from ostinato.cli import show
from ostinato.cli.session import STDIN, Session
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

_SQLITE = b"SQLite format 3\0"
"""The first bytes of a SQLite file."""


def verify(
    session: Session, file: Annotated[Path, typer.Argument(help="JSON or JSON lines; - is stdin.", show_default=False)]
) -> bool:
    """Verifies receipts and entries offline. Reads what generate, get and tail print with --json."""
    checks = Checks()
    name, content = _read(file)
    checks.read(name, content)
    if session.json:
        show.as_json(vars(checks.counts) | {"faults": checks.faults})
    else:
        for fault in checks.faults:
            show.line(show.visible(fault))
        if checks.counts.proofs:
            show.line(str(checks.counts))
    if not checks.counts.proofs:
        show.note(f"error: nothing to verify in {file}: {_nothing(content)}")
    return bool(checks.counts.proofs) and not checks.faults


def _read(path: Path) -> tuple[str, bytes]:
    """The file's name for messages, and its content."""
    if str(path) == STDIN:
        return "stdin", sys.stdin.buffer.read()
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None


def _lines(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Place and content of each line that is not blank. Only a line feed ends a line: texts contain other separators."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{name}:{number}", line.removesuffix(b"\r")


def _nothing(content: bytes) -> str:
    """Why there is nothing to verify."""
    if not content.strip():
        return "it has only blank lines" if content else "it is empty"
    return "it has no receipt, and no entry whose previous entry is known"


@dataclass
class Counts:
    """How many proofs there are, and how many of them are sound."""

    receipts: int = 0
    sound_receipts: int = 0
    entries: int = 0
    sound_entries: int = 0
    entries_on_trust: int = 0
    """Entries whose previous entry is unknown. The next entry names them; nothing else about them can be verified."""

    @property
    def proofs(self) -> int:
        return self.receipts + self.entries

    def __str__(self) -> str:
        parts = [f"{self.sound_receipts} of {self.receipts} receipts sound"] if self.receipts else []
        if self.entries:
            parts.append(f"{self.sound_entries} of {self.entries} entries sound")
        if self.entries_on_trust:
            parts.append(f"{self.entries_on_trust} taken on trust, without the entry before")
        return ", ".join(parts)


class Checks:
    """Collects the faults of JSON documents."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.counts = Counts()
        self._previous: sequencer_pb2.Entry | None = None

    def read(self, name: str, content: bytes) -> None:
        """A file of one JSON value, or of one per line. A file without JSON is one fault, not one per line."""
        if content.startswith(_SQLITE):
            self._fault(name, ["is a SQLite file: if it is a sidecar's journal, use `ostinato sidecar verify`"])
            return
        try:
            values = [(name, json.loads(content))]
        except (ValueError, RecursionError):
            first = len(self.faults)
            values = list(self._parsed(_lines(name, content)))
            if not values and (others := len(self.faults) - first - 1) > 0:
                self.faults[first + 1 :] = [f"{name}: the other {others} lines are not JSON either"]
        for place, value in values:
            self.take(place, value)

    def _parsed(self, lines: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Any]]:
        for place, line in lines:
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                self._fault(place, [f"not JSON: {error}"])

    def take(self, place: str, given: Any) -> None:
        """One JSON value: a message that contains proofs, or a list of messages."""
        if isinstance(given, list):
            for position, each in enumerate(given):
                self.take(f"{place}[{position}]", each)
            return
        try:
            self._take(place, given if isinstance(given, dict) else {})
        except (json_format.ParseError, RecursionError) as error:
            self._fault(place, [f"not a message of the contract: {error}"])
        except (AssertionError, struct.error):
            self._fault(place, ["has no digest: it contains NaN or a negative number"])

    def _take(self, place: str, given: dict[str, Any]) -> None:
        if "header" in given and "previous_hash" in given:
            self._receipt(place, chain.check_receipt(json_format.ParseDict(given, types_pb2.Receipt())))
        elif "header" in given:
            decoded = given.pop("decoded", None)
            self._entry(place, json_format.ParseDict(given, sequencer_pb2.Entry()), decoded)
        elif "results" in given:
            for result in json_format.ParseDict(given, generation_pb2.GenerateResponse()).results:
                self._result(place, result)
        elif "items" in given:
            for record in json_format.ParseDict(given, sequencer_pb2.GetResponse()).items:
                self._record(place, record)
        elif given.keys() & {"finished", "failed", "tokens", "restarted"} or _is_event(given):
            event = json_format.ParseDict(given, generation_pb2.GenerateEvent())
            if event.HasField("finished"):
                self._result(place, event.finished)
        elif "admitted" in given:
            self._record(place, json_format.ParseDict(given, sequencer_pb2.ItemRecord()))
        elif given.keys() & {"output", "status", "receipt"}:
            given = {name: value for name, value in given.items() if name not in ("line", "key")}  # of generate --output
            self._result(place, json_format.ParseDict(given, types_pb2.Result()))
        else:
            self._fault(place, ["is not a Result, GenerateResponse, GenerateEvent, ItemRecord, Receipt or Entry"])

    def _result(self, place: str, result: types_pb2.Result) -> None:
        if result.HasField("receipt"):
            self._receipt(f"{place}: sequence {result.sequence}", chain.check_result(result))
        elif result.HasField("output"):
            self._receipt(f"{place}: sequence {result.sequence}", ["receipt: missing"])

    def _record(self, place: str, record: sequencer_pb2.ItemRecord) -> None:
        place = f"{place}: sequence {record.admitted.sequence}"
        if record.result.HasField("receipt"):
            self._receipt(place, chain.check_record(record))
        elif record.result.HasField("output"):
            self._receipt(place, [*chain.check_record(record), "receipt: missing"])
        else:
            self._fault(place, chain.check_record(record))

    def _receipt(self, place: str, faults: list[str]) -> None:
        self.counts.receipts += 1
        self.counts.sound_receipts += not faults
        self._fault(place, faults)

    def _entry(self, place: str, entry: sequencer_pb2.Entry, decoded: object) -> None:
        previous, self._previous = self._previous, entry
        faults = _payload_faults(entry, decoded)
        if previous is None and entry.header.index != 1:
            self.counts.entries_on_trust += 1
        else:
            faults = chain.check_link(previous, entry) + faults
            self.counts.entries += 1
            self.counts.sound_entries += not faults
        self._fault(f"{place}: index {entry.header.index}", faults)

    def _fault(self, place: str, faults: Iterable[str]) -> None:
        self.faults.extend(f"{place}: {fault}" for fault in faults)


def _is_event(given: dict[str, Any]) -> bool:
    """Admitted events and ItemRecords both have the field `admitted`; only an event's has a stamp."""
    return isinstance(given.get("admitted"), dict) and "stamp" in given["admitted"]


def _payload_faults(entry: sequencer_pb2.Entry, decoded: object) -> list[str]:
    """Faults of an entry's payload and of its decoded form."""
    if not entry.payload:
        return ["decoded: there is no payload"] if decoded else []
    if chain.payload_digest(entry.payload) != entry.header.payload_digest:
        return ["payload: does not match payload_digest"]
    try:
        said = show.entry(entry).get("decoded")
    except DecodeError:
        return ["payload: cannot be decoded"]
    return ["decoded: differs from the payload"] if decoded not in (None, said) else []
