"""`python -m sidecar COMMAND`: what an operator is told, and what the exit code is."""

from __future__ import annotations

import io
import json
import shutil
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import JournalFull, JournalUnavailable
from ostinato.signature import PublicKeys, new_key, signer_of
from ostinato.v1 import types_pb2

from sidecar import commands, config
from sidecar.journal.mark import MarkFile
from sidecar.journal.model import JournalBroken, JournalUnusable
from sidecar.journal.sqlite import SqliteStore
from tests.postgres import Postgres
from tests.sidecar.journal_kit import FIRST_VERSION, PostgresKit, SqliteKit, admission, completed, item, sequences

NOW = 1_700_000_000.0


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> SqliteKit:
    """Of three items that have ended. It is signed."""
    store = SqliteKit(tmp_path / "journal.db")
    store.configure(signer=signer_of(new_key()))
    with store.opened() as journal:
        (answer,) = journal.append_many([admission(item(1), item(2), item(3))], store.clock.millis)
        journal.append_many([completed(entry) for entry in answer.entries], store.clock.millis)
    return store


def mark_of(store: SqliteKit) -> Path:
    path = config.mark_of(str(store.path))
    assert path is not None
    return path


class Said:
    """Runs a command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], journal: Path) -> None:
        self._capsys, self._journal = capsys, journal
        self.out = ""

    def __call__(self, *argv: object, code: int = 0, journal: object = "") -> str:
        """What it says of this journal, or of the store's, or, with None, of the configured one; it must end with this code."""
        named = [] if journal is None else ["--journal", journal or self._journal]
        with pytest.raises(SystemExit) as ended:
            commands.main([str(each) for each in (*argv, *named)])
        self.out, said = self._capsys.readouterr()
        assert ended.value.code == code, said
        return said


@pytest.fixture(name="run")
def _run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    return Said(capsys, tmp_path / "journal.db")


def test_verify(store: SqliteKit, run: Said) -> None:
    """A sound journal gives 0; else 1, and the first bad entry is named, with its kind and what is wrong with it."""
    assert "7 entries are sound" in run("verify")
    store.execute("UPDATE payloads SET payload = x'00' WHERE entry_index = 5")
    said = run("verify", code=1)
    assert "entry 5, COMPLETED: payload: does not match payload_digest" in said


def test_a_journal_that_is_not_there(tmp_path: Path, run: Said) -> None:
    """A wrong path is an error, and makes no journal there."""
    for command in (["verify"], ["prune", "--before", "1d"], ["redact", "1"], ["export", "-"]):
        assert "does not exist" in run(*command, journal=tmp_path / "nothing", code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_file_names_the_journal(
    store: SqliteKit, run: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config, or its variable, says which journal is meant where neither a flag nor the journal's own variable does."""
    file = tmp_path / "ostinato.toml"
    file.write_text(f"[sidecar]\njournal = '{store.path}'\n")
    assert "sound" in run("verify", "--config", file, journal=None)
    assert "nowhere does not exist" in run("verify", "--config", file, journal=tmp_path / "nowhere", code=1)
    monkeypatch.setenv("OSTINATO_SIDECAR_CONFIG", str(file))
    assert "sound" in run("verify", journal=None)
    monkeypatch.setenv("OSTINATO_SIDECAR_JOURNAL", str(tmp_path / "nowhere"))
    assert "nowhere does not exist" in run("verify", code=1, journal=None)
    run("verify", "--config", tmp_path, code=2, journal=None)


@pytest.mark.parametrize(
    "command", [["prune", "--before", "yesterday"], ["redact"], ["redact", "0"], ["accept-loss"], ["prune"]]
)
def test_bad_command_lines(store: SqliteKit, run: Said, command: list[str]) -> None:
    """What cannot be meant is refused with code 2."""
    run(*command, code=2)


def test_prune_and_redact(store: SqliteKit, run: Said) -> None:
    """Payloads go by number, by age and by time; the journal verifies afterwards."""
    assert "2 payloads are dropped" in run("redact", "2")
    assert "2 payloads are dropped" in run("prune", "--before", "3")
    assert "0 payloads are dropped" in run("prune", "--before", "2023-11-14")
    assert "2 payloads are dropped" in run("prune", "--before", "1h")
    assert "sound" in run("verify")


@given(st.integers(1, 9_999), st.sampled_from("smhdw"))
def test_ages(count: int, unit: str) -> None:
    """An age is so long before now, whatever its unit."""
    seconds = count * {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}[unit]
    old = commands.older(f"{count}{unit}", NOW)
    at = round((NOW - seconds) * 1000)
    if at > 0:
        assert not old(types_pb2.EntryHeader(time_unix_millis=at))
        assert old(types_pb2.EntryHeader(time_unix_millis=at - 1))


@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)))  # noqa: DTZ001
def test_times(time: datetime) -> None:
    """A time without an offset is UTC."""
    millis = round(time.replace(tzinfo=UTC).timestamp() * 1000)
    for text in (time.isoformat(), time.isoformat() + "+00:00"):
        assert commands.older(text, NOW)(types_pb2.EntryHeader(time_unix_millis=millis - 1))
        assert not commands.older(text, NOW)(types_pb2.EntryHeader(time_unix_millis=millis + 1))


def test_export_and_import(store: SqliteKit, run: Said, tmp_path: Path) -> None:
    """Through a file that is its owner's alone and that nothing overwrites; the copy is the journal again, signatures too."""
    file, other = tmp_path / "journal.jsonl", tmp_path / "other.db"
    run("export", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f"{file}: File exists" in run("export", file, code=1)
    assert "7 entries, sequences to 3" in run("import", file, journal=other)
    assert "not empty" in run("import", file, journal=other, code=1)
    run("export", "-", journal=other)
    assert run.out == file.read_text()
    assert run.out.count('{"head": ') == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "UPDATE heads SET signature = zeroblob(64) WHERE last_index = 4",
            "head of entries 2 to 4: its signature is not by key",
        ),
        ("UPDATE heads SET first_index = 3 WHERE last_index = 4", "head of entries 3 to 4: its signature is not by key"),
        ("UPDATE heads SET first_index = 1 WHERE last_index = 4", "head of entries 1 to 4: they are no transaction"),
        ("UPDATE heads SET last_index = 99 WHERE last_index = 7", "head of entries 5 to 99: they are no transaction"),
        ("DELETE FROM heads", "entry 1, OPENED: no signed head of key {key} covers it"),
        ("DELETE FROM heads WHERE last_index = 4", "entry 2, ADMITTED: no signed head of key {key} covers it"),
        ("DELETE FROM heads WHERE last_index = 7", "entry 5, COMPLETED: no signed head of key {key} covers it"),
        ("UPDATE heads SET key_id = 'b' WHERE last_index = 4", "entry 2, ADMITTED: no signed head of key {key} covers it"),
        ("INSERT INTO heads VALUES (9, 9, '', x'00')", "head of entries 9 to 9: it is signed by key , which was not given"),
    ],
)
def test_damaged_heads(store: SqliteKit, run: Said, tmp_path: Path, change: str, said: str) -> None:
    """verify finds a signed head that is not of the entries, or is missing; with the public key also a changed signature. What
    commands append needs none."""
    signer = store.settings.signer
    assert signer is not None
    (tmp_path / "key").write_text(signer.public_pem)
    run("redact", 1)
    run("accept-loss", "--through", 9)
    assert "are sound" in run("verify", "--key", tmp_path / "key")
    store.execute(change)

    assert said.format(key=signer.key_id) in run("verify", "--key", tmp_path / "key", code=1)


def test_a_log_of_another_key(store: SqliteKit, run: Said, tmp_path: Path) -> None:
    """With --key, verify refuses an epoch or a signed head of a key that was not given, and names that key. So it does for an
    epoch whose heads are gone under a recorded loss. With all keys of the log, it counts the heads of each key, and the entries
    that no head covers."""
    old = store.settings.signer
    store.configure(signer=(new := signer_of(new_key())))
    store.open().close()
    assert old is not None
    files = []
    for signer in (old, new):
        files.append(tmp_path / signer.key_id)
        files[-1].write_text(signer.public_pem)
    run("accept-loss", "--through", 9)

    said = run("verify", "--key", files[0], "--key", files[1])
    assert f"sound; 3 heads verified with key {old.key_id}; 1 heads verified with key {new.key_id}; 2 entries have no" in said
    said = run("verify", "--key", files[0], code=1)
    assert f"head of entries 8 to 8: it is signed by key {new.key_id}, which was not given" in said
    assert f"head of entries 1 to 1: it is signed by key {old.key_id}" in run("verify", "--key", files[1], code=1)
    store.execute("DELETE FROM heads WHERE first_index = 8")
    said = run("verify", "--key", files[0], code=1)
    assert f"entry 8, OPENED: its epoch is signed by key {new.key_id}, which was not given" in said


@pytest.mark.parametrize("statements", ["DROP INDEX openings; PRAGMA user_version = 6", FIRST_VERSION[SqliteKit]])
def test_commands_that_only_read(run: Said, tmp_path: Path, statements: str) -> None:
    """verify, export and an accept-loss that is refused leave a file of an older version as it is, byte for byte. rebuild keeps
    a copy of that version."""
    store = SqliteKit(tmp_path / "journal.db")
    with store.opened() as journal:
        journal.append_many([admission(item(1), item(2))], 1)
    store.execute(statements)
    content, version = store.path.read_bytes(), store.execute("PRAGMA user_version")
    assert "3 entries are sound" in run("verify")
    run("export", "-")
    assert run.out.count("\n") == 4
    assert "were given out" in run("accept-loss", "--through", 1, code=1)
    assert store.path.read_bytes() == content
    copy = SqliteKit(store.path.with_name("journal.db.before-rebuild"))
    assert f"a copy of what was there is {copy.path}" in run("rebuild")
    assert [kit.execute("PRAGMA user_version") for kit in (copy, store)] == [version, [(7,)]]


def test_a_head_that_was_lost(store: SqliteKit, run: Said) -> None:
    """Where a transaction has lost its signed head with the end of the journal, verify asks for none once the loss is
    accepted."""
    store.execute("DELETE FROM heads WHERE last_index = 7")
    assert "entry 5, COMPLETED: no signed head" in run("verify", code=1)
    run("accept-loss", "--through", 9)
    assert "9 entries are sound" in run("verify")


def test_a_log_that_is_not_signed(run: Said, tmp_path: Path) -> None:
    """With --key, verify does not call a log sound of which no head is signed by a key that was given. A key that has signed
    nothing yet may stand beside one that has."""
    other, own = signer_of(new_key()), signer_of(new_key())
    (tmp_path / "other").write_text(other.public_pem)
    (tmp_path / "both").write_text(other.public_pem + own.public_pem)
    SqliteKit(tmp_path / "journal.db").open().close()
    assert "1 entries are sound" in run("verify")
    assert f"no head of it is signed by key {other.key_id}" in run("verify", "--key", tmp_path / "other", code=1)
    signed = SqliteKit(tmp_path / "signed.db")
    signed.configure(signer=own)
    with signed.opened() as journal:
        journal.append_many([admission(item(1))], 1)
    assert "entries are sound" in run("verify", "--key", tmp_path / "both", journal=signed.path)


def test_a_signing_key(run: Said, tmp_path: Path) -> None:
    """A new file gets a key that only its owner can read, and its public key is printed; a file that exists stays, and says its
    own. What is no such key is refused."""
    file = tmp_path / "signing.pem"
    said = run("signing-key", file, journal=None)
    public, content = run.out, file.read_bytes()
    keys = PublicKeys()
    keys.add(public.encode())

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f"key id {next(iter(keys))}" in said
    run("signing-key", file, journal=None)
    assert (run.out, file.read_bytes()) == (public, content)
    file.chmod(0o644)
    assert "lets every user of this machine read it" in run("signing-key", file, code=1, journal=None)
    (tmp_path / "other").write_text(public)
    (tmp_path / "other").chmod(0o600)
    assert "holds no private key" in run("signing-key", tmp_path / "other", code=1, journal=None)


def test_half_a_file(store: SqliteKit, run: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends early, is not an export, or not text, leaves no journal behind; the file and the line are named."""
    run("export", "-")
    lines, other = run.out.splitlines(keepends=True), tmp_path / "other.db"
    for text, why in (
        ("".join(lines[:-1]), f"line {len(lines)}: is missing"),
        ("".join([*lines, lines[-1]]), "goes on after"),
        ("".join(lines)[:-9], f"line {len(lines)}"),
        ("", "is empty: it is no exported journal"),
        ("\n \n", "line 1: is blank"),
        ("{}\n", "line 1"),
        (lines[0] + "[]\n", "line 2: is no head"),
        (json.dumps({**json.loads(lines[0]), "version": 2}), "version 1"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert why in run("import", "-", journal=other, code=1)
        assert not other.exists()
    for content in (b"\xff", *("".join(part).encode() + b"\xff" for part in (lines[:2], lines))):
        (tmp_path / "lines").write_bytes(content)
        assert run("import", tmp_path / "lines", journal=other, code=1).startswith(f"import: {tmp_path}/lines ")
        assert not other.exists()


# A journal that lost its end: copied, gone on with, and put back.


@pytest.fixture(name="behind")
def _behind(store: SqliteKit) -> SqliteKit:
    """Its copy of sequence 3 has replaced what had come to sequence 5, as the mark knows."""
    copy = store.path.with_name("copy.db")
    shutil.copyfile(store.path, copy)
    with store.opened() as journal:
        journal.append_many([admission(item(4), item(5))], store.clock.millis)
        MarkFile(mark_of(store)).write(journal.head.mark)
    shutil.copyfile(copy, store.path)
    return store


def test_accept_loss(behind: SqliteKit, run: Said) -> None:
    """An old copy, put back, opens only when its operator has said which numbers are lost, and goes on behind them."""
    mark = MarkFile(mark_of(behind))
    with pytest.raises(JournalUnusable, match="accept-loss --through 5"):
        behind.open(mark=mark.read())
    assert "sequences to 5 were given out" in run("accept-loss", "--through", "4", code=1)
    assert "no log has reached" in run("accept-loss", "--through", 2**62, code=1)
    with pytest.raises(JournalUnusable):
        behind.open(mark=mark.read())

    assert "2 sequences are lost; the next one is 6" in run("accept-loss", "--through", "5")
    assert "sound" in run("verify")
    journal = behind.open(mark=mark.read())
    assert sequences(journal.append_many([admission()], 1)[0].entries) == [6]
    journal.close()
    far = 2**36
    assert f"{far - 6} sequences are lost; the next one is {far + 1}" in run("accept-loss", "--through", far)


def test_another_log(behind: SqliteKit, run: Said) -> None:
    """Neither a new journal nor that of another log is taken for the marked one, whatever its operator accepts."""
    behind.path.unlink()
    mark = MarkFile(mark_of(behind)).read()
    with pytest.raises(JournalUnusable, match="another or new"):
        behind.open(mark=mark, log_id="e" * 32)
    assert "there is no journal in it" in run("accept-loss", "--through", "5", code=1)
    behind.open(log_id="e" * 32).close()
    assert "another log" in run("accept-loss", "--through", "5", code=1)


def test_accept_loss_of_an_empty_journal(tmp_path: Path, run: Said) -> None:
    """A journal without an entry, and without a mark, is not taken for another log's."""
    SqliteStore.open_for_maintenance(str(tmp_path / "journal.db"), "make")._db.close()

    assert "has no entries" in run("accept-loss", "--through", "9", code=1)


def test_a_rebuild_that_is_refused(store: SqliteKit, run: Said, tmp_path: Path) -> None:
    """A rebuild of a journal without an entry leaves no copy, and so says the same again; a copy that is there is left as it
    is."""
    empty = tmp_path / "empty.db"
    SqliteStore.open_for_maintenance(str(empty), "make")._db.close()
    for _ in range(2):
        assert "has no entries" in run("rebuild", journal=empty, code=1)
    copy = tmp_path / "journal.db.before-rebuild"
    copy.write_text("kept")
    assert f"{copy} is there already: move it away" in run("rebuild", code=1)
    assert (list(tmp_path.glob("*.before-rebuild")), copy.read_text()) == ([copy], "kept")


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        ("append_many", JournalFull("no room"), "no room"),
        ("append_many", JournalUnavailable("no database"), "no database"),
        ("append_many", JournalBroken("torn"), "torn"),
        ("open", JournalUnusable("a newer version"), "--journal: a newer version"),
    ],
)
def test_accept_loss_that_cannot_be_written(
    behind: SqliteKit, run: Said, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, said: str
) -> None:
    """A journal that cannot be opened, or cannot take the LOST entry, is told in one line, and the mark stays as it was."""
    mark = mark_of(behind).read_bytes()
    monkeypatch.setattr(SqliteStore, method, Mock(side_effect=error))

    assert run("accept-loss", "--through", "5", code=1) == f"accept-loss: {said}\n"
    assert mark_of(behind).read_bytes() == mark


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"log_id": "a", "index": "x", "entry_hash": "", "last_sequence": "1"}'])
def test_a_damaged_mark(store: SqliteKit, text: str) -> None:
    """A file that is no mark is not taken for none."""
    file = mark_of(store)
    file.write_text(text)
    with pytest.raises(JournalUnusable, match="is no high-water mark"):
        MarkFile(file).read()


def test_a_mark_is_replaced_whole(store: SqliteKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is what was written, and a writing that fails leaves the mark before."""
    file = MarkFile(mark_of(store))
    assert file.read() is None
    with store.opened() as journal:
        mark = journal.head.mark
    file.write(mark)
    assert file.read() == mark

    def fail(_handle: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        file.write(type(mark)(mark.log_id, mark.index + 1, mark.entry_hash, mark.last_sequence))
    assert file.read() == mark


def test_a_shared_journal(postgres: Postgres, run: Said, tmp_path: Path) -> None:
    """The commands take a database as well: they fill it, thin it out while it is in use, and go on behind what is lost."""
    store, url, file = SqliteKit(tmp_path / "journal.db"), postgres.url(postgres.schema()), tmp_path / "journal.jsonl"
    with store.opened() as journal:
        (answer,) = journal.append_many([admission(item(1), item(2), key="k")], store.clock.millis)
        journal.append_many([completed(answer.entries[0])], store.clock.millis)
    run("export", file)
    assert "no journal in this database" in run("verify", journal=url, code=1)
    run("import", file, journal=url)

    shared = PostgresKit(url)
    backend = shared.open()
    assert [(each.admitted.header.sequence, each.attempt) for each in backend.to_recover] == [(2, 2)]
    assert "2 payloads are dropped" in run("redact", "1", journal=url)
    assert sequences(backend.append_many([admission()], 1)[0].entries) == [3]
    backend.close()
    mark = tmp_path / "mark"
    MarkFile(mark).write(replace(backend.head.mark, index=99, last_sequence=7))
    with pytest.raises(JournalUnusable, match="accept-loss --through 7"):
        shared.open(mark=MarkFile(mark).read())
    with psycopg.connect(url) as db:
        db.execute("UPDATE log SET head_hash = decode(repeat('00', 32), 'hex')")
    damaged = run("accept-loss", "--through", "7", "--high-water", mark, journal=url, code=1)
    assert damaged.startswith(f"accept-loss: --journal: entry {backend.head.index} is damaged or missing: restore a copy")
    with psycopg.connect(url) as db:
        db.execute("UPDATE log SET head_hash = %b", (backend.head.entry_hash,))
    run("accept-loss", "--through", "7", "--high-water", mark, journal=url)
    backend = shared.open(mark=MarkFile(mark).read())
    assert sequences(backend.append_many([admission()], 1)[0].entries) == [8]
    backend.close()
    assert "are sound" in run("verify", journal=url)
