"""Which journal the sidecar opens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ostinato.serving.program import StartupError

from sidecar.config import Settings
from sidecar.journal.postgres import PostgresJournal
from sidecar.journal.sqlite import SqliteJournal
from sidecar.opening import open_journal
from tests.postgres import Postgres


def test_a_path_is_a_file(tmp_path: Path) -> None:
    """Whatever is no PostgreSQL URL names a file, in a folder that is made if need be."""
    backend, opened = open_journal(Settings(journal=str(tmp_path / "new" / "journal.sqlite"), journal_reserve_bytes=0), 0)
    backend.close()

    assert isinstance(backend, SqliteJournal)
    assert (opened.head.writer, opened.head.epoch) == ("ostinato-0", 1)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_url_is_a_database(postgres: Postgres, scheme: str) -> None:
    """A URL of either spelling names a database."""
    url = postgres.url(postgres.schema()).replace("postgresql", scheme, 1)
    backend, opened = open_journal(Settings(journal=url, writer="w"), 0)
    backend.close()

    assert isinstance(backend, PostgresJournal)
    assert (opened.head.writer, opened.head.epoch) == ("w", 1)


def test_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver the sidecar says what to install."""
    monkeypatch.setitem(sys.modules, "sidecar.journal.postgres", None)

    with pytest.raises(StartupError, match="extra `postgres`"):
        open_journal(Settings(journal="postgresql://h/db"), 0)
