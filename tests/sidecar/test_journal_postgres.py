"""What only PostgreSQL does to a journal: other writers, leases, lost connections, and servers that cannot hold it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from ostinato.errors import JournalFull, JournalUnavailable
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import JournalBroken, JournalUnusable, Note, Unfinished
from sidecar.journal.postgres import Database, PostgresStore, PostgresTables, check_verified
from tests.postgres import Postgres, installed
from tests.sidecar.journal_kit import (
    EXPIRE,
    NOW,
    PostgresKit,
    Watch,
    admission,
    admit,
    completed,
    ended,
    item,
    sequences,
    sound,
    through,
    twin,
)
from tests.sidecar.postgres_proxy import Cut, Proxy

# ---- one order


def test_many_writers_have_one_order(store: PostgresKit) -> None:
    """Writers that append at once take numbers and indexes from one row: no gap, no fork, batches whole."""
    writers = [f"writer-{number}" for number in range(4)]
    journals = [store.open(writer=writer) for writer in writers]

    def work(journal: PostgresStore) -> None:
        for _ in range(10):
            entries = admit(journal, item(), item(), item())
            journal.append_many([completed(entry) for entry in entries], NOW)

    threads = [threading.Thread(target=work, args=(journal,)) for journal in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = journals[0].entries(1, 1000, payloads=True)

    assert [entry.header.index for entry in entries] == list(range(1, 4 + 4 * 10 * 6 + 1))
    admitted = [entry for entry in entries if entry.header.kind == types_pb2.ENTRY_KIND_ADMITTED]
    assert sequences(admitted) == list(range(1, 121))
    assert {entry.header.writer for entry in admitted} == set(writers)
    assert sound(store)


def test_a_key_and_a_twin_of_another_writer(store: PostgresKit) -> None:
    """What one writer has bound or completed, the next one finds."""
    with store.opened("a") as a, store.opened("b") as b:
        (first,) = admit(a, item(1, seed=9), key="k\0ö")
        (again,) = b.append_many([admission(item(1, seed=9), key="k\0ö")], NOW)
        a.append_many([completed(first)], NOW)
        (second,) = admit(b, item(1, seed=9))
        (done,) = b.append_many([completed(second)], NOW)

        assert again.entries == ()
        assert again.binding is not None
        assert again.binding.first_sequence == 1
        assert b.binding("", "k\0ö", NOW) == again.binding
        said = twin(done.entries[0])
        assert said is not None
        assert (said.expected_sequence, said.expected_writer, said.verdict) == (1, "a", types_pb2.VERDICT_MATCH)


def test_the_first_outcome_wins_across_writers(store: PostgresKit) -> None:
    """An outcome that another writer has made durable before is the one."""
    with store.opened("a") as a, store.opened("b") as b:
        (entry,) = admit(a)
        (ours,) = b.append_many([ended(entry, types_pb2.ENTRY_KIND_CANCELLED)], NOW)
        (late,) = a.append_many([completed(entry)], NOW)

        assert len(ours.entries) == 1
        assert late.entries == ()
        assert a.items(1, 1, 1)[0].outcome == ours.entries[0]


def test_openings_at_once(store: PostgresKit) -> None:
    """Sidecars that find an empty schema at the same moment make one journal of it."""
    opened: list[PostgresStore] = []
    threads = [
        threading.Thread(target=lambda name=name: opened.append(store.open(writer=name, log_id=name * 32))) for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({journal.head.log_id for journal in opened}) == 1
    assert sorted(journal.head.index for journal in opened) == [1, 2, 3, 4]
    assert sound(store)


# ---- epochs and leases


def test_a_newer_epoch_fences(store: PostgresKit) -> None:
    """A writer that was started again elsewhere can neither append nor hold its lease."""
    watch = Watch()
    old = store.open(seconds=watch)
    admit(old)
    store.fence(old)
    watch.now += store.settings.lease_seconds

    with pytest.raises(JournalBroken, match="fenced"):
        admit(old)
    with pytest.raises(JournalBroken, match="fenced"):
        old.maintain(NOW, idle=True)
    assert sound(store)


def test_take_over(store: PostgresKit) -> None:
    """What a writer without a lease has left becomes another's, for the next attempt; the writer is fenced by an epoch that
    the log shows, and its next start finds nothing left."""
    watch = Watch()
    a = store.open(writer="a")
    keyed, unkeyed, done = admit(a, item(1), item(2), key="k") + admit(a, item(3))
    a.append_many([completed(done)], NOW)
    b = store.open(writer="b", seconds=watch)
    own = admit(b)
    watch.now += 2 * store.settings.lease_seconds
    assert b.maintain(NOW, idle=True) == [], "the lease holds"

    store.execute(EXPIRE, "a")
    watch.now += store.settings.lease_seconds
    taken = b.maintain(NOW, idle=True)

    assert [(one.admitted, one.attempt) for one in taken] == [(keyed, 2), (unkeyed, 2)]
    opened = b.entries(1, 100, payloads=True)[-1]
    payload = sequencer_pb2.OpenedPayload.FromString(opened.payload)
    assert (opened.header.writer, opened.header.epoch, payload.taken_over_by) == ("a", 2, "b")
    with pytest.raises(JournalBroken, match="fenced"):
        a.append_many([completed(keyed)], NOW)
    b.append_many([completed(keyed, attempt=2)], NOW)
    again = store.open(writer="a")
    assert (again.head.epoch, again.to_recover) == (3, [])
    found = store.open(writer="b")
    assert [(one.admitted.header.sequence, one.attempt) for one in found.to_recover] == [(2, 3), (own[0].header.sequence, 2)]
    assert sound(store)


def test_a_damaged_item_is_not_taken_over(store: PostgresKit, caplog: pytest.LogCaptureFixture) -> None:
    """An item whose prompt was changed does not run: its writer's items stay where they are, that is logged, and the sidecar
    that found it goes on."""
    watch = Watch()
    a = store.open(writer="a")
    admit(a, item(1), item(2))
    b = store.open(writer="b", seconds=watch)
    store.execute("UPDATE payloads SET payload = '\\x00'::bytea WHERE entry_index = 3")
    store.execute(EXPIRE, "a")
    watch.now += 2 * store.settings.lease_seconds

    assert b.maintain(NOW, idle=True) == []
    assert "items of another writer are not taken over: one is damaged" in caplog.text
    assert sequences(admit(b)) == [3]
    with pytest.raises(JournalUnusable, match="entry 3 is damaged, and its item has not ended"):
        store.open(writer="a")


def test_no_takeover_after_an_outage(store: PostgresKit) -> None:
    """A lease that has run out counts only for those who were connected for as long as one lasts: they would have seen it
    renewed."""
    watch = Watch()
    a = store.open(writer="a")
    admit(a)
    b = store.open(writer="b", seconds=watch)
    store.execute(EXPIRE, "a")
    watch.now += store.settings.lease_seconds / 2
    assert b.maintain(NOW, idle=True) == []

    watch.now += store.settings.lease_seconds / 2 - 0.1
    b._database.drop()
    assert b.maintain(NOW, idle=True) == []
    watch.now += store.settings.lease_seconds + 1
    assert len(b.maintain(NOW, idle=True)) == 1


def test_a_lease_is_held_by_appends_and_by_time(store: PostgresKit) -> None:
    """Both push its end into the future, by the server's clock; closing ends it."""
    watch = Watch()
    journal = store.open(writer="a", seconds=watch)

    def left() -> float:
        ((seconds,),) = store.execute("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM writers")
        return float(seconds)

    for renew in (lambda: admit(journal), lambda: journal.maintain(NOW, idle=True)):
        store.execute(EXPIRE, "a")
        assert left() < 0
        watch.now += store.settings.lease_seconds / 2
        renew()
        assert 0 < left() <= store.settings.lease_seconds
    journal.close()
    assert left() < 0


def test_a_writer_that_stops_within_a_transaction(store: PostgresKit) -> None:
    """The server ends a transaction that is left open, so that its lock does not outlive a lease."""
    store.configure(lease_seconds=1.0)
    stopped = store.open(writer="a")
    with store.opened("b") as b:
        with stopped._database.connected() as db:
            db.execute("BEGIN")
            db.execute("SELECT FROM log FOR UPDATE")
        assert len(admit(b)) == 1
    assert len(admit(stopped)) == 1, "on a new connection"


# ---- lost connections


@pytest.fixture(name="at_commit")
def _at_commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Call something once, just before the next commit is sent."""
    todo: list[Callable[[], None]] = []
    commit = PostgresTables.commit

    def committing(self: PostgresTables, *args: Any) -> None:
        while todo:
            todo.pop()()
        commit(self, *args)

    monkeypatch.setattr(PostgresTables, "commit", committing)
    return todo.append


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_a_lost_commit_is_looked_up(
    store: PostgresKit, line: Proxy, at_commit: Callable[[Callable[[], None]], None], cut: Cut
) -> None:
    """Whether the line broke before the server had the commit or after it was done, each draft is there once, and answered."""
    journal = store.open(url=through(line, store))
    (before,) = admit(journal)
    at_commit(lambda: setattr(line, "cut", cut))
    answers = journal.append_many([admission(item(), item(), key="k"), completed(before)], NOW)

    assert line.cut is Cut.NEVER, "the line was cut"
    assert [len(answer.entries) for answer in answers] == [2, 1]
    assert [pair.outcome is not None for pair in journal.items(1, 10, 10)] == [True, False, False]
    assert journal.items(2, 3, 2)[0].admitted == answers[0].entries[0]
    assert journal.head.index == 5
    assert len(admit(journal)) == 1
    assert sound(store)


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_a_take_over_in_doubt(
    store: PostgresKit, line: Proxy, at_commit: Callable[[Callable[[], None]], None], cut: Cut
) -> None:
    """Items are handed over once, whatever became of the line at that moment."""
    watch = Watch()
    a = store.open(writer="a")
    admit(a, item(), item())
    url = through(line, store)
    b = store.open(writer="b", url=url, seconds=watch)
    store.execute(EXPIRE, "a")
    at_commit(lambda: setattr(line, "cut", cut))
    taken: list[Unfinished] = []
    for _ in range(4):
        watch.now += store.settings.lease_seconds
        with contextlib.suppress(JournalUnavailable):
            taken += b.maintain(NOW, idle=True)
        admit(b)

    assert [(one.admitted.header.sequence, one.attempt) for one in taken] == [(1, 2), (2, 2)]
    assert sound(store)


def test_a_server_that_ends_the_session(store: PostgresKit) -> None:
    """A connection that was ended while it was idle is replaced, by a read as by an append."""
    with store.opened() as journal:
        for use in (lambda: admit(journal), lambda: journal.newest(), lambda: journal.items(1, 1, 1)):
            store.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ostinato writer'")
            use()
        assert journal.head.last_sequence == 1


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


def test_a_schema_of_another_program(store: PostgresKit) -> None:
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
    assert store.faults()
    store.execute("UPDATE entries SET header = header || '\\x0801'::bytea WHERE entry_index = 2")
    for read in (store.open, store.faults):
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
        store.open().close()


@pytest.mark.skipif(not installed(), reason="this machine has no PostgreSQL of its own")
def test_an_older_server() -> None:
    """The oldest server that is installed here keeps a journal, crashes, and has a writer taken over."""
    with Postgres(installed()[0]) as server:
        store, watch = PostgresKit(server.url()), Watch()
        a = store.open(writer="a")
        entries = admit(a, item(1), item(2), key="k")
        a.append_many([completed(entries[0]), admission(item(1), key="k"), Note("n", b"v")], NOW)
        server.crash()
        server.start()
        b = store.open(writer="b", seconds=watch)
        store.execute(EXPIRE, "a")
        watch.now += 2 * store.settings.lease_seconds
        taken = b.maintain(NOW, idle=True)

        assert [one.admitted for one in taken] == [entries[1]]
        assert (b.notes("n"), len(b.items(1, 9, 9))) == ({"n": b"v"}, 2)
        assert sound(store)
        store.kill()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@/db?nonsense=1",
        "postgresql://u:hunter2@127.0.0.1:1/db",
        "postgresql://u:hun/ter2@h/db",
        "postgresql://u:1@hunter@127.0.0.1:1/db",
        "postgresql://u:1/hunter@h/db",
        "postgresql://u:h%zzunter2@h/db",
    ],
)
def test_passwords_are_not_said(url: str) -> None:
    """Whatever is wrong with a URL, or with its server, the message does not give the password away."""
    said = []
    for use in (check_verified, lambda url: PostgresKit(url).open()):
        try:
            use(url)
        except JournalUnusable as error:
            said.append(str(error))

    assert said
    assert "hun" not in " ".join(said)


@pytest.mark.parametrize(
    ("url", "environment", "verified"),
    [
        ("postgresql://db.internal/x", {}, False),
        ("postgresql://db.internal/x?sslmode=require", {}, False),
        ("postgresql://db.internal/x?sslmode=verify-ca", {}, False),
        ("postgresql://db.internal/x?sslmode=verify-full", {}, True),
        ("postgresql://db.internal/x", {"PGSSLMODE": "verify-full"}, True),
        ("postgresql://db.internal/x?sslmode=disable", {"PGSSLMODE": "verify-full"}, False),
        ("postgresql:///x", {"PGHOST": "db.internal"}, False),
        ("postgresql:///x", {"PGHOSTADDR": "10.0.0.1"}, False),
        ("postgresql://localhost/x?hostaddr=10.0.0.1", {}, False),
        ("postgresql://localhost,db.internal/x", {}, False),
        ("postgresql:///x?service=mine", {}, False),
        ("postgresql:///x", {}, True),
        ("postgresql:///x?host=/run/postgresql", {"PGHOST": "db.internal"}, True),
        ("postgresql://127.0.0.1/x", {}, True),
        ("postgresql://[::1],localhost/x", {}, True),
    ],
)
def test_a_server_on_the_network_is_verified(
    url: str, environment: dict[str, str], verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond this machine nothing below verify-full is used, whatever names host and mode."""
    for name in ("PGHOST", "PGHOSTADDR", "PGSSLMODE", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if verified:
        check_verified(url)
    else:
        with pytest.raises(JournalUnusable, match="would not be verified: add sslmode=verify-full"):
            check_verified(url)
