"""What only PostgreSQL can do to a journal: other writers, leases, and lost connections."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ostinato.errors import JournalUnavailable
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import CommitUnknown, JournalBroken, Unfinished
from sidecar.journal.postgres import PostgresStore, PostgresTables
from tests.sidecar.journal_kit import PostgresKit, admission, completed, ended, item, sequences, twin
from tests.sidecar.postgres_kit import EXPIRE, NOW, Watch, admit, sound, through
from tests.sidecar.postgres_proxy import Cut, Proxy

# ---- one order


def test_many_writers_have_one_order(store: PostgresKit) -> None:
    """Writers that append at once take numbers and indexes from one row: no gap, no fork, batches whole."""
    writers = [f"writer-{number}" for number in range(4)]
    journals = [store.open(writer=writer)[0] for writer in writers]

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
        threading.Thread(target=lambda name=name: opened.append(store.open(writer=name, log_id=name * 32)[0]))
        for name in "abcd"
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
    old, _ = store.open(seconds=watch)
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
    a, _ = store.open(writer="a")
    keyed, unkeyed, done = admit(a, item(1), item(2), key="k") + admit(a, item(3))
    a.append_many([completed(done)], NOW)
    b, _ = store.open(writer="b", seconds=watch)
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
    again, found = store.open(writer="a")
    assert (again.head.epoch, found.unfinished) == (3, ())
    _, found = store.open(writer="b")
    assert [(one.admitted.header.sequence, one.attempt) for one in found.unfinished] == [(2, 3), (own[0].header.sequence, 2)]
    assert sound(store)


def test_nobody_is_taken_over_after_an_outage(store: PostgresKit) -> None:
    """A lease that has run out counts only for those who were connected for as long as one lasts: they would have seen it
    renewed."""
    watch = Watch()
    a, _ = store.open(writer="a")
    admit(a)
    b, _ = store.open(writer="b", seconds=watch)
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
    journal, _ = store.open(writer="a", seconds=watch)

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
    stopped, _ = store.open(writer="a")
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
    journal, _ = store.open(url=through(line, store))
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
def test_a_commit_in_doubt_is_not_answered(
    store: PostgresKit, line: Proxy, at_commit: Callable[[Callable[[], None]], None], cut: Cut
) -> None:
    """While the server cannot be asked nothing is known; whoever appends the same drafts again is told what became of them."""
    watch = Watch()
    url = through(line, store)
    journal, _ = store.open(url=url, seconds=watch)

    def lose() -> None:
        line.cut, line.closed = cut, True

    drafts = [admission(item(), item())]
    at_commit(lose)
    with pytest.raises(CommitUnknown):
        journal.append_many(drafts, NOW)
    with pytest.raises(CommitUnknown):
        journal.append_many(drafts, NOW)
    with pytest.raises(JournalUnavailable):
        journal.entries(1, 1, payloads=False)
    assert not journal.restore_reserve()
    line.closed = False
    watch.now += 10
    (answer,) = journal.append_many(drafts, NOW)

    assert sequences(answer.entries) == [1, 2]
    assert journal.newest().last_sequence == 2
    assert tuple(journal.entries(2, 10, payloads=True)) == answer.entries
    assert journal.restore_reserve()
    assert sound(store)


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_a_take_over_in_doubt(
    store: PostgresKit, line: Proxy, at_commit: Callable[[Callable[[], None]], None], cut: Cut
) -> None:
    """Items are handed over once, whatever became of the line at that moment."""
    watch = Watch()
    a, _ = store.open(writer="a")
    admit(a, item(), item())
    url = through(line, store)
    b, _ = store.open(writer="b", url=url, seconds=watch)
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
    """A connection that was ended while nobody used it is replaced, by a read as by an append."""
    with store.opened() as journal:
        for use in (lambda: admit(journal), lambda: journal.newest(), lambda: journal.items(1, 1, 1)):
            store.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ostinato writer'")
            use()
        assert journal.head.last_sequence == 1
