"""The SQLite file: who may open it, what is refused and why, and what verification finds."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from ostinato.chain import entry_hash, payload_digest
from ostinato.errors import JournalFull
from ostinato.v1 import types_pb2

from sidecar.journal.model import JournalUnusable
from sidecar.journal.sqlite import APPLICATION_ID, CHECKPOINT_PAGES, WAL_BYTES_MAX, SqliteStore
from tests.pair import python
from tests.sidecar.journal_kit import SqliteKit, admission, audit, completed, ended, item

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> SqliteKit:
    return SqliteKit(tmp_path / "journal.db")


def test_only_one_process(store: SqliteKit) -> None:
    """While a sidecar has the journal, no other process gets it; when it is closed, the next one does."""
    verify = ("-m", "sidecar", "verify", "--journal", store.location)
    with store.opened():
        with pytest.raises(JournalUnusable, match="in use by another sidecar"):
            store.open()
        assert "in use by another sidecar" in python(*verify).stderr
    assert python(*verify).returncode == 0


def test_file_is_private(store: SqliteKit) -> None:
    """The journal holds prompts and answers: its files are its owner's alone."""
    store.configure(reserve_bytes=4096)
    with store.opened() as journal:
        journal.append_many([admission()], 1)
        files = list(store.path.parent.iterdir())
        assert {path.suffix for path in files} == {".db", ".db-wal", ".reserve"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_one_writer(store: SqliteKit) -> None:
    """A journal of another writer is refused, and stays as it was."""
    store.open(writer="a").close()
    with pytest.raises(JournalUnusable, match="is of sidecar 'a', not 'b'"):
        store.open(writer="b")

    journal = store.open(writer="a")
    journal.close()
    assert (journal.head.epoch, journal.head.index) == (2, 2)


def test_foreign_files(store: SqliteKit) -> None:
    """Another program's database, a file that is not a database, and a missing folder are each refused with a reason."""
    store.execute("CREATE TABLE something (x)")
    with pytest.raises(JournalUnusable, match="another program's database"):
        store.open()
    store.path.write_text("Once upon a time, " * 1000)
    with pytest.raises(JournalUnusable, match="is not a journal"):
        store.open()
    with pytest.raises(JournalUnusable, match="nor does its folder"):
        SqliteKit(store.path.parent / "missing" / "journal.db").open()


def test_interrupted_creation(store: SqliteKit) -> None:
    """A process that died between making the file and its first commit is no obstacle."""
    store.path.touch(mode=0o600)
    store.open().close()
    other = store.another()
    other.execute("PRAGMA journal_mode = WAL")
    with other.opened() as journal:
        assert (journal.head.epoch, journal._db.pragma("application_id")) == (1, APPLICATION_ID)


def test_durability_settings(store: SqliteKit) -> None:
    """Every commit is synced, the log beside the file is bounded, and checkpoints happen only when we say so."""
    with store.opened() as journal:
        assert journal._db.pragma("synchronous") == 2
        assert journal._db.pragma("journal_mode") == "wal"
        assert journal._db.pragma("locking_mode") == "exclusive"
        assert journal._db.pragma("journal_size_limit") == WAL_BYTES_MAX


def test_checkpoint(store: SqliteKit) -> None:
    """The write-ahead log is copied into the file when no work waits, or when it is very long, and then begins anew."""
    wal = store.path.with_name(store.path.name + "-wal")
    with store.opened() as journal:
        while journal._wal_pages < CHECKPOINT_PAGES:
            journal.append_many([admission(item(*range(5_000)))], 1)
            journal.maintain(0, idle=False)
        grown, before = wal.stat().st_size, store.path.stat().st_size
        journal.maintain(0, idle=True)
        assert store.path.stat().st_size > before
        assert journal._wal_pages == 0
        journal.append_many([admission(item(*range(5_000)))], 1)
        assert wal.stat().st_size <= grown
        assert journal._wal_pages < 100


def test_expired_keys_are_purged(store: SqliteKit) -> None:
    """Keys that have expired go in small steps as new ones come; others stay."""
    store.configure(idempotency_ttl_seconds=1)
    with store.opened() as journal:

        def kept() -> int:
            return int(journal._db.execute("SELECT count(*) FROM keys").get)

        answers = journal.append_many([admission(key=f"k{n}") for n in range(100)], store.clock.millis)
        journal.append_many([ended(answer.entries[0]) for answer in answers[:90]], store.clock.millis)
        assert kept() == 100
        store.clock.sleep(1)
        journal.append_many([admission(key="new")], store.clock.millis)
        assert 11 < kept() < 100
        journal.append_many([admission(key="newer")], store.clock.millis)
        assert kept() == 12


# No room.


def fill(journal: SqliteStore, tokens: int = 2_000) -> int:
    """Admit until there is no room; how many were admitted."""
    admitted = 0
    while True:
        try:
            journal.append_many([admission(item(*range(tokens)))], 1)
        except JournalFull:
            return admitted
        admitted += 1


def test_bound(store: SqliteKit) -> None:
    """At journal_bytes_max admissions and verdicts find no room and change nothing; outcomes do, within the reserve."""
    store.configure(journal_bytes_max=1 << 20, reserve_bytes=128 << 10)
    with store.opened() as journal:
        admitted = fill(journal) + fill(journal, tokens=1)
        assert admitted > 20
        head = journal.head
        unfinished = [found.admitted for found in journal.items(1, admitted, admitted)]
        with pytest.raises(JournalFull):
            journal.append_many([completed(unfinished[0]), audit(unfinished[0])], 1)
        assert journal.head == head
        assert len(journal.entries(1, 10_000, payloads=False)) == head.index

        answers = journal.append_many([completed(entry) for entry in unfinished], 1)
        assert all(len(answer.entries) == 1 for answer in answers)
    assert store.path.stat().st_size <= 1 << 20
    assert store.faults() == []


def test_outcomes_find_a_bound_too(store: SqliteKit) -> None:
    """Outcomes that exceed even the reserve are refused whole, and fit when room returns."""
    store.configure(journal_bytes_max=512 << 10, reserve_bytes=64 << 10)
    with store.opened() as journal:
        entries = [found.admitted for found in journal.items(1, fill(journal), 100)]
        big = completed(entries[0], text="x" * (128 << 10))
        with pytest.raises(JournalFull):
            journal.append_many([big], 1)
        journal._db.execute("DELETE FROM payloads WHERE entry_index > 2")
        assert len(journal.append_many([big], 1)[0].entries) == 1
        assert journal.restore_reserve()


def test_reserve(store: SqliteKit) -> None:
    """The reserve is real disk space; without it only outcomes are taken, until it is restored."""
    store.configure(reserve_bytes=1 << 20)
    reserve = store.path.with_name("journal.db.reserve")
    with store.opened() as journal:
        assert journal.reserved
        assert reserve.stat().st_blocks * 512 >= 1 << 20
        (entry,) = journal.append_many([admission()], 1)[0].entries
        journal.release_reserve()
        assert not reserve.exists()
        with pytest.raises(JournalFull):
            journal.append_many([admission()], 1)
        assert len(journal.append_many([completed(entry)], 1)[0].entries) == 1
        assert journal.restore_reserve()
        assert len(journal.append_many([admission()], 1)[0].entries) == 1


def test_reserve_larger_than_the_disk(store: SqliteKit) -> None:
    """Where the reserve cannot be had the journal opens and is read, takes outcomes, and refuses new work."""
    with store.opened() as journal:
        (entry,) = journal.append_many([admission()], 1)[0].entries
    store.configure(reserve_bytes=1 << 50)
    with store.opened() as journal:
        assert not journal.reserved
        assert not store.path.with_name("journal.db.reserve").exists()
        assert len(journal.items(1, 1, 1)) == 1
        with pytest.raises(JournalFull):
            journal.append_many([admission()], 1)
        assert len(journal.append_many([completed(entry)], 1)[0].entries) == 1


# Verification.


@pytest.fixture(name="written")
def _written(store: SqliteKit) -> SqliteKit:
    """OPENED, ADMITTED 1 to 3 (one batch), COMPLETED 1, FAILED 2, OPENED."""
    with store.opened() as journal:
        entries = journal.append_many([admission(item(1), item(2), item(3))], 1)[0].entries
        journal.append_many([completed(entries[0]), ended(entries[1])], 1)
    store.open().close()
    return store


def test_verify(written: SqliteKit) -> None:
    """A journal as it was written has no faults, and verifying it adds nothing to it."""
    content = written.path.read_bytes()

    assert written.faults() == []
    assert written.path.read_bytes() == content


def forge(store: SqliteKit, index: int, /, **fields: object) -> None:
    """Change an entry's header and hash everything after it anew, as a person with the file and this program could."""
    hashes: dict[int, bytes] = dict(store.execute("SELECT entry_index, entry_hash FROM entries"))
    previous = hashes[index - 1]
    for number in range(index, max(hashes) + 1):
        [(content,)] = store.execute("SELECT header FROM entries WHERE entry_index = ?", number)
        header = types_pb2.EntryHeader.FromString(content)
        if number == index:
            for name, value in fields.items():
                setattr(header, name, value)
        previous = entry_hash(previous, header)
        update = "UPDATE entries SET header = ?, entry_hash = ? WHERE entry_index = ?"
        store.execute(update, header.SerializeToString(), previous, number)


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("DELETE FROM payloads WHERE entry_index = 3", "kept or dropped together, and one is missing; entries to 5 are sound"),
        (
            "UPDATE payloads SET payload = x'00' WHERE entry_index = 4",
            "entry 4, ADMITTED: payload: does not match payload_digest",
        ),
        (
            "UPDATE entries SET header = x'08051003' WHERE entry_index = 5",
            "entry 5, COMPLETED: .*entry_hash: is not the hash of",
        ),
        ("DELETE FROM entries WHERE entry_index = 6", "entry 7, OPENED: index: 7 after 5"),
    ],
)
def test_verify_finds_changed_bytes(written: SqliteKit, statement: str, why: str) -> None:
    """1: an entry that was changed, taken out or whose payload was changed is found, and so is a payload that was taken out."""
    written.execute(statement)
    assert re.search(why, written.faults()[0])


@pytest.mark.parametrize(
    ("index", "fields", "fault"),
    [
        (3, {"sequence": 4}, "sequence: 4 instead of 2"),
        (3, {"first_sequence": 2, "count": 1}, "batch: is not whole"),
        (4, {"count": 4}, "batch: is not whole"),
        (4, {"kind": types_pb2.ENTRY_KIND_AUDITED}, "batch: is not whole"),
        (2, {"count": 1}, "batch: is not whole"),
        (6, {"sequence": 1}, "sequence: 1 was not admitted, or had ended before"),
        (6, {"sequence": 9}, "sequence: 9 was not admitted, or had ended before"),
        (6, {"epoch": 7}, "epoch: 7, and the writer's newest is 1"),
        (6, {"writer": "x"}, "epoch: 1, and the writer's newest is 0"),
        (7, {"epoch": 1}, "epoch: opens 1 after 1"),
        (5, {"epoch": 0}, "epoch: 0 after 1"),
        (5, {"log_id": "x"}, "log_id: x after 0123456789abcdef0123456789abcdef"),
        (5, {"output_digest": b"x" * 32}, "output_digest: is not the payload's"),
        (5, {"seed": 1}, "seed: is not the payload's"),
        (2, {"input_digest": b"x" * 32}, "input_digest: is not the payload's"),
        (5, {"payload_digest": payload_digest(b"")}, "payload: does not match payload_digest"),
    ],
)
def test_verify_finds_forgeries(written: SqliteKit, index: int, fields: dict[str, object], fault: str) -> None:
    """2 to 5: what breaks an invariant is found, also where all hashes were made to fit."""
    forge(written, index, **fields)

    [found] = written.faults()
    assert re.match(rf"entry ({index}|{index + 1}), [A-Z]+: .*{fault}", found)


def test_verify_finds_a_forged_index(written: SqliteKit) -> None:
    """2: an entry whose header has another index than its place is found, and ends the reading."""
    forge(written, 3, index=9)
    with pytest.raises(JournalUnusable, match="entry 3: its header says 9"):
        written.faults()
