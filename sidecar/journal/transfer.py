"""A journal as lines of JSON: export, import into an empty journal, and salvage of a damaged file.

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
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import msgspec
from google.protobuf import json_format

from ostinato.chain import GENESIS, OUTCOMES
from ostinato.digest import input_digest
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.derived import rebuilding
from sidecar.journal.ledger import SECRET_BYTES, twins_of
from sidecar.journal.maintenance import MISSING, Checker, check_signatures, name_of, pages, signatures_of, unsigned_fault
from sidecar.journal.model import FINGERPRINTS, JournalUnusable, Key, Log, Number, Sealed, Signature
from sidecar.journal.sql import SqlStore, SqlTables
from sidecar.journal.sqlite import UNREADABLE, SqliteTables
from sidecar.journal.store import PAGE

T = TypeVar("T")
FORMAT, VERSION = "ostinato journal", 1


# ---- export


def export(store: SqlStore) -> Iterator[str]:
    """The lines, without their ends. Raises JournalUnusable for a journal without entries."""
    with store.snapshot() as tables:
        log = tables.log()
        if log is None:
            raise JournalUnusable(f"{store.name} has no entries: name the journal that is to be exported")
        keys, sequence = list[Key](), 1
        while page := tables.keys(sequence, PAGE):
            keys += page
            sequence = page[-1].first_sequence + 1
        yield from _head_lines(log, keys, tables.notes(""), list(signatures_of(tables.signatures)))
        for entries in pages(tables.entries, store.name, payloads=True):
            yield from map(_entry_line, entries)


def _head_lines(
    log: Log, keys: Sequence[Key], notes: Mapping[str, bytes], signatures: Sequence[Signature], *, salvaged: bool = False
) -> Iterator[str]:
    counts = {"keys": str(len(keys)), "notes": str(len(notes)), "heads": str(len(signatures))}
    yield json.dumps({"format": FORMAT, "version": VERSION} | _json(log) | counts | ({"salvaged": True} if salvaged else {}))
    for key in keys:
        yield json.dumps({"key": _json(key)})
    for name, value in notes.items():
        yield json.dumps({"note": {"name": name, "value": _encoded(value)}})
    for signature in signatures:
        yield json.dumps({"head": _json(signature)})


def _entry_line(sealed: Sealed) -> str:
    entry = sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload)
    return json.dumps({"entry": json_format.MessageToDict(entry, preserving_proto_field_name=True)})


def _json(value: Log | Key | Signature) -> dict[str, object]:
    return {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}


def _encoded(value: object) -> object:
    match value:
        case int():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {key: _encoded(each) for key, each in value.items()}
        case _:
            return value


# ---- import


class LinesUnusable(JournalUnusable):
    """The lines are not a whole exported journal; the message says which line is wrong, and why."""


def take_in(store: SqlStore, lines: Iterable[str], writer: str | None, on_entries: Callable[[int, int], None]) -> Log:
    """Fill an empty journal from such lines: all of it, with its chain verified, or nothing. Raises LinesUnusable, and
    JournalUnusable where the journal is not empty. `on_entries` is given the entries so far and in all."""
    if store.log() is not None:
        raise JournalUnusable(f"{store.name} is not empty: import into an empty journal")
    numbered = enumerate(_decoded(lines), start=1)
    first = next(numbered, None)
    if first is None:
        raise LinesUnusable("is empty: it is no exported journal")
    log, counts, salvaged = _parsed(*first, _first_line)
    owner = writer or (next(iter(log.writers)) if len(log.writers) == 1 else "")
    if not owner:
        raise LinesUnusable(f"line 1: the log has several writers, name one that is to have it: {', '.join(log.writers)}")
    secret = os.urandom(SECRET_BYTES)
    with store.importing(log, owner, secret) as tables:
        importer = _Importer(log, tables, secret, on_entries)
        for number, line in numbered:
            _parsed(number, line, importer.take)
        importer.finish(counts)
        _check_tables(tables, log, salvaged=salvaged)
    return log


def _check_tables(tables: SqlTables, log: Log, *, salvaged: bool) -> None:
    """Raises LinesUnusable for keys that are not those of the entries, and for payloads that are missing without a PRUNED
    entry, or heads. What was `salvaged` may have lost these."""
    index = 1
    with rebuilding(tables) as rebuilt:
        while page := tables.entries(index, PAGE, payloads=True):
            rebuilt.add(page)
            index += len(page)
        if fault := next(rebuilt.faults(log, whole=True), ""):
            raise LinesUnusable(f"says other than its entries: {fault}")
        if not salvaged and (fault := next(rebuilt.missing_payloads(), "")):
            raise LinesUnusable(f"is not whole: {fault}")
    if not salvaged and (fault := unsigned_fault(tables)):
        raise LinesUnusable(f"is not whole: {fault}")


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of the lines that are no entries."""

    keys: Number
    notes: Number
    heads: Number = 0


class _Importer:
    """Writes lines to the tables, page by page."""

    def __init__(self, log: Log, tables: SqlTables, secret: bytes, on_entries: Callable[[int, int], None]) -> None:
        self._log, self._tables, self._secret, self._on_entries = log, tables, secret, on_entries
        self._checker = Checker()
        self._keys: list[Key] = []
        self._notes: dict[str, bytes] = {}
        self._signatures: list[Signature] = []
        self._page: list[Sealed] = []
        self._inputs: dict[int, bytes] = {}
        """Of items that have not ended, by sequence: as `twins_of`."""
        self._twins: list[tuple[bytes, Sealed]] = []
        """Of the page: inputs and COMPLETED entries."""
        self._index, self._hash = 0, GENESIS

    def take(self, told: dict[str, Any]) -> None:
        """One line. ValueError: what is wrong with it."""
        match told:
            case {"entry": dict(entry)}:
                self._entry(json_format.ParseDict(entry, sequencer_pb2.Entry()))
            case {"key": dict(key)}:
                self._keys.append(_value(Key, key))
            case {"note": {"name": str(name), "value": str(value)}}:
                if name in self._notes:
                    raise ValueError(f"note {name!r}: stands here twice")
                self._notes[name] = base64.b64decode(value, validate=True)
            case {"head": dict(head)}:
                self._signatures.append(_value(Signature, head))
                check_signatures(self._signatures[-2:], self._log.index)
            case _:
                raise ValueError("is no entry, key, note or head")

    def _entry(self, entry: sequencer_pb2.Entry) -> None:
        sealed = Sealed(entry.header, self._hash, entry.entry_hash, entry.payload)
        faults = self._checker.check(sealed)
        if entry.header.log_id != self._log.log_id:
            faults.append("log_id: is not that of line 1")
        if faults:
            raise ValueError(f"entry {entry.header.index}: {'; '.join(faults)}")
        self._index, self._hash = entry.header.index, entry.entry_hash
        self._page.append(sealed)
        self._find_twin(sealed)
        if len(self._page) == PAGE:
            self._flush()

    def _find_twin(self, sealed: Sealed) -> None:
        header = sealed.header
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and sealed.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(sealed.payload)
            digest = input_digest(given.token_ids, given.parameters, given.seed)
            self._inputs[header.sequence] = twins_of(given.tenant, digest)
        elif header.kind in OUTCOMES:
            name, completed = self._inputs.pop(header.sequence, b""), header.kind == types_pb2.ENTRY_KIND_COMPLETED
            self._twins += [(name, sealed)] if name and completed and sealed.payload else []

    def _flush(self) -> None:
        self._tables.import_entries(self._page)
        self._tables.import_twins(self._secret, self._twins)
        self._page.clear()
        self._twins.clear()
        self._on_entries(self._index, self._log.index)

    def finish(self, counts: _Counts) -> None:
        """Raises LinesUnusable if this is not all that line 1 said."""
        self._flush()
        if (self._index, self._hash) != (self._log.index, self._log.entry_hash):
            raise LinesUnusable(f"ends at entry {self._index} of {self._log.index}: it is not whole")
        if _Counts(len(self._keys), len(self._notes), len(self._signatures)) != counts:
            raise LinesUnusable("keys, notes or heads are missing: it is not whole")
        for index in self._checker.missing.values():
            raise LinesUnusable(f"entry {index}, ADMITTED: {MISSING}")
        if self._checker.last_sequence != self._log.last_sequence:
            raise LinesUnusable("line 1: last_sequence is not that of the entries")
        self._tables.import_keys(self._keys)
        self._tables.write_notes(self._notes)
        self._tables.write_signatures(self._signatures)


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    """Raises LinesUnusable where a file is not text."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except UnicodeDecodeError as error:
        raise LinesUnusable(f"is not UTF-8 text after line {number}: it is no exported journal") from error


def _parsed(number: int, line: str, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        if not line.strip():
            raise ValueError("is blank")
        told = json.loads(line)
        if not isinstance(told, dict):
            raise ValueError("is no JSON object")
        return parse(told)
    except RecursionError as error:
        raise LinesUnusable(f"line {number}: is nested too deeply") from error
    except (ValueError, TypeError, AttributeError, OverflowError, msgspec.ValidationError, json_format.ParseError) as error:
        raise LinesUnusable(f"line {number}: {error}") from error


def _first_line(told: dict[str, Any]) -> tuple[Log, _Counts, bool]:
    """The log, how many keys, notes and heads there are, and whether the lines were salvaged."""
    if told.get("format") != FORMAT or told.get("version") != VERSION:
        raise ValueError(f"is not the first line of an exported journal of version {VERSION}")
    return _value(Log, told), _value(_Counts, told), told.get("salvaged") is True


def _value(kind: type[T], told: object) -> T:
    """Inverse of `_json`. Raises ValueError, also for a number that no database could hold."""
    return msgspec.convert(told, kind, strict=False)


# ---- salvage


@dataclass(frozen=True, slots=True)
class SoundPart:
    """The beginning of a damaged journal that is sound, in whole batches."""

    log: Log
    """As it was there."""
    unfinished: frozenset[int]
    """Sequences without an outcome there."""
    fault: str
    """What is wrong after it; empty: nothing."""


def sound_part(tables: SqliteTables, name: str) -> SoundPart:
    """Raises JournalUnusable where not even the first entry is sound. `name`: of the journal, for that error."""
    part, dropped = _read_until(None, tables, name)
    # An item that has not ended where the journal is cut must have its payload: it will run again.
    end = until = part.log.index + 1
    while earlier := [admitted for admitted, ended in dropped if admitted < until <= ended]:
        until = min(earlier)
    if until < end:
        part = replace(_read_until(until, tables, name)[0], fault=f"entry {until}, ADMITTED: {MISSING}")
    return part


def _read_until(end: int | None, tables: SqliteTables, name: str) -> tuple[SoundPart, list[tuple[int, float]]]:
    """The sound part before the entry with this index; and for items without a payload the indexes of admission and outcome."""
    checker, fault = Checker(), ""
    log, unfinished, dropped = None, frozenset[int](), list[tuple[int, float]]()
    for sealed in _readable(tables):
        if isinstance(sealed, str):
            fault = sealed
            break
        if sealed.header.index == end:
            break
        if sealed.header.kind in OUTCOMES and sealed.header.sequence in checker.missing:
            dropped.append((checker.missing[sealed.header.sequence], sealed.header.index))
        if faults := checker.check(sealed):
            fault = f"{name_of(sealed.header)}: {faults[0]}"
            break
        if checker.whole:
            header, epochs = sealed.header, dict(checker.epochs)
            log = Log(header.log_id, epochs, header.index, sealed.entry_hash, checker.last_sequence)
            unfinished = frozenset(checker.unfinished)
    if log is None:
        raise JournalUnusable(f"{name}: not even the first entry is sound: {fault or 'there is none'}")
    return SoundPart(log, unfinished, fault), [*dropped, *((index, float("inf")) for index in checker.missing.values())]


def _readable(tables: SqliteTables) -> Iterator[Sealed | str]:
    """Every entry up to the first that cannot be read; then why not."""
    index, limit = 1, PAGE
    while True:
        try:
            page = tables.entries(index, limit, payloads=True)
        except UNREADABLE as error:
            if limit == 1:
                yield f"entry {index}: {error}"
                return
            limit = 1  # read on one by one, as far as possible
            continue
        if not page:
            return
        yield from page
        index += len(page)


def _entries(tables: SqliteTables, part: SoundPart) -> Iterator[Sealed]:
    for sealed in _readable(tables):
        if isinstance(sealed, str) or sealed.header.index > part.log.index:
            return
        yield sealed


def sound_keys(tables: SqliteTables, part: SoundPart) -> tuple[list[Key], str]:
    """The keys of batches in the part. If their table cannot be read: those in the prompts that are kept, and the reason.

    A key whose batch ended after the part is bound until the batch has ended again; one taken from a prompt, for good."""
    try:
        listed = tables.keys(1, part.log.last_sequence + 1)
    except UNREADABLE as error:
        return _keys_in_prompts(tables, part), str(error)
    found: list[Key] = []
    for key in listed:
        batch = range(key.first_sequence, key.first_sequence + key.count)
        if batch[-1] <= part.log.last_sequence:
            open_again = not part.unfinished.isdisjoint(batch)
            found.append(replace(key, expires_millis=None) if open_again else key)
    return found, ""


def _keys_in_prompts(tables: SqliteTables, part: SoundPart) -> list[Key]:
    found: dict[tuple[str, str], Key] = {}
    for sealed in _entries(tables, part):
        header = sealed.header
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and header.sequence == header.first_sequence and sealed.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(sealed.payload)
            if given.idempotency_key:
                bound = (given.tenant, given.idempotency_key)
                found[bound] = Key(*bound, given.request_digest, header.first_sequence, header.count, None)
    return sorted(found.values(), key=lambda key: key.first_sequence)


def sound_lines(tables: SqliteTables, part: SoundPart, keys: Sequence[Key]) -> Iterator[str]:
    """As `export`, of the part. Fingerprints and heads that cannot be read are left out, and so are other notes."""
    notes, signatures = dict[str, bytes](), list[Signature]()
    with suppress(*UNREADABLE):
        notes = tables.notes(FINGERPRINTS)
    with suppress(*UNREADABLE, ValueError):
        readable = [each for each in signatures_of(tables.signatures) if each.last_index <= part.log.index]
        check_signatures(readable, part.log.index)
        signatures = readable
    yield from _head_lines(part.log, keys, notes, signatures, salvaged=True)
    yield from map(_entry_line, _entries(tables, part))
