"""What the settings name, opened: credentials, canaries, the journal."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.message import DecodeError

import ostinato
from ostinato.errors import JournalUnavailable
from serving import auth, program
from serving.auth import Credentials

from sidecar.checks import Canary
from sidecar.checks import read_canaries as read_file
from sidecar.config import Settings, is_shared
from sidecar.journal.diagnosis import RESTORE, user
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalBroken, JournalUnusable, Mark, Opened
from sidecar.journal.sqlite import SqliteKept, SqliteSettings, SqliteStore
from sidecar.journal.store import Kept, Store

log = logging.getLogger("sidecar")


def credentials_of(settings: Settings) -> Credentials:
    """Raises StartupError that names flag and file."""
    tls = None
    if settings.tls_certificate is not None and settings.tls_key is not None:
        from serving.tls import ServerTls  # here: only with certificates is there a need for cryptography

        tls = ServerTls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    if settings.tokens is not None and tls is None and settings.allow_remote:
        log.warning("tokens travel in plain text")
    listed = auth.load_tokens(settings.tokens) if settings.tokens is not None else None
    return Credentials(tls, listed, settings.trust_tenant_metadata)


def read_canaries(settings: Settings) -> tuple[Canary, ...]:
    """Raises StartupError that says what is wrong with the file."""
    try:
        return read_file(settings.canaries)
    except ValueError as error:
        raise program.StartupError(f"--canaries: {error}", exit_code=program.BAD_CONFIGURATION) from error


def open_journal(settings: Settings, now_millis: int, *, checked: bool = True) -> tuple[Store, Opened]:
    """Raises StartupError that says why not. Checked: against the high-water mark."""
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


@contextmanager
def reading(settings: Settings) -> Iterator[None]:
    """Around what has to be read before anything is served. Raises StartupError if the journal is away or damaged."""
    name = "the database" if is_shared(settings.journal) else settings.journal
    try:
        yield
    except JournalUnavailable as error:
        raise program.StartupError(f"--journal: {error}") from error
    except JournalBroken as error:
        raise program.StartupError(f"--journal: {name}: {error.args[0]}: look at it with verify") from error
    except DecodeError as error:
        raise program.StartupError(f"--journal: {name} is damaged: an entry's payload cannot be read: {RESTORE}") from error


def open_kept(journal: str, *, create: bool = False) -> Kept:
    """Raises JournalUnusable."""
    if not is_shared(journal):
        return SqliteKept(Path(journal), create=create)
    with _postgres():
        from sidecar.journal.postgres import PostgresKept
    return PostgresKept(journal, create=create)


@contextmanager
def _postgres() -> Iterator[None]:
    """Around an import that needs its driver."""
    try:
        yield
    except ImportError as error:
        raise JournalUnusable(f"PostgreSQL needs this package's extra `postgres`: {error}") from error


def _make_folder(folder: Path) -> None:
    """Raises JournalUnusable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalUnusable(f"the folder {folder} cannot be created by {user()}: {error.strerror}") from error


def _open_file(settings: Settings, now_millis: int, mark: Mark | None) -> tuple[Store, Opened]:
    return SqliteStore.open(
        Path(settings.journal),
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        now_millis=now_millis,
        mark=mark,
        settings=SqliteSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            journal_bytes_max=settings.journal_bytes_max,
            reserve_bytes=settings.journal_reserve_bytes,
            digests_only=settings.payloads == "digests",
        ),
    )


def _open_shared(settings: Settings, now_millis: int, mark: Mark | None) -> tuple[Store, Opened]:
    with _postgres():
        from sidecar.journal.postgres import PostgresSettings, PostgresStore
    return PostgresStore.open(
        settings.journal,
        writer=settings.writer,
        version=ostinato.__version__,
        new_log_id=uuid.uuid4().hex,
        now_millis=now_millis,
        mark=mark,
        settings=PostgresSettings(
            idempotency_ttl_seconds=round(settings.idempotency_ttl_seconds),
            lease_seconds=settings.lease_seconds,
            digests_only=settings.payloads == "digests",
        ),
    )
