"""Databases and servers that a journal in PostgreSQL cannot be kept in, or only just."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ostinato.errors import JournalFull, JournalUnavailable

from sidecar.journal import postgres as schema
from sidecar.journal.model import JournalUnusable, Note
from sidecar.journal.postgres import Database, PostgresSettings
from tests.postgres import Postgres, installed, packaged
from tests.sidecar.journal_kit import PostgresKit, admission, completed, item
from tests.sidecar.postgres_kit import EXPIRE, NOW, Watch, admit, sound


def test_a_full_disk(store: PostgresKit) -> None:
    """A server without room refuses, changes nothing, and takes the same drafts when it has some."""
    with store.opened() as journal:
        (entry,) = admit(journal)
        store.execute("""CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$""")
        store.execute("CREATE TRIGGER full_disk BEFORE INSERT ON payloads EXECUTE FUNCTION full_disk()")
        for draft in (admission(), completed(entry)):
            with pytest.raises(JournalFull):
                journal.append_many([draft], NOW)
        store.execute("DROP TRIGGER full_disk ON payloads")

        assert len(journal.append_many([admission(), completed(entry)], NOW)) == 2
        assert journal.head.index == 4
    assert sound(store)


def test_a_newer_schema(store: PostgresKit) -> None:
    """A journal that a newer sidecar has made is left alone."""
    store.open()[0].close()
    store.execute("UPDATE ostinato SET version = version + 1")

    with pytest.raises(JournalUnusable, match="run a newer one"):
        store.open()
    assert store.execute("SELECT version, epoch FROM ostinato, writers") == [(len(schema.MIGRATIONS) + 1, 1)]


def test_a_migration(store: PostgresKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of an older version becomes one of the newest when it is opened, and only then."""
    store.open()[0].close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "ALTER TABLE writers ADD COLUMN hat text"))
    for _ in range(2):
        store.open()[0].close()

    assert store.execute("SELECT version, hat FROM ostinato, writers") == [(len(schema.MIGRATIONS), None)]


def test_a_schema_of_somebody_else(store: PostgresKit) -> None:
    """Tables of the same names that are no journal's are not touched."""
    store.execute("CREATE TABLE log (line text)")

    with pytest.raises(JournalUnusable, match="one of its own"):
        store.open()
    assert store.execute("SELECT to_regclass('entries')") == [(None,)]


def test_a_damaged_head(store: PostgresKit) -> None:
    """A newest entry that does not match its hash, its index or the head is not built upon; verification says where."""
    with store.opened() as journal:
        admit(journal)
    store.execute("UPDATE entries SET header = header || '\\x3000'::bytea WHERE entry_index = 2")
    with pytest.raises(JournalUnusable, match="damaged"):
        store.open()
    assert [fault[:9] for page in store.verify() for fault in page.faults]
    store.execute("UPDATE entries SET header = header || '\\x0801'::bytea WHERE entry_index = 2")
    for read in (store.open, lambda: list(store.verify())):
        with pytest.raises(JournalUnusable, match="damaged: entry 2: its header says 1"):
            read()
    store.execute("DELETE FROM entries WHERE entry_index = 2")
    with pytest.raises(JournalUnusable, match="damaged"):
        store.open()


def test_a_forgetful_server(store: PostgresKit) -> None:
    """A server without fsync is refused, and a database whose sessions need not be durable does not make ours so."""
    store.execute("ALTER SYSTEM SET fsync = off")
    store.execute("SELECT pg_reload_conf()")
    try:
        with pytest.raises(JournalUnusable, match="fsync off"):
            _retry_until_unusable(store)
    finally:
        store.execute("ALTER SYSTEM RESET fsync")
        store.execute("SELECT pg_reload_conf()")
    weak = store.url.replace(
        "options=", "options=-csynchronous_commit%3Doff%20-cdefault_transaction_isolation%3Dserializable%20"
    )
    database = Database(weak, name="t", lease_seconds=7)
    with database.connected() as db:
        shown = {name: db.execute(f"SHOW {name}").fetchone() for name in SESSION}
    database.drop()
    assert shown == {name: (value,) for name, value in SESSION.items()}


def test_a_connection_that_cannot_be_set_up(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed, whatever the server refused of its settings."""
    schema = postgres.schema()
    with psycopg.connect(postgres.url(schema), autocommit=True) as db:
        db.execute("""CREATE FUNCTION set_config(text, text, boolean) RETURNS text LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'permission denied to set parameter'; END $$""")
    made: list[psycopg.Connection] = []
    connect = psycopg.connect

    def connecting(*args: Any, **how: Any) -> psycopg.Connection:
        made.append(connect(*args, **how))
        return made[-1]

    monkeypatch.setattr(psycopg, "connect", connecting)
    database = Database(postgres.url(f"{schema},pg_catalog"), name="t")
    with pytest.raises(JournalUnavailable, match="permission denied"), database.connected():
        pass

    assert [connection.closed for connection in made] == [True]


SESSION = {
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "statement_timeout": "0",
    "lock_timeout": "1750ms",
    "idle_in_transaction_session_timeout": "7s",
    "application_name": "ostinato t",
}


def _retry_until_unusable(store: PostgresKit) -> None:
    """A reload takes effect a moment later."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        store.open()[0].close()


def test_binaries_that_other_users_cannot_reach(tmp_path: Path) -> None:
    """A server whose binaries lie below a folder of mode 700 starts, also as root, who runs it as another user."""
    binaries = packaged()
    assert binaries is not None, "they come with the development requirements"
    tmp_path.chmod(0o700)
    package = binaries.parents[1]
    for folder in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("include"))
    with Postgres(tmp_path / binaries.relative_to(package.parent)) as server:
        store = PostgresKit(server.url())
        with store.opened() as journal:
            admit(journal)
        root = server.root
        assert sound(store)

    assert not root.exists()


@pytest.mark.skipif(not installed(), reason="this machine has no PostgreSQL of its own")
def test_an_older_server() -> None:
    """The oldest server that is installed here keeps a journal, crashes, and has a writer taken over."""
    with Postgres(installed()[0]) as server:
        store, watch = PostgresKit(server.url()), Watch()
        a, _ = store.open(writer="a")
        entries = admit(a, item(1), item(2), key="k")
        a.append_many([completed(entries[0]), admission(item(1), key="k"), Note("n", b"v")], NOW)
        server.crash()
        server.start()
        b, _ = store.open(writer="b", seconds=watch)
        store.execute(EXPIRE, "a")
        watch.now += 2 * store.settings.lease_seconds
        taken = b.maintain(NOW, idle=True)

        assert [one.admitted for one in taken] == [entries[1]]
        assert (b.notes("n"), len(b.items(1, 9, 9))) == ({"n": b"v"}, 2)
        assert sound(store)
        store.kill()


@pytest.mark.parametrize(
    "url", ["postgresql://u:hunter2@/db?nonsense=1", "postgresql://u:hunter2@127.0.0.1:1/db", "postgresql://u:hun/ter2@h/db"]
)
def test_passwords_are_not_said(url: str) -> None:
    """Whatever is wrong with a URL, or with its server, the message does not give the password away."""
    with pytest.raises(JournalUnusable) as raised:
        PostgresKit(url).open()

    assert "hunter2" not in str(raised.value)
    assert "hun" not in str(raised.value)


def test_settings() -> None:
    """Times that make no sense are refused when they are set."""
    for settings in ({"lease_seconds": 0.0}, {"idempotency_ttl_seconds": -1}):
        with pytest.raises(ValueError, match="must"):
            PostgresSettings(**settings)
