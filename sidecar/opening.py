"""The journal that the settings name, opened."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ostinato
from ostinato.signature import Signer, signer_of
from serving import files, program
from serving.auth import Source

from sidecar.config import Settings, is_shared
from sidecar.journal.ledger import SECRET_BYTES
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalUnusable, Mark, Opened
from sidecar.journal.sqlite import SqliteSettings, SqliteStore
from sidecar.journal.store import SqlStore, Store


def open_journal(settings: Settings, now_millis: int, *, checked: bool = True) -> tuple[Store, Opened]:
    """Raises StartupError that tells why it cannot be opened. `checked`: against the high-water mark."""
    try:
        if not is_shared(settings.journal):
            _make_folder(Path(settings.journal).parent)
        mark = _mark(settings.mark) if checked and settings.mark is not None else None
        return (_open_shared if is_shared(settings.journal) else _open_file)(settings, now_millis, mark)
    except (JournalUnusable, OSError) as error:
        raise program.StartupError(f"--journal: {error}") from error


def _mark(path: Path) -> Mark | None:
    try:
        return MarkFile(path).read()
    except JournalUnusable as error:
        raise program.StartupError(f"--high-water: {error}") from error


def read_signer(path: Path) -> Signer:
    """The key in this file. Raises StartupError that says why it cannot be used."""
    try:
        return signer_of(Source("--signing-key", path, private=True).read())
    except ValueError as error:
        raise program.StartupError(f"--signing-key: {path}: {error}", exit_code=program.BAD_CONFIGURATION) from error


def open_for_maintenance(journal: str, *, create: bool = False) -> SqlStore:
    """Raises JournalUnusable."""
    if not is_shared(journal):
        return SqliteStore.open_for_maintenance(Path(journal), create=create)
    with _postgres():
        from sidecar.journal.postgres import PostgresStore
    return PostgresStore.open_for_maintenance(journal, create=create)


def check_verified(journal: str) -> None:
    """Raises JournalUnusable for a database whose server would not be verified."""
    with _postgres():
        from sidecar.journal import postgres
    postgres.check_verified(journal)


@contextmanager
def _postgres() -> Iterator[None]:
    """Around an import of the PostgreSQL driver."""
    try:
        yield
    except ImportError as error:
        raise JournalUnusable(f"PostgreSQL needs this package's extra `postgres`: {error}") from error


def _make_folder(folder: Path) -> None:
    """Raises JournalUnusable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalUnusable(f"the folder {folder} cannot be created by {files.user()}: {error.strerror}") from error


def _open_file(settings: Settings, now_millis: int, mark: Mark | None) -> tuple[Store, Opened]:
    return SqliteStore.open(
        Path(settings.journal),
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        new_secret=os.urandom(SECRET_BYTES),
        now_millis=now_millis,
        mark=mark,
        settings=SqliteSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            journal_bytes_max=settings.journal_bytes_max,
            reserve_bytes=settings.journal_reserve_bytes,
            digests_only=settings.payloads == "digests",
            signer=None if settings.signing_key is None else read_signer(settings.signing_key),
        ),
    )


def _open_shared(settings: Settings, now_millis: int, mark: Mark | None) -> tuple[Store, Opened]:
    with _postgres():
        from sidecar.journal.postgres import PostgresSettings, PostgresStore
    if not settings.allow_unverified_database:
        check_verified(settings.journal)
    return PostgresStore.open(
        settings.journal,
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        new_secret=os.urandom(SECRET_BYTES),
        now_millis=now_millis,
        mark=mark,
        settings=PostgresSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            lease_seconds=settings.lease_seconds,
            digests_only=settings.payloads == "digests",
            signer=None if settings.signing_key is None else read_signer(settings.signing_key),
        ),
    )
