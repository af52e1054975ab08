"""A journal's file that is damaged, cut, foreign or out of reach: one line names it, and no other content is told."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
from google.protobuf import json_format

from ostinato.chain import GENESIS
from ostinato.v1 import sequencer_pb2
from serving.program import StartupError

from sidecar import commands
from sidecar.config import Settings
from sidecar.journal.model import JournalUnusable, Note, Sealed, Unfinished
from sidecar.journal.transfer import export, take_in
from sidecar.opening import open_for_maintenance, open_journal
from tests.pair import python
from tests.sidecar.journal_disk import Disk
from tests.sidecar.journal_kit import SqliteKit, admission, audit, completed, ended, item

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ["verify"],
    ["export", "-"],
    ["prune", "--before", "1"],
    ["redact", "1"],
    ["import", os.devnull],
    ["accept-loss", "--through", "9"],
)
PAGE_BYTES = 4096
OTHER_USER = 65534


class Sound:
    """A journal as it was written, and what it says."""

    def __init__(self, folder: Path) -> None:
        store = SqliteKit(folder / "sound.db")
        with store.opened() as journal:
            answers = journal.append_many([admission(*map(item, range(1, 9)), key="k", tenant="t"), admission(item(9))], 1)
            entries = [entry for answer in answers for entry in answer.entries]
            journal.append_many([completed(entry) for entry in entries[:4]], 2)
            journal.append_many([ended(entries[4]), audit(entries[0]), Note("divergence/writer", b"{}" * 99)], 3)
        store.open().close()
        self.content = store.path.read_bytes()
        with store.maintained() as kept:
            self.entries = {entry.header.index: entry for entry in kept.entries(1, 1000, payloads=True)}
            self.lines = "\n".join(export(kept)) + "\n"

    def holds(self, entry: Sealed) -> bool:
        """Whether it was written so, or is what dropping its payload would leave."""
        written = self.entries[entry.header.index]
        return (entry.header, entry.previous_hash, entry.entry_hash) == (
            written.header,
            written.previous_hash,
            written.entry_hash,
        ) and entry.payload in (b"", written.payload)


@pytest.fixture(name="sound", scope="module")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


class Tried:
    """One file after the other, opened in every way; each way is told in one line that names the file, or works."""

    def __init__(self, folder: Path, sound: Sound, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self._sound, self._capsys = folder / "journal.db", sound, capsys
        self.exported = ""
        """By the last check; empty: it was refused."""

    def put(self, content: bytes, **beside: bytes) -> None:
        """In place of what is there; `beside`: the files with these endings."""
        for file in self.path.parent.glob(f"{self.path.name}*"):
            file.unlink()
        self.path.write_bytes(content)
        for ending, each in beside.items():
            self.path.with_name(f"{self.path.name}-{ending}").write_bytes(each)

    def command(self, *argv: object) -> tuple[int, str]:
        """Its exit code and what it says, which is one line."""
        with pytest.raises(SystemExit) as ended:
            commands.main([*map(str, argv), "--journal", str(self.path)])
        code, said = int(ended.value.code or 0), self._capsys.readouterr().err
        assert said.count("\n") <= 1 and said.removesuffix("\n").isprintable(), said
        if code:
            assert str(self.path) in said, said
        return code, said

    def start(self) -> list[Unfinished] | str:
        """What is left to do, or why it does not start."""
        settings = Settings(journal=str(self.path), writer="writer", journal_reserve_bytes=0)
        try:
            backend = open_journal(settings, 4)
        except StartupError as error:
            said = str(error)
        else:
            backend.close()
            return list(backend.to_recover)
        assert said.isprintable() and str(self.path) in said, said
        return said

    def everywhere(self) -> list[str]:
        """What every command and a start say."""
        return [self.command(*argv)[1] for argv in COMMANDS] + [str(self.start())]

    def check(self, content: bytes, **beside: bytes) -> tuple[str, str]:
        """What verify and a start say. Neither they nor an export, which is `exported`, may take anything else than what was
        written for sound. An export that finds damage leaves no file."""
        self.put(content, **beside)
        lines = self.path.with_name("lines.jsonl")
        code, _ = self.command("export", lines)
        assert lines.exists() == (not code)
        self.exported = "" if code else lines.read_text()
        lines.unlink(missing_ok=True)
        assert all(self._sound.holds(entry) for entry in entries_of(self.exported))
        self.put(content, **beside)
        code, verified = self.command("verify")
        if not code:
            with closing(open_for_maintenance(str(self.path))) as kept:
                assert all(self._sound.holds(entry) for entry in kept.entries(1, 1000, payloads=True))
        self.put(content, **beside)
        if isinstance(started := self.start(), str):
            return verified, started
        assert all(self._sound.holds(each.admitted) and each.admitted.payload for each in started)
        return verified, ""


def entries_of(exported: str) -> Iterator[Sealed]:
    previous = GENESIS
    for line in exported.splitlines():
        if line.startswith('{"entry"'):
            entry = json_format.ParseDict(json.loads(line)["entry"], sequencer_pb2.Entry())
            yield Sealed(entry.header, previous, entry.entry_hash, entry.payload)
            previous = entry.entry_hash


@pytest.fixture(name="tried")
def _tried(sound: Sound, capsys: pytest.CaptureFixture[str]) -> Iterator[Tried]:
    """In memory, where there is such a folder: hundreds of journals are opened, and each is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Tried(Path(folder), sound, capsys)


# Bytes.


def test_any_header_byte(tried: Tried, sound: Sound) -> None:
    """Whatever a byte of the file's header becomes, each program works as before or says in one line what is wrong."""
    rng = random.Random(1)
    for offset in range(100):
        content = bytearray(sound.content)
        content[offset] ^= rng.randrange(1, 256)
        verified, started = tried.check(bytes(content))
        if offset < 16:
            assert "bytes are not quite those of a SQLite file" in verified and "bytes are not quite" in started
        if offset in (18, 19, 21, 22, 23):
            assert "is damaged" in verified and "is damaged" in started, (offset, verified, started)


def test_any_byte(tried: Tried, sound: Sound) -> None:
    """Whatever a byte anywhere in the file becomes, it is found and said in one line, or no entry says anything else. Of a
    journal that verifies, everything is exported as it was written."""
    rng, found, exported = random.Random(2), 0, 0
    for _ in range(100):
        content = bytearray(sound.content)
        content[rng.randrange(100, len(content))] ^= rng.randrange(1, 256)
        verified, _ = tried.check(bytes(content))
        found += "is damaged" in verified
        exported += bool(tried.exported)
        assert tried.exported == sound.lines or "is damaged" in verified
    assert found > 10 and exported > 10


def test_what_is_quoted_is_printable(tried: Tried, sound: Sound) -> None:
    """What a line quotes of a damaged file holds nothing that a terminal would obey."""
    content = sound.content.replace(b"CREATE TABLE items (", b"CREATE TABLE items \x1b")
    for said in tried.check(content):
        assert "is damaged: malformed database schema (items) - unrecognized token: " in said, said


def test_cut_anywhere(tried: Tried, sound: Sound) -> None:
    """A file that is cut, between two pages or inside one, is said to be cut, also where only unused bytes are gone, or where
    bytes that are no page follow the last one."""
    size = len(sound.content)
    rng = random.Random(3)
    lengths = {1, 9, 15, 16, 99, 100, 101, 511, 512, PAGE_BYTES, size - PAGE_BYTES, size - 1, *rng.sample(range(size), 12)}
    for length in sorted(lengths | {size + 1}):
        for said in tried.check((sound.content + b"x")[:length]):
            assert "is damaged" in said and "it is cut" in said, (length, said)


def test_an_empty_file_is_no_journal(tried: Tried) -> None:
    """Nothing is verified or exported from a file without a byte, and it stays as it is."""
    for argv in (["verify"], ["export", "-"], ["prune", "--before", "1"], ["redact", "1"]):
        tried.put(b"")
        code, said = tried.command(*argv)
        assert (code, "is empty: there is no journal in it" in said) == (1, True), said
        assert tried.path.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"hello\n", "is not a journal, nor any other SQLite file: it begins with b'hello"),
        (b"\x7fELF" + bytes(5000), "is not a journal, nor any other SQLite file: it begins with b'\\x7fELF"),
        (b'{"format": "ostinato journal", "version": 1}\n', "is not a journal, nor any other SQLite file"),
        (bytes(PAGE_BYTES), "is not a journal, nor any other SQLite file"),
    ],
)
def test_another_file(tried: Tried, content: bytes, why: str) -> None:
    """A text, a program and an exported journal are told apart from a journal by their first bytes, and stay as they are."""
    tried.put(content)
    for said in tried.everywhere():
        assert why in said, said
    assert tried.path.read_bytes() == content


def test_a_folder_in_its_place(tried: Tried) -> None:
    """A folder is said to be one, by a start and by every command."""
    tried.path.mkdir()
    for said in tried.everywhere():
        assert "is a folder: name the journal's file" in said


def test_a_row_of_other_types(tried: Tried, sound: Sound) -> None:
    """Rows that no journal writes (text for a blob, none at all, a short hash) end no program in a traceback."""
    for statement, why in (
        ("UPDATE entries SET header = 'text' WHERE entry_index = 2", "table entries: a row holds values of other types"),
        ("UPDATE entries SET entry_hash = x'00' WHERE entry_index = 2", "its hash, or the one before, has not 32 bytes"),
        ("UPDATE entries SET entry_index = 99 WHERE entry_index = 2", "entry 99: its header says 2"),
        ("UPDATE journal SET log_id = CAST(x'ff' AS TEXT)", "table journal: a row holds text that is not UTF-8"),
        ("UPDATE journal SET log_id = 'other'", "table journal names log 'other', and entry"),
        ("UPDATE journal SET epoch = 'x'", "table journal: a row holds values of other types"),
        ("UPDATE items SET admitted = 1 WHERE outcome IS NULL", "entry 1 is damaged, and its item has not ended"),
        ("DELETE FROM journal", ""),
        ("DROP TABLE notes", "no such table: "),
    ):
        tried.put(sound.content)
        kit = SqliteKit(tried.path)
        kit.execute("PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = replace(sql, 'STRICT', '')")
        kit.execute(statement)
        said = tried.check(tried.path.read_bytes())
        assert any(why in each for each in said), (statement, said)


def test_a_refused_start_adds_nothing(tried: Tried, sound: Sound) -> None:
    """However often a start or an accept-loss is refused, over the newest entries or over an item that would run again, the
    journal stays."""
    last = max(sound.entries)
    other = f"(SELECT header FROM entries WHERE entry_index = {last - 1})"
    for statement, why in (
        (f"UPDATE entries SET entry_hash = zeroblob(32) WHERE entry_index = {last}", f"entry {last} is damaged or missing"),
        (f"UPDATE entries SET entry_hash = zeroblob(32) WHERE entry_index = {last - 1}", f"entry {last - 1} is damaged"),
        (f"UPDATE entries SET header = {other} WHERE entry_index = {last}", f"entry {last}: its header says {last - 1}"),
        ("UPDATE payloads SET payload = x'00' WHERE entry_index = 10", "entry 10 is damaged, and its item has not ended"),
    ):
        tried.put(sound.content)
        kit = SqliteKit(tried.path)
        kit.execute(statement)
        for _ in range(3):
            for said in (str(tried.start()), tried.command("accept-loss", "--through", "99")[1]):
                assert why in said and "restore a copy that verifies" in said
        assert kit.execute("SELECT max(entry_index) FROM entries") == [(last,)]


# What lies beside it.


def test_a_write_ahead_log_cut_anywhere(tried: Tried, tmp_path: Path, sound: Sound) -> None:
    """A write-ahead log that is cut or damaged gives a journal that lost its end, or is told: no entry says anything else.
    Another journal's ends no program in a traceback."""
    with SqliteKit(tmp_path / "other.db").opened() as journal:
        journal.append_many([admission(*map(item, range(30)))], 5)
        other = Path(f"{tmp_path}/other.db-wal").read_bytes()
    store = SqliteKit(tmp_path / "with-log.db")
    store.path.write_bytes(sound.content)
    with store.opened() as journal:
        journal.append_many([admission(item(10))], 5)
        log = Path(f"{store.path}-wal").read_bytes()
        content = store.path.read_bytes()
        entries = {entry.header.index: entry for entry in journal.entries(1, 1000, payloads=True)}
    before, sound.entries = sound.entries, entries
    try:
        rng = random.Random(4)
        for length in (0, 1, 31, 32, 33, 56, len(log) - 1, len(log), *rng.sample(range(len(log)), 8)):
            tried.check(content, wal=log[:length])
        for _ in range(20):
            damaged = bytearray(log)
            damaged[rng.randrange(len(log))] ^= rng.randrange(1, 256)
            tried.check(content, wal=bytes(damaged))
        tried.check(content)
        tried.check(content[: len(content) - 100], wal=log)
        tried.check(content, wal=b"no log at all" * 999)
        for use in (lambda: tried.command("verify"), tried.start):
            tried.put(content, wal=other)
            use()
        tried.check(content, shm=b"no index at all" * 999)
    finally:
        sound.entries = before


def test_a_folder_beside_it(tried: Tried, sound: Sound) -> None:
    """A folder where the write-ahead log belongs is named."""
    tried.put(sound.content)
    Path(f"{tried.path}-wal").mkdir()
    assert f"{tried.path}-wal is a folder" in tried.command("verify")[1]
    assert f"{tried.path}-wal is a folder" in str(tried.start())


# Out of reach.


@contextmanager
def another_user() -> Iterator[None]:
    """As a user whom file modes bind, which root is not."""
    if os.geteuid():
        yield
        return
    os.seteuid(OTHER_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(name="reached")
def _reached(sound: Sound, capsys: pytest.CaptureFixture[str]) -> Iterator[Tried]:
    """In a folder that another user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    tried = Tried(folder / "data", sound, capsys)
    tried.path.parent.mkdir()
    tried.put(sound.content)
    if not os.geteuid():
        for path in (tried.path.parent, tried.path):
            os.chown(path, OTHER_USER, OTHER_USER)
    yield tried
    (folder / "data").chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "why"),
    [
        (0o444, 0o755, r"{path} cannot be written by .*uid {uid}\)?: its mode is 0444"),
        (0, 0o755, r"{path} cannot be read by .*: its mode is 0000"),
        (0o600, 0o555, r"{path}: its folder .*/data cannot be written by .*: its mode is 0555"),
        (0o600, 0, r"(?!.*does not exist).*cannot be read by.*Permission denied"),
    ],
)
def test_what_this_user_may_not_use(reached: Tried, file_mode: int, folder_mode: int, why: str) -> None:
    """A file or a folder that cannot be read or written is named, with its mode and the user, by a start and by every command.
    A file that cannot be seen is not called missing."""
    reached.path.chmod(file_mode)
    reached.path.parent.chmod(folder_mode)
    pattern = why.format(path=reached.path, uid=os.geteuid() or OTHER_USER)
    with another_user():
        said = reached.everywhere()
    for line in said:
        assert re.search(pattern, line), line


def test_a_folder_that_cannot_be_created(reached: Tried) -> None:
    """Where the journal's folder is missing and cannot be created the start says which, and the commands that it is missing."""
    reached.path.parent.chmod(0o555)
    folder = reached.path.parent / "new"
    reached.path = folder / "journal.db"
    with another_user():
        assert f"the folder {folder} cannot be created by" in str(_start_line(reached.path))
        assert "does not exist, nor does its folder" in reached.command("verify")[1]


def _start_line(path: Path, **settings: Any) -> str:
    with pytest.raises(StartupError) as refused:
        open_journal(Settings(journal=str(path), journal_reserve_bytes=0, **settings), 4)
    return str(refused.value)


def test_a_read_only_file_system(tried: Tried, sound: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is mounted read-only is called that."""
    tried.put(sound.content)
    monkeypatch.setattr("os.access", lambda path, mode, **_: not mode & os.W_OK)
    real = os.statvfs(tried.path)
    monkeypatch.setattr("os.statvfs", lambda path: os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, *real[9:])))
    for said in (tried.command("verify")[1], str(tried.start())):
        assert "cannot be written: its file system is read-only" in said, said


def test_a_full_disk(tmp_path: Path) -> None:
    """A start that finds no room says where, and how much is free."""
    disk = Disk()
    disk.bytes_max = 2 * PAGE_BYTES
    with pytest.raises(
        JournalUnusable, match=rf"journal.db: its disk is full, \d+ bytes are free in {tmp_path}: make room there"
    ):
        SqliteKit(tmp_path / "journal.db", vfs=disk.name).open()


def test_its_own_bound(tmp_path: Path) -> None:
    """A start that finds no room under --journal-bytes-max says that, not that the disk is full."""
    store = SqliteKit(tmp_path / "journal.db")
    with store.opened() as journal:
        journal.append_many([admission(item(*range(20_000)))], 1)
    store.configure(journal_bytes_max=store.path.stat().st_size)
    said = ""
    for _ in range(200):  # each start adds an entry
        try:
            store.open().close()
        except JournalUnusable as error:
            said = str(error)
            break
    assert "journal.db: no room is left of --journal-bytes-max" in said


def test_a_disk_that_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is called one, with SQLite's code, and not damage."""
    disk = Disk()
    store = SqliteKit(tmp_path / "journal.db", vfs=disk.name)
    store.open().close()

    def fail(_self: object, _amount: int, _offset: int) -> bytes:
        error = apsw.IOError("disk I/O error")
        error.result, error.extendedresult = 10, 266  # type: ignore[attr-defined]  # as SQLite sets them
        raise error

    monkeypatch.setattr("tests.sidecar.journal_disk._File.xRead", fail)
    with pytest.raises(
        JournalUnusable, match=r"journal.db cannot be read or written: .*\(SQLite's code 266\): look at its disk"
    ):
        store.open()


def test_a_journal_in_use(tried: Tried, sound: Sound) -> None:
    """A file that is locked is said to be in use, by a start and by every command."""
    tried.put(sound.content)
    with SqliteKit(tried.path).opened():
        for said in tried.everywhere():
            assert f"{tried.path} is in use by another sidecar or command: stop that first" in said, said


# Real processes.


def test_real_processes(tried: Tried, sound: Sound) -> None:
    """A cut journal ends the sidecar and `verify`, as programs, with exit code 1 and one line on the standard error."""
    tried.put(sound.content[:-100])
    for argv in (["verify", "--journal"], ["--writer", "writer", "--log-level", "error", "--metrics", "", "--journal"]):
        ended = python("-m", "sidecar", *argv, str(tried.path))
        assert ended.returncode == 1, ended
        assert re.fullmatch(rf".*{tried.path} is damaged: it is cut: .* docs/operations.md.*\n", ended.stderr), ended.stderr


# The mark.


def test_a_mark_out_of_reach(reached: Tried) -> None:
    """A folder in the mark's place, and a mark of mode 0000, end the start and `accept-loss`, and are named."""
    mark = Path(f"{reached.path}.mark")
    mark.mkdir()
    for said in (str(reached.start()), reached.command("accept-loss", "--through", "9")[1]):
        assert f"{mark}: the high-water mark cannot be read by" in said and "Is a directory" in said, said
    mark.rmdir()
    mark.write_text("{}")
    mark.chmod(0)
    with another_user():
        for said in (str(reached.start()), reached.command("accept-loss", "--through", "9")[1]):
            assert f"{mark}: the high-water mark cannot be read by" in said and "Permission denied" in said, said
            assert "remove" not in said and "is no high-water mark" not in said


def test_a_mark_without_its_folder(tried: Tried, tmp_path: Path, sound: Sound) -> None:
    """A mark whose folder is missing, as where its volume is not mounted, is not taken for one that was never written."""
    tried.put(sound.content)
    said = _start_line(tried.path, writer="writer", high_water=tmp_path / "volume" / "mark")
    assert f"{tmp_path}/volume/mark: the folder of the high-water mark does not exist" in said


# Lines that are taken in.


@pytest.mark.parametrize(
    ("field", "value"),
    [("index", "Infinity"), ("last_sequence", str(2**64)), ("keys", "-1"), ("index", "9" * 5000), ("writers", {"w": 2**70})],
)
def test_numbers_that_no_database_holds(tmp_path: Path, sound: Sound, field: str, value: object) -> None:
    """A first line with such a number is refused, and named."""
    first, *rest = sound.lines.splitlines()
    line = json.dumps({**json.loads(first), field: value})
    with (
        SqliteKit(tmp_path / "journal.db").maintained("make") as kept,
        pytest.raises(JournalUnusable, match="line 1: "),
    ):
        take_in(kept, [line, *rest], "lines", None, lambda index, of: None)


# What no entry says.


@pytest.mark.parametrize("table", ["keys", "twins", "items", "notes"])
def test_the_root_of_a_table(tried: Tried, sound: Sound, table: str) -> None:
    """A table whose first page is damaged is found by verify and by a start, also where every entry is sound."""
    tried.put(sound.content)
    [(root,)] = SqliteKit(tried.path).execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", table)
    content = bytearray(sound.content)
    content[(root - 1) * PAGE_BYTES] ^= 0xFF
    tried.put(bytes(content))

    assert tried.command("verify")[0] == 1
    assert isinstance(tried.start(), str)


@pytest.mark.parametrize("command", ["verify", "export"])
def test_a_prompt_that_is_gone(tried: Tried, sound: Sound, command: str) -> None:
    """An item that has not ended and has no payload is a fault to verify, and nothing is exported."""
    tried.put(sound.content)
    missing = next(index for index, entry in sound.entries.items() if entry.header.sequence == 9)
    SqliteKit(tried.path).execute("DELETE FROM payloads WHERE entry_index = ?", missing)
    file = tried.path.with_name("lines.jsonl")
    code, said = tried.command(command, *([file] if command == "export" else []))

    assert (code, f"entry {missing}, ADMITTED: its payload is missing" in said) == (1, True)
    assert not file.exists()
