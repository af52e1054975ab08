"""`python -m sidecar COMMAND`: the commands for a journal. A journal in a file must not be open in a sidecar."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from ostinato.chain import SEQUENCE_MAX
from ostinato.cli.show import note, progress, visible
from ostinato.cli.verify import public_keys
from ostinato.errors import JournalFull, JournalUnavailable, RecordDamaged
from ostinato.signature import new_key
from ostinato.v1 import types_pb2
from serving.program import FAILED, StartupError
from serving.settings import lookup

from sidecar.config import Settings, is_shared, journal_fault, mark_of
from sidecar.journal import maintenance, transfer
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalBroken, JournalUnusable, Loss
from sidecar.journal.sql import SqlStore
from sidecar.opening import check_verified, open_for_maintenance, open_journal, read_signer

_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
"""Seconds by unit."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

JOURNAL = Settings().journal


def _from_file(context: typer.Context, file: str | None) -> str | None:
    """Makes the settings file the default of flags and environment."""
    context.default_map = {name: _setting(name, {}, file) for name in ("journal", "high_water")}
    return file


def _named(context: typer.Context, journal: str) -> str:
    """The journal. Raises BadParameter, and JournalUnusable for a server that would not be verified."""
    if fault := journal_fault(journal):
        raise typer.BadParameter(fault)
    if is_shared(journal) and not _setting("allow_unverified_database", os.environ, context.params.get("config")):
        check_verified(journal)
    return journal


def _setting(name: str, environ: Mapping[str, str], file: str | None) -> Any:
    try:
        return lookup(Settings, "sidecar", name, environ, file)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Journal = Annotated[
    str,
    typer.Option(
        envvar="OSTINATO_SIDECAR_JOURNAL",
        callback=_named,
        show_default=JOURNAL,  # not that of the settings file, which may have a password
        help="The journal's file, or its postgresql:// URL.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        envvar="OSTINATO_SIDECAR_CONFIG",
        callback=_from_file,
        is_eager=True,
        metavar="FILE",
        help="The sidecar's settings file, for what is not given here.",
    ),
]


def main(argv: Sequence[str]) -> None:
    """Ends the process: code 0, 1 if the journal is not sound or cannot be used, 2 for a bad command line."""
    try:
        app(args=list(argv), prog_name="python -m sidecar")
    except (JournalUnusable, JournalFull, JournalUnavailable, JournalBroken, RecordDamaged, StartupError, OSError) as error:
        note(f"{argv[0]}: {visible(' '.join(str(error).split()))}")
        sys.exit(FAILED)


@app.command()
def verify(
    key: Annotated[
        list[Path] | None,
        typer.Option(help="The log's public key; may be repeated, for old keys. A signature of another key is a fault."),
    ] = None,
    journal: Journal = JOURNAL,
    config: Config = None,
) -> None:
    """Check every link, every invariant, every payload that is kept, and the tables beside the entries. The first bad entry
    ends it, with exit code 1."""
    with closing(open_for_maintenance(journal, "read")) as store, _progress(store) as came_to:
        heads = maintenance.verify(store, public_keys(key or ()), came_to)
    verified = "".join(f"; {count} heads verified with key {key_id}" for key_id, count in heads.verified.items())
    unsigned = f"; {heads.index - heads.covered} entries have no signed head" if heads.verified else ""
    note(f"{heads.index} entries are sound{verified}{unsigned}")


@app.command()
def rebuild(journal: Journal = JOURNAL, config: Config = None) -> None:
    """Make the tables of items and keys, and the row of the log, again from the entries, which have to be sound. A copy of the
    file is kept."""
    with closing(open_for_maintenance(journal, "copy and change")) as store:
        maintenance.rebuild(store)
    copied = f"; a copy of what was there is {visible(str(store.copy))}" if store.copy is not None else ""
    note(f"the tables are made again{copied}")


@app.command()
def prune(
    before: Annotated[
        str,
        typer.Option(help="A sequence; a time, 2026-11-01T12:00, in UTC if it does not say; or an age: 12h, 30d, 4w."),
    ],
    journal: Journal = JOURNAL,
    config: Config = None,
) -> None:
    """Drop the payloads of items that have ended before. Prompts and answers go for good; hashes, and so the chain, stay."""
    old, dropped = older(before, time.time()), 0
    with closing(open_for_maintenance(journal)) as store, _progress(store) as came_to:
        for index, count in maintenance.prune(store, old, _now_millis()):
            dropped += count
            came_to(index)
    note(f"{dropped} payloads are dropped")


@app.command()
def redact(sequences: Annotated[list[int], typer.Argument(min=1)], journal: Journal = JOURNAL, config: Config = None) -> None:
    """Drop the payloads of single items, as prune does."""
    with closing(open_for_maintenance(journal)) as store:
        note(f"{maintenance.redact(store, sequences, _now_millis())} payloads are dropped")


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="A new file; - for the standard output.")], journal: Journal = JOURNAL
) -> None:
    """Write the whole journal as lines of JSON, for another backend."""
    with closing(open_for_maintenance(journal, "read")) as store, _progress(store) as came_to, _created(file) as lines:
        for number, line in enumerate(transfer.export(store)):
            lines.write(line + "\n")
            came_to(number)


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="An exported journal; - for the standard input.")],
    writer: Annotated[str | None, typer.Option(help="Whose it is to be, where the log has several.")] = None,
    journal: Journal = JOURNAL,
    config: Config = None,
) -> None:
    """Fill an empty journal from such lines: all of it, with its chain verified, or nothing."""
    with (
        nullcontext(sys.stdin) if file == "-" else Path(file).open(encoding="utf-8") as lines,
        closing(open_for_maintenance(journal, "make")) as store,
        progress("entries", None) as came_to,
    ):
        log = transfer.take_in(store, lines, "stdin" if file == "-" else file, writer, came_to)
    note(f"log {log.log_id}: {log.index} entries, sequences to {log.last_sequence}")


@app.command()
def signing_key(file: Annotated[Path, typer.Argument(help="A new file, for --signing-key; or one that exists.")]) -> None:
    """Make a key that signs receipts and heads, unless the file exists. Prints the public key, which verifiers need."""
    if not os.path.lexists(file):
        with _created(str(file)) as key:
            key.write(new_key().decode())
    signer = read_signer(file)
    sys.stdout.write(signer.public_pem)
    note(f"key id {signer.key_id}; --witness-keys of another sidecar: {signer.public_pem.splitlines()[1]}")


@app.command()
def accept_loss(
    through: Annotated[int, typer.Option(help="The newest sequence that may have been given out.")],
    high_water: Annotated[
        Path | None, typer.Option(envvar="OSTINATO_SIDECAR_HIGH_WATER", help="The mark's file; default: beside the journal.")
    ] = None,
    journal: Journal = JOURNAL,
    config: Config = None,
) -> None:
    """Go on with a journal that lost its end. What it lost stays lost; the numbers are not given out again."""
    path = high_water or mark_of(journal)
    file = MarkFile(path) if path is not None else None
    mark = file.read() if file is not None else None
    with closing(open_for_maintenance(journal, "read")) as store:
        log = store.log()
    if log is None and mark is None:
        raise JournalUnusable("the journal has no entries: it has lost nothing")
    if log is None or (mark is not None and mark.log_id != log.log_id):
        raise JournalUnusable("the mark is of another log: put that log's journal back, or remove the mark to begin without it")
    known = max(log.last_sequence, mark.last_sequence if mark is not None else 0)
    if through < known:
        raise JournalUnusable(f"--through {through}: sequences to {known} were given out")
    if through > SEQUENCE_MAX:
        raise JournalUnusable(f"--through {through}: no log has reached {SEQUENCE_MAX}; a number above it was never given out")
    # A log that sidecars share may be in use: its operator is a writer of its own.
    writer = "operator" if is_shared(journal) else next(iter(log.writers))
    settings = Settings(journal=journal, allow_unverified_database=True, writer=writer)
    opened = open_journal(settings, now_millis := _now_millis(), checked=False)
    with closing(opened):
        (appended,) = opened.append_many([Loss(through, mark)], now_millis)
        if file is not None:
            file.write(opened.head.mark)
    first, last = appended.entries[0].header, appended.entries[-1].header
    entries = f"entry {first.index} says" if first == last else f"entries {first.index} to {last.index} say"
    note(f"{entries} that {through + 1 - first.first_sequence} sequences are lost; the next one is {through + 1}")


def older(text: str, now_seconds: float) -> Callable[[types_pb2.EntryHeader], bool]:
    """Which outcomes `--before` means."""
    if text.isascii() and text.isdigit():
        return lambda header: header.sequence < int(text)
    if age := re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII):
        then = now_seconds - int(age[1]) * _AGES[age[2]]
    else:
        try:
            told = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no sequence, time or age") from None
        then = told.replace(tzinfo=told.tzinfo or UTC).timestamp()
    return lambda header: header.time_unix_millis < then * 1000


def _now_millis() -> int:
    return time.time_ns() // 10**6


def _progress(store: SqlStore) -> AbstractContextManager[Callable[..., None]]:
    log = store.log()
    return progress("entries", None if log is None else log.index)


@contextmanager
def _created(name: str) -> Iterator[IO[str]]:
    """A new file that only its owner can read, as the journal; it is removed if it is not finished."""
    if name == "-":
        yield sys.stdout
        return
    try:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"{name}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
