"""A journal as lines of JSON, from one backend into another.

The first line says what it is, how long, and where its chain ends; so half a file is known for one. Then one line a key, a note
and an entry, in this order. Entries are in protobuf's own JSON form: 64-bit numbers as strings, bytes in base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf import json_format

from ostinato.chain import GENESIS
from ostinato.v1 import sequencer_pb2

from sidecar.journal import JournalUnusable, Sealed
from sidecar.journal.keeping import Filler, Kept, Key, Log, pages
from sidecar.journal.ledger import NUMBER_MAX
from sidecar.journal.verify import PAGE, Checker

T = TypeVar("T")
FORMAT, VERSION = "ostinato journal", 1


def export(kept: Kept) -> Iterator[str]:
    """The lines, without their ends. Raises JournalUnusable for a journal with nothing in it."""
    with kept.snapshot():
        log = kept.log()
        if log is None:
            raise JournalUnusable(f"{kept.name} has no entries: name the journal that is to be exported")
        keys, notes = list(_keys(kept)), kept.notes("")
        yield head_line(log, len(keys), len(notes))
        yield from map(line_of_key, keys)
        yield from (line_of_note(name, value) for name, value in notes.items())
        for page in pages(kept, payloads=True):
            yield from map(line_of_entry, page)


def head_line(log: Log, keys: int, notes: int) -> str:
    """The first one."""
    return json.dumps(_head(log, keys, notes))


def line_of_key(key: Key) -> str:
    """One of those that follow."""
    return json.dumps({"key": _of_key(key)})


def line_of_note(name: str, value: bytes) -> str:
    """One of those that follow the keys."""
    return json.dumps({"note": {"name": name, "value": _base64(value)}})


def line_of_entry(sealed: Sealed) -> str:
    """One of the rest."""
    entry = sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload)
    return json.dumps({"entry": json_format.MessageToDict(entry, preserving_proto_field_name=True)})


class LinesUnusable(JournalUnusable):
    """What was to be taken in is no whole exported journal; the message says which line, and what is wrong with it."""


def take_in(kept: Kept, lines: Iterable[str], writer: str | None, on_entries: Callable[[int, int], None]) -> Log:
    """Fill an empty journal from such lines: all of it, with its chain verified, or nothing. Raises LinesUnusable, and
    JournalUnusable where the journal is not empty. `on_entries` is told how many there are of how many."""
    if kept.log() is not None:
        raise JournalUnusable(f"{kept.name} is not empty: take another in only where there is none")
    numbered = enumerate(_decoded(lines), start=1)
    first = next(numbered, None)
    if first is None:
        raise LinesUnusable("is empty: it is no exported journal")
    log, keys_count, notes_count = _read(*first, _log)
    owner = writer or (next(iter(log.writers)) if len(log.writers) == 1 else "")
    if not owner:
        raise LinesUnusable(f"line 1: the log has several writers, name one that is to have it: {', '.join(log.writers)}")
    with kept.filling(log, owner) as filler:
        reader = _Reader(log, filler, on_entries)
        for number, line in numbered:
            _read(number, line, reader.take)
        reader.finish(keys_count, notes_count)
    return log


class _Reader:
    """What has come so far."""

    def __init__(self, log: Log, filler: Filler, on_entries: Callable[[int, int], None]) -> None:
        self._log, self._filler, self._on_entries = log, filler, on_entries
        self._checker = Checker()
        self._keys: list[Key] = []
        self._notes: dict[str, bytes] = {}
        self._page: list[Sealed] = []
        self._index, self._hash = 0, GENESIS

    def take(self, told: dict[str, Any]) -> None:
        """One line. ValueError: what is wrong with it."""
        match told:
            case {"entry": dict(entry)}:
                self._entry(json_format.ParseDict(entry, sequencer_pb2.Entry()))
            case {"key": dict(key)}:
                self._keys.append(_key(key))
            case {"note": {"name": str(name), "value": str(value)}}:
                if name in self._notes:
                    raise ValueError(f"note {name!r}: stands here twice")
                self._notes[name] = base64.b64decode(value, validate=True)
            case _:
                raise ValueError("is no entry, key or note")

    def _entry(self, entry: sequencer_pb2.Entry) -> None:
        sealed = Sealed(entry.header, self._hash, entry.entry_hash, entry.payload)
        faults = self._checker.check(sealed)
        if entry.header.log_id != self._log.log_id:
            faults.append("log_id: is not that of line 1")
        if faults:
            raise ValueError(f"entry {entry.header.index}: {'; '.join(faults)}")
        self._index, self._hash = entry.header.index, entry.entry_hash
        self._page.append(sealed)
        if len(self._page) == PAGE:
            self._flush()

    def _flush(self) -> None:
        self._filler.entries(self._page)
        self._page.clear()
        self._on_entries(self._index, self._log.index)

    def finish(self, keys_count: int, notes_count: int) -> None:
        """Raises LinesUnusable if this is not all that line 1 said."""
        self._flush()
        if (self._index, self._hash) != (self._log.index, self._log.entry_hash):
            raise LinesUnusable(f"ends at entry {self._index} of {self._log.index}: it is not whole")
        if (len(self._keys), len(self._notes)) != (keys_count, notes_count):
            raise LinesUnusable("keys or notes are missing: it is not whole")
        if self._checker.last_sequence != self._log.last_sequence:
            raise LinesUnusable("line 1: last_sequence is not that of the entries")
        self._filler.keys(self._keys)
        self._filler.notes(self._notes)


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    """Raises LinesUnusable where a file is not text."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except UnicodeDecodeError as error:
        raise LinesUnusable(f"is not UTF-8 text after line {number}: it is no exported journal") from error


def _read(number: int, line: str, read: Callable[[dict[str, Any]], T]) -> T:
    try:
        if not line.strip():
            raise ValueError("is blank")
        told = json.loads(line)
        if not isinstance(told, dict):
            raise ValueError("is no JSON object")
        return read(told)
    except KeyError as error:
        raise LinesUnusable(f"line {number}: {error} is missing") from error
    except RecursionError as error:
        raise LinesUnusable(f"line {number}: is nested too deeply") from error
    except (ValueError, TypeError, AttributeError, OverflowError, json_format.ParseError) as error:
        raise LinesUnusable(f"line {number}: {error}") from error


def _head(log: Log, keys: int, notes: int) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "log_id": log.log_id,
        "writers": {name: str(epoch) for name, epoch in log.writers.items()},
        "index": str(log.index),
        "entry_hash": _base64(log.entry_hash),
        "last_sequence": str(log.last_sequence),
        "keys": str(keys),
        "notes": str(notes),
    }


def _log(told: dict[str, Any]) -> tuple[Log, int, int]:
    if told.get("format") != FORMAT or told.get("version") != VERSION:
        raise ValueError(f"is not the first line of an exported journal of version {VERSION}")
    writers = {str(name): _number(epoch) for name, epoch in told["writers"].items()}
    entry_hash = base64.b64decode(told["entry_hash"], validate=True)
    log = Log(str(told["log_id"]), writers, _number(told["index"]), entry_hash, _number(told["last_sequence"]))
    return log, _number(told["keys"]), _number(told["notes"])


def _keys(kept: Kept) -> Iterator[Key]:
    sequence = 1
    while page := kept.keys(sequence, PAGE):
        yield from page
        sequence = page[-1].first_sequence + 1


def _of_key(key: Key) -> dict[str, object]:
    return {
        "tenant": key.tenant,
        "key": key.key,
        "request_digest": _base64(key.request_digest),
        "first_sequence": str(key.first_sequence),
        "count": str(key.count),
        "expires_millis": None if key.expires_millis is None else str(key.expires_millis),
    }


def _key(told: dict[str, Any]) -> Key:
    expires = told["expires_millis"]
    return Key(
        str(told["tenant"]),
        str(told["key"]),
        base64.b64decode(told["request_digest"], validate=True),
        _number(told["first_sequence"]),
        _number(told["count"]),
        None if expires is None else _number(expires),
    )


def _number(told: object) -> int:
    """Raises ValueError for what no database could hold."""
    number = int(str(told))
    if not 0 <= number <= NUMBER_MAX:
        raise ValueError(f"{number} is not 0 to {NUMBER_MAX}")
    return number


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()
