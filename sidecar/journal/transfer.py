"""A journal as lines of JSON: export, and import into an empty journal.

The first line says what it is, how long, and where its chain ends, so that half a file is recognised. Then there is one line
for each key, note, signed head and entry, in this order. Entries are in protobuf's own JSON form: 64-bit numbers are strings,
bytes base64.

The log's secret stays where it is: payloads have their nonces and seeds. An imported journal gets a new one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import msgspec
from google.protobuf import json_format

from ostinato.chain import GENESIS, OUTCOMES
from ostinato.digest import input_digest
from ostinato.signature import PublicKeys
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.derived import rebuilding
from sidecar.journal.ledger import SECRET_BYTES, twins_of
from sidecar.journal.maintenance import Heads, pages, signatures_of
from sidecar.journal.model import JournalUnusable, Key, Log, Note, Number, Sealed, Signature
from sidecar.journal.sql import SqlStore
from sidecar.journal.store import PAGE

T = TypeVar("T")
FORMAT, VERSION = "ostinato journal", 1


# ---- export


def export(store: SqlStore) -> Iterator[str]:
    """The lines, without their ends. Raises JournalUnusable for a journal without entries, and Unsound."""
    with store.snapshot() as tables:
        log = tables.log()
        if log is None:
            raise JournalUnusable(f"{store.name} has no entries: name the journal that is to be exported")
        keys, sequence = list[Key](), 1
        while page := tables.keys(sequence, PAGE):
            keys += page
            sequence = page[-1].first_sequence + 1
        notes, heads = tables.notes(""), list(signatures_of(tables))
        counts = _Counts(len(keys), len(notes), len(heads))
        yield json.dumps({"format": FORMAT, "version": VERSION} | _json(asdict(log)) | _json(asdict(counts)))
        yield from (_line("key", asdict(key)) for key in keys)
        yield from (_line("note", {"name": name, "value": value}) for name, value in notes.items())
        yield from (_line("head", asdict(head)) for head in heads)
        for entries in pages(tables.entries, store.name):
            for sealed in entries:
                entry = sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload)
                yield json.dumps({"entry": json_format.MessageToDict(entry, preserving_proto_field_name=True)})


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of the lines before the entries."""

    keys: Number
    notes: Number
    heads: Number = 0


def _line(kind: str, value: dict[str, Any]) -> str:
    return json.dumps({kind: _json(value)})


def _json(value: Any) -> Any:
    match value:
        case int():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {key: _json(each) for key, each in value.items()}
        case _:
            return value


# ---- import


class _Lines:
    """The lines of an export."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self._lines, self._name, self._number = iter(lines), name, 0

    def take(self, parse: Callable[[dict[str, Any]], T], kind: str = "") -> T:
        """The next one, or what it has of this kind, parsed. Raises JournalUnusable that names it."""
        self._number += 1
        try:
            line = next(self._lines, None)
            if line is None and self._number == 1:
                raise JournalUnusable(f"{self._name} is empty: it is no exported journal")
            if line is None or not line.strip():
                raise ValueError("is missing" if line is None else "is blank")
            told = json.loads(line)
            if isinstance(told, dict) and kind:
                told = told.get(kind)
            if not isinstance(told, dict):
                raise ValueError(f"is no {kind or 'JSON object'}")
            return parse(told)
        except RecursionError as error:
            raise JournalUnusable(f"{self._name} line {self._number}: is nested too deeply") from error
        except (ValueError, TypeError, AttributeError, OverflowError, msgspec.ValidationError, json_format.ParseError) as error:
            raise JournalUnusable(f"{self._name} line {self._number}: {error}") from error

    def values(self, count: int, kind: str, type_: type[T]) -> list[T]:
        """The next ones, of one kind."""
        return [self.take(lambda told: _value(type_, told), kind) for _ in range(count)]

    def end(self) -> None:
        """Raises JournalUnusable if there is another."""
        try:
            more = next(self._lines, None) is not None
        except UnicodeDecodeError:
            more = True
        if more:
            raise JournalUnusable(f"{self._name} goes on after line {self._number}, where its entries end")


def take_in(
    store: SqlStore, lines: Iterable[str], name: str, writer: str | None, on_entries: Callable[[int, int], None]
) -> Log:
    """Fill an empty journal from such lines: all of it, with its chain verified, or nothing. Raises JournalUnusable. `name`: of
    the lines. `on_entries` is given the entries so far and in all."""
    if store.log() is not None:
        raise JournalUnusable(f"{store.name} is not empty: import into an empty journal")
    given = _Lines(lines, name)
    log, counts = given.take(_first_line)
    owner = writer or (next(iter(log.writers)) if len(log.writers) == 1 else "")
    if not owner:
        raise JournalUnusable(f"{name} has several writers, name one that is to have it: {', '.join(log.writers)}")
    keys = given.values(counts.keys, "key", Key)
    notes = {note.name: note.value for note in given.values(counts.notes, "note", Note)}
    if len(notes) < counts.notes:
        raise JournalUnusable(f"{name}: a note stands there twice")
    signatures = given.values(counts.heads, "head", Signature)
    heads = Heads(iter(signatures), PublicKeys(), log.index)
    secret, inputs = os.urandom(SECRET_BYTES), dict[int, bytes]()
    with store.importing(log, owner, secret) as tables, rebuilding(tables) as rebuilt:
        for page in pages(_entries(given, log), name):
            tables.write_record(page)
            rebuilt.add(page)
            heads.add(page)
            tables.import_twins(secret, _twins(page, inputs))
            on_entries(page[-1].header.index, log.index)
        given.end()
        rebuilt.write_items()
        tables.import_keys(keys)
        tables.write_notes(notes)
        tables.write_signatures(signatures)
        if fault := rebuilt.fault(log, whole=True) or rebuilt.missing_payload() or heads.fault:
            raise JournalUnusable(f"{name} is not whole: {fault}")
    return log


def _first_line(told: dict[str, Any]) -> tuple[Log, _Counts]:
    if told.get("format") != FORMAT or told.get("version") != VERSION:
        raise ValueError(f"is not the first line of an exported journal of version {VERSION}")
    return _value(Log, told), _value(_Counts, told)


def _value(kind: type[T], told: object) -> T:
    """Inverse of `_json`. Raises ValueError, also for a number that no database could hold."""
    return msgspec.convert(told, kind, strict=False)


def _entries(lines: _Lines, log: Log) -> Callable[..., Sequence[Sealed]]:
    """Reads consecutive entries, as `SqlTables.entries`."""
    previous_hash = GENESIS

    def sealed(told: dict[str, Any]) -> Sealed:
        nonlocal previous_hash
        entry = json_format.ParseDict(told, sequencer_pb2.Entry())
        found, previous_hash = Sealed(entry.header, previous_hash, entry.entry_hash, entry.payload), entry.entry_hash
        return found

    return lambda index, limit, payloads: [lines.take(sealed, "entry") for _ in range(min(limit, log.index + 1 - index))]


def _twins(page: Sequence[Sealed], inputs: dict[int, bytes]) -> Iterator[tuple[bytes, Sealed]]:
    """Inputs and COMPLETED entries of the page. `inputs`: of items that have not ended, by sequence, as `twins_of`."""
    for sealed in page:
        header = sealed.header
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and sealed.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(sealed.payload)
            digest = input_digest(given.token_ids, given.parameters, given.seed)
            inputs[header.sequence] = twins_of(given.tenant, digest)
        elif header.kind in OUTCOMES:
            name, completed = inputs.pop(header.sequence, b""), header.kind == types_pb2.ENTRY_KIND_COMPLETED
            if name and completed and sealed.payload:
                yield name, sealed
