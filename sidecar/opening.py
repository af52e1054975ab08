"""The journal that the settings name, opened."""

from __future__ import annotations

import os
import uuid
from importlib import import_module
from pathlib import Path
from types import ModuleType

import ostinato
from ostinato.signature import Signer, signer_of
from serving import files, program
from serving.files import Source

from sidecar.config import Settings, is_shared
from sidecar.journal.ledger import SECRET_BYTES
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalUnusable, Mark
from sidecar.journal.sql import Opening, SqlStore, Use
from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store, StoreSettings


def open_journal(settings: Settings, now_millis: int, *, checked: bool = True) -> Store:
    """Raises StartupError that tells why it cannot be opened. `checked`: against the high-water mark."""
    shared = is_shared(settings.journal)
    try:
        database = _database(settings.journal)
        if not shared:
            _make_folder(Path(settings.journal).parent)
        elif not settings.allow_unverified_database:
            check_verified(settings.journal)
        opening = Opening(
            writer=settings.writer,
            version=ostinato.__version__,
            new_log_id=uuid.uuid4().hex,
            new_secret=os.urandom(SECRET_BYTES),
            now_millis=now_millis,
            mark=_mark(settings.mark) if checked and settings.mark is not None else None,
        )
        bounds = StoreSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            digests_only=settings.payloads == "digests",
            signer=None if settings.signing_key is None else read_signer(settings.signing_key),
            journal_bytes_max=settings.journal_bytes_max,
            reserve_bytes=settings.journal_reserve_bytes,
            lease_seconds=settings.lease_seconds,
        )
        return database.open(settings.journal, opening, bounds)
    except (JournalUnusable, OSError) as error:
        raise program.StartupError(f"--journal: {error}") from error


def _mark(path: Path) -> Mark | None:
    try:
        return MarkFile(path).read()
    except JournalUnusable as error:
        raise program.StartupError(f"--high-water: {error}") from error


def read_signer(path: Path) -> Signer:
    """The key in this file. Raises StartupError that says why it cannot be used."""
    with program.configuring(f"--signing-key: {path}"):
        return signer_of(Source("--signing-key", path, private=True).read())


def open_for_maintenance(journal: str, use: Use = "change") -> SqlStore:
    """As `SqlStore.open_for_maintenance`."""
    return _database(journal).open_for_maintenance(journal, use)


def _database(journal: str) -> type[SqlStore]:
    store: type[SqlStore] = _postgres().PostgresStore if is_shared(journal) else SqliteStore
    return store


def check_verified(journal: str) -> None:
    """Raises JournalUnusable for a database whose server would not be verified."""
    _postgres().check_verified(journal)


def _postgres() -> ModuleType:
    """Imported where it is needed: its driver is an extra."""
    try:
        return import_module("sidecar.journal.postgres")
    except ImportError as error:
        raise JournalUnusable(f"PostgreSQL needs this package's extra `postgres`: {error}") from error


def _make_folder(folder: Path) -> None:
    """Raises JournalUnusable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalUnusable(f"the folder {folder} cannot be created by {files.user()}: {error.strerror}") from error
