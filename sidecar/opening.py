"""The journal that the settings name, opened."""

from __future__ import annotations

import uuid
from pathlib import Path

import ostinato
from ostinato.serving import program

from sidecar.config import Settings
from sidecar.journal import JournalUnusable, Opened
from sidecar.journal.committer import Backend
from sidecar.journal.sqlite import SqliteJournal, SqliteSettings


def open_journal(settings: Settings, now_millis: int) -> tuple[Backend, Opened]:
    """Raises StartupError that says why not."""
    try:
        return _open_shared(settings, now_millis) if settings.journal_shared else _open_file(settings, now_millis)
    except (JournalUnusable, OSError) as error:
        raise program.StartupError(f"journal: {error}") from error


def _open_file(settings: Settings, now_millis: int) -> tuple[Backend, Opened]:
    path = Path(settings.journal)
    path.parent.mkdir(parents=True, exist_ok=True)
    return SqliteJournal.open(
        path,
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        now_millis=now_millis,
        settings=SqliteSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            journal_bytes_max=settings.journal_bytes_max,
            reserve_bytes=settings.journal_reserve_bytes,
        ),
    )


def _open_shared(settings: Settings, now_millis: int) -> tuple[Backend, Opened]:
    try:
        from sidecar.journal.postgres import PostgresJournal, PostgresSettings
    except ImportError as error:
        raise program.StartupError(f"journal: PostgreSQL needs this package's extra `postgres`: {error}") from error
    return PostgresJournal.open(
        settings.journal,
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        now_millis=now_millis,
        settings=PostgresSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds), lease_seconds=settings.lease_seconds
        ),
    )
