"""Which journal the sidecar opens."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest
from google.protobuf.message import DecodeError

from ostinato.errors import JournalUnavailable
from serving.program import StartupError

from sidecar.__main__ import reading
from sidecar.config import Settings
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalBroken
from sidecar.journal.postgres import PostgresStore
from sidecar.journal.sqlite import SqliteStore
from sidecar.opening import open_journal
from tests.pair import Program
from tests.postgres import Postgres
from tests.sidecar.postgres_proxy import SOCKET


def test_a_path_is_a_file(tmp_path: Path) -> None:
    """What is not a PostgreSQL URL names a file, in a folder that is created if need be."""
    backend = open_journal(Settings(journal=str(tmp_path / "new" / "journal.sqlite"), journal_reserve_bytes=0), 0)
    backend.close()

    assert isinstance(backend, SqliteStore)
    assert (backend.head.writer, backend.head.epoch) == ("ostinato-0", 1)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_url_is_a_database(postgres: Postgres, scheme: str) -> None:
    """A URL of either spelling names a database."""
    url = postgres.url(postgres.schema()).replace("postgresql", scheme, 1)
    backend = open_journal(Settings(journal=url, writer="w"), 0)
    backend.close()

    assert isinstance(backend, PostgresStore)
    assert (backend.head.writer, backend.head.epoch) == ("w", 1)


def test_told_to_stop_while_it_waits() -> None:
    """A sidecar that is told to stop while its database does not answer does not wait for that."""
    folder = tempfile.mkdtemp(prefix="px", dir="/var/tmp")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{folder}/{SOCKET}")
        silent.listen()
        program = Program("sidecar", ["--journal", f"postgresql:///x?host={quote(folder, safe='')}&connect_timeout=600"])
        with silent.accept()[0] as line:
            assert line.recv(1), "it asks"
            code = program.stop()
    shutil.rmtree(folder)

    assert code == 0, program.lines


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (JournalBroken("CorruptError: database disk image is malformed"), "is malformed: look at it with verify"),
        (DecodeError("wire format"), "is damaged: an entry's payload cannot be read: restore a copy"),
        (JournalUnavailable("the database cannot be reached"), "the database cannot be reached"),
    ],
)
def test_what_is_read_before_serving(error: Exception, why: str) -> None:
    """What a start cannot read of its journal ends it with one line, and a URL with its password is not in it."""
    for journal, name in (("/data/journal.sqlite", "/data/journal.sqlite"), ("postgresql://me:hunter2@h/x", "the database")):
        with pytest.raises(StartupError) as refused, reading(Settings(journal=journal)):
            raise error
        assert why in str(refused.value)
        assert name in str(refused.value) or isinstance(error, JournalUnavailable)
        assert "hunter2" not in str(refused.value)


def test_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver the sidecar says what to install."""
    monkeypatch.setitem(sys.modules, "sidecar.journal.postgres", None)

    with pytest.raises(StartupError, match="extra `postgres`"):
        open_journal(Settings(journal="postgresql://h/db"), 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("ending", ["", "-wal", "-journal", ".mark", ".mark.new", ".reserve"])
@pytest.mark.parametrize("link", [False, True])
def test_what_another_user_planted_beside_the_journal(tmp_path: Path, ending: str, link: bool) -> None:
    """A file or a link of another user in the place of the journal, or of a file beside it, is refused by name or replaced, and
    never written through."""
    settings = Settings(journal=str(tmp_path / "journal.sqlite"), journal_reserve_bytes=4096)
    opened = open_journal(settings, 1)
    opened.close()
    planted, victim = Path(settings.journal + ending), tmp_path / "victim"
    victim.write_bytes(b"precious")
    planted.unlink(missing_ok=True)
    if link:
        planted.symlink_to(victim)
    else:
        planted.write_bytes(b"planted")
    os.lchown(planted, 65_534, 65_534)

    def use() -> None:
        opened = open_journal(settings, 2)
        opened.close()
        assert settings.mark is not None
        MarkFile(settings.mark).write(opened.head.mark)

    if ending == ".mark.new":
        use()
    else:
        with pytest.raises(StartupError, match=f"{planted}(: .*owner is uid 65534| is not a regular file)"):
            use()
    assert victim.read_bytes() == b"precious"
