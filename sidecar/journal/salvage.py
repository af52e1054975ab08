"""What is sound of a damaged journal in a file: the entries before the first that is not, as lines that can be taken in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import apsw

from ostinato.chain import OUTCOMES
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal import FINGERPRINTS, JournalUnusable, Sealed
from sidecar.journal.diagnosis import place_fault, reason
from sidecar.journal.keeping import Key, Log
from sidecar.journal.tables import UNREADABLE, Tables
from sidecar.journal.transfer import head_line, line_of_entry, line_of_key, line_of_note
from sidecar.journal.verify import MISSING, PAGE, Checker, name_of


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
                yield Tables(db)
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
    part, dropped = _read(tables, name, None)
    # What has not ended where the journal is cut has to have its payload: it will run again.
    end = until = part.log.index + 1
    while earlier := [admitted for admitted, ended in dropped if admitted < until <= ended]:
        until = min(earlier)
    if until < end:
        part = replace(_read(tables, name, until)[0], fault=f"entry {until}, ADMITTED: {MISSING}")
    return part


def _read(tables: Tables, name: str, until: int | None) -> tuple[Part, list[tuple[int, float]]]:
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


def lines(tables: Tables, part: Part, keys: Sequence[Key]) -> Iterator[str]:
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
        listed = [Key(*row) for row in tables.keys(1, part.log.last_sequence + 1)]
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
