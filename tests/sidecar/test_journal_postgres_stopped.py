"""A sidecar that stands still while it has the log's lock: others go on after a lease, and it finds out when it goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from sidecar.journal.model import JournalBroken, JournalUnusable, Sealed
from sidecar.journal.postgres import LogLocked, PostgresTables
from tests.postgres import Postgres, installed
from tests.sidecar.journal_kit import NOW, PostgresKit, Watch, admit, completed, item, sequences, sound

LEASE_SECONDS = 0.4
STOPPED_SECONDS = 20.0
"""Of one that no one ends; much longer than what is waited for."""
LOCK = b"SELECT FROM log FOR UPDATE"


@pytest.fixture(scope="module", name="server", params=["packaged", "oldest"])
def _server(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    if request.param == "packaged":
        yield request.getfixturevalue("postgres")
        return
    if not installed():
        pytest.skip("this machine has no PostgreSQL of its own")
    with Postgres(installed()[0]) as server:
        yield server


@pytest.fixture(name="store")
def _store(server: Postgres) -> Iterator[PostgresKit]:
    store = PostgresKit(server.url(server.schema()))
    store.configure(lease_seconds=LEASE_SECONDS)
    yield store
    store.kill()


class Stop:
    """Where a writer's thread stands still, within the pipeline of its commit, until it is let go on."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self.reached, self.over = threading.Event(), threading.Event()

    def before(self, write: Callable[..., None]) -> Callable[..., None]:
        def writing(tables: PostgresTables, entries: list[Sealed], *rest: object) -> None:
            write(tables, entries, *rest)
            if any(entry.header.writer == self._writer for entry in entries) and not self.reached.is_set():
                self.reached.set()
                self.over.wait(STOPPED_SECONDS)

        return writing


@pytest.fixture(name="stop")
def _stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Stop]]:
    stops: list[Stop] = []

    def stop(writer: str) -> Stop:
        stops.append(Stop(writer))
        monkeypatch.setattr(PostgresTables, "write_entries", stops[-1].before(PostgresTables.write_entries))
        return stops[-1]

    yield stop
    for each in stops:
        each.over.set()


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_writer_that_stands_still_within_a_commit(store: PostgresKit, stop: Callable[[str], Stop], taken_over: bool) -> None:
    """Others append while it stands still. What it was about to commit is undone: it appends that again behind theirs, or finds
    itself fenced if it was taken over."""
    watch = Watch()
    a = store.open(writer="a")
    b = store.open(writer="b", seconds=watch)
    (left,) = admit(a, item(1))
    stopped = stop("a")
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(admit, a, item(2), item(3))
        assert stopped.reached.wait(STOPPED_SECONDS)
        theirs = admit(b, item(4))
        watch.now += 2 * LEASE_SECONDS
        taken = b.maintain(NOW, idle=True) if taken_over else ()
        assert not stopped.over.is_set()
        assert not answer.done()
        stopped.over.set()

        assert sequences(theirs) == [2]
        assert [(one.admitted, one.attempt) for one in taken] == ([(left, 2)] if taken_over else [])
        if taken_over:
            with pytest.raises(JournalBroken, match="fenced"):
                answer.result()
            assert b.newest().last_sequence == 2
        else:
            assert sequences(answer.result()) == [3, 4]
            assert len(a.append_many([completed(left)], NOW)[0].entries) == 1
    assert sound(store)


@contextlib.contextmanager
def held(store: PostgresKit, *statements: bytes, wait_event: str) -> Iterator[psycopg.Connection]:
    """A session that has sent a transaction's first statements, without the end of the pipeline, and reads no answer."""
    with contextlib.closing(psycopg.connect(store.url, autocommit=True)) as db:
        db.pgconn.enter_pipeline_mode()
        for statement in (b"BEGIN", LOCK, *statements):
            db.pgconn.send_query_params(statement, None)
        db.pgconn.send_flush_request()
        db.pgconn.flush()
        deadline = time.monotonic() + STOPPED_SECONDS
        waiting = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s AND backend_xid IS NOT NULL AND state = 'active'"
        while store.execute(waiting, db.info.backend_pid) != [(wait_event,)]:
            assert time.monotonic() < deadline, f"the session never comes to {wait_event}"
            time.sleep(0.01)
        yield db


@pytest.mark.parametrize(
    ("statement", "wait_event"), [(b"SELECT 1", "ClientRead"), (b"SELECT repeat('x', 10000000)", "ClientWrite")]
)
def test_a_session_that_waits_for_its_client(store: PostgresKit, statement: bytes, wait_event: str) -> None:
    """A session whose client neither writes nor reads does not keep the lock, at whatever point of a pipeline it stopped."""
    with store.opened("b") as b, held(store, statement, wait_event=wait_event):
        (entry,) = admit(b)

    assert sequences([entry]) == [1]
    assert sound(store)


def test_a_session_that_has_waited_for_less_than_a_lease(store: PostgresKit) -> None:
    """It keeps the lock: its writer may go on, and has its lease."""
    store.configure(lease_seconds=60.0)
    with store.opened("b") as b, held(store, wait_event="ClientRead") as db:
        with b._database.connected() as connection:
            PostgresTables(connection).end_stopped(store.settings.lease_seconds)

        assert store.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", db.info.backend_pid) == [("active",)]


def test_a_take_over_that_stands_still(store: PostgresKit) -> None:
    """A writer holds its lease although the session that stands still has locked its row, too."""
    watch = Watch()
    a = store.open(writer="a", seconds=watch)
    watch.now += LEASE_SECONDS
    with held(store, b"UPDATE writers SET epoch = epoch + 1 WHERE name = 'a'", wait_event="ClientRead"):
        assert a.maintain(NOW, idle=True) == []

        assert sequences(admit(a)) == [1]
    assert a.head.epoch == 1


def test_a_start_behind_one_that_stands_still(store: PostgresKit) -> None:
    """A sidecar opens the log although another one stands still with its lock."""
    store.open(writer="a").close()
    with held(store, wait_event="ClientRead"):
        b = store.open(writer="b")

    assert sequences(admit(b)) == [1]


def test_a_transaction_that_is_at_work(store: PostgresKit) -> None:
    """It is not ended, however long it takes: it may be a commit. What waits for it is refused after two leases, changes
    nothing, and goes on with the connection that it has."""
    b = store.open(writer="b")
    with held(store, b"SELECT pg_sleep(100)", wait_event="PgSleep") as db:
        connection = b._database._connection
        with pytest.raises(LogLocked):
            admit(b)
        with pytest.raises(JournalUnusable, match="lock"):
            store.open(writer="c")
        assert store.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", db.info.backend_pid) == [(1,)]
        store.execute("SELECT pg_terminate_backend(%s)", db.info.backend_pid)

        assert sequences(admit(b)) == [1]
        assert b._database._connection is connection
    assert sound(store)
