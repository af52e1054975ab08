"""A journal as lines of JSON: export from one store, import into another, and salvage of a damaged file.

The first line says what it is, how long, and where its chain ends; so half a file is recognised as such. Then one line a key, a
note and an entry, in this order. Entries are in protobuf's own JSON form: 64-bit numbers as strings, bytes in base64.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import apsw
from google.protobuf import json_format

from ostinato.chain import GENESIS, OUTCOMES
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.diagnosis import place_fault, reason
from sidecar.journal.ledger import NUMBER_MAX
from sidecar.journal.maintenance import MISSING, Checker, name_of, pages
from sidecar.journal.model import FINGERPRINTS, JournalUnusable, Key, Log, Sealed
from sidecar.journal.sqlite import UNREADABLE, SqliteTables
from sidecar.journal.store import PAGE, SqlStore, Tables

T = TypeVar("T")
FORMAT, VERSION = "ostinato journal", 1


def export(store: SqlStore) -> Iterator[str]:
    """The lines, without their ends. Raises JournalUnusable for a journal with nothing in it."""
    with store.snapshot():
        log = store.log()
        if log is None:
            raise JournalUnusable(f"{store.name} has no entries: name the journal that is to be exported")
        keys, notes = list(_keys(store)), store.notes("")
        yield head_line(log, len(keys), len(notes))
        yield from map(line_of_key, keys)
        yield from (line_of_note(name, value) for name, value in notes.items())
        for page in pages(store, payloads=True):
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


def take_in(store: SqlStore, lines: Iterable[str], writer: str | None, on_entries: Callable[[int, int], None]) -> Log:
    """Fill an empty journal from such lines: all of it, with its chain verified, or nothing. Raises LinesUnusable, and
    JournalUnusable where the journal is not empty. `on_entries` is told how many there are of how many."""
    if store.log() is not None:
        raise JournalUnusable(f"{store.name} is not empty: take another in only where there is none")
    numbered = enumerate(_decoded(lines), start=1)
    first = next(numbered, None)
    if first is None:
        raise LinesUnusable("is empty: it is no exported journal")
    log, keys_count, notes_count = _read(*first, _log)
    owner = writer or (next(iter(log.writers)) if len(log.writers) == 1 else "")
    if not owner:
        raise LinesUnusable(f"line 1: the log has several writers, name one that is to have it: {', '.join(log.writers)}")
    with store.importing(log, owner) as tables:
        reader = _Reader(log, tables, on_entries)
        for number, line in numbered:
            _read(number, line, reader.take)
        reader.finish(keys_count, notes_count)
    return log


class _Reader:
    """What has come so far."""

    def __init__(self, log: Log, tables: Tables, on_entries: Callable[[int, int], None]) -> None:
        self._log, self._tables, self._on_entries = log, tables, on_entries
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
        self._tables.import_entries(self._page)
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
        self._tables.import_keys(self._keys)
        self._tables.write_notes(self._notes)


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


def _keys(store: SqlStore) -> Iterator[Key]:
    sequence = 1
    while page := store.keys(sequence, PAGE):
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


@dataclass(frozen=True, slots=True)
class Part:
    """The beginning of a journal that is sound, in whole batches."""

    log: Log
    """As it stood there."""
    unfinished: frozenset[int]
    """Sequences without an outcome there."""
    fault: str
    """What is wrong behind it; empty: nothing."""


@contextmanager
def copied(path: Path) -> Iterator[Tables]:
    """Reads a copy, in the system's folder for temporary files: the damaged file stays as it is. Raises JournalUnusable for a
    file that is in use, is no journal, or cannot be copied."""
    if fault := place_fault(path, create=False):
        raise JournalUnusable(fault)
    _probe(path)
    with TemporaryDirectory(prefix="ostinato-") as folder:
        copy = Path(folder) / "journal.sqlite"
        for ending in ("", "-wal"):
            if (source := path.with_name(path.name + ending)).exists():
                shutil.copyfile(source, copy.with_name(copy.name + ending))
        try:
            with closing(apsw.Connection(str(copy))) as db:
                db.pragma("writable_schema", True)  # or a file that is shorter than its header says is refused
                yield SqliteTables(db)
        except UNREADABLE as error:
            raise JournalUnusable(reason(copy, error).replace(str(copy), str(path))) from error


def _probe(path: Path) -> None:
    """Raises JournalUnusable for a file that is in use, or that SQLite cannot read at all."""
    try:
        with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as db:
            db.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except (apsw.BusyError, apsw.NotADBError) as error:
        raise JournalUnusable(reason(path, error)) from error
    except apsw.Error:
        pass  # it is damaged


def sound_part(tables: Tables, name: str) -> Part:
    """How far the journal is sound. Raises JournalUnusable where not even its beginning is. `name`: for that error."""
    part, dropped = _read_part(tables, name, None)
    # What has not ended where the journal is cut has to have its payload: it will run again.
    end = until = part.log.index + 1
    while earlier := [admitted for admitted, ended in dropped if admitted < until <= ended]:
        until = min(earlier)
    if until < end:
        part = replace(_read_part(tables, name, until)[0], fault=f"entry {until}, ADMITTED: {MISSING}")
    return part


def _read_part(tables: Tables, name: str, until: int | None) -> tuple[Part, list[tuple[int, float]]]:
    """The sound part before the entry with this index. And of items without a payload the indexes of ADMITTED and outcome."""
    checker, fault = Checker(), ""
    log, unfinished, ended = None, frozenset[int](), list[tuple[int, float]]()
    for sealed in _readable(tables):
        if isinstance(sealed, str):
            fault = sealed
            break
        if sealed.header.index == until:
            break
        if sealed.header.kind in OUTCOMES and sealed.header.sequence in checker.missing:
            ended.append((checker.missing[sealed.header.sequence], sealed.header.index))
        if faults := checker.check(sealed):
            fault = f"{name_of(sealed.header)}: {faults[0]}"
            break
        if checker.whole:
            header, epochs = sealed.header, dict(checker.epochs)
            log = Log(header.log_id, epochs, header.index, sealed.entry_hash, checker.last_sequence)
            unfinished = frozenset(checker.unfinished)
    if log is None:
        raise JournalUnusable(f"{name}: not even the first entry is sound: {fault or 'there is none'}")
    return Part(log, unfinished, fault), [*ended, *((index, float("inf")) for index in checker.missing.values())]


def sound_lines(tables: Tables, part: Part, keys: Sequence[Key]) -> Iterator[str]:
    """Of the part, as `transfer.export` has them. Fingerprints that cannot be read are left out."""
    notes = _fingerprints(tables)
    yield head_line(part.log, len(keys), len(notes))
    yield from map(line_of_key, keys)
    yield from (line_of_note(name, value) for name, value in notes.items())
    for sealed in _readable(tables):
        if isinstance(sealed, str) or sealed.header.index > part.log.index:
            return
        yield line_of_entry(sealed)


def _readable(tables: Tables) -> Iterator[Sealed | str]:
    """Every entry, up to the first that cannot be read; then why not."""
    index, limit = 1, PAGE
    while True:
        try:
            page: Sequence[Sealed] = tables.entries(index, limit, payloads=True)
        except UNREADABLE as error:
            if limit == 1:
                yield f"entry {index}: {error}"
                return
            limit = 1  # to come as near to it as can be
            continue
        if not page:
            return
        yield from page
        index += len(page)


def keys_of(tables: Tables, part: Part) -> tuple[list[Key], str]:
    """Those of batches in the part; and why their table could not be read, where they are taken from the prompts that are kept.
    One whose batch had ended behind the part is bound until it has ended again; one taken from a prompt, for good."""
    try:
        listed = tables.keys(1, part.log.last_sequence + 1)
    except UNREADABLE as error:
        return _keys_of_prompts(tables, part), str(error)
    found: list[Key] = []
    for key in listed:
        batch = range(key.first_sequence, key.first_sequence + key.count)
        if batch[-1] <= part.log.last_sequence:
            open_again = not part.unfinished.isdisjoint(batch)
            found.append(replace(key, expires_millis=None) if open_again else key)
    return found, ""


def _keys_of_prompts(tables: Tables, part: Part) -> list[Key]:
    found: dict[tuple[str, str], Key] = {}
    for sealed in _readable(tables):
        if isinstance(sealed, str) or sealed.header.index > part.log.index:
            break
        header = sealed.header
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and header.sequence == header.first_sequence and sealed.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(sealed.payload)
            if given.idempotency_key:
                bound = (given.tenant, given.idempotency_key)
                found[bound] = Key(*bound, given.request_digest, header.first_sequence, header.count, None)
    return sorted(found.values(), key=lambda key: key.first_sequence)


def _fingerprints(tables: Tables) -> dict[str, bytes]:
    try:
        return tables.notes(FINGERPRINTS)
    except UNREADABLE:
        return {}
