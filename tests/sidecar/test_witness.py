"""When heads go to a witness, and which keys of other logs are accepted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.signature import SignedTree, new_key, opened, signer_of
from ostinato.v1 import types_pb2
from serving.program import StartupError

from sidecar.config import Settings
from sidecar.journal.writer import Journal
from sidecar.observe import Metrics, Observer
from sidecar.witness import Publisher, Witness
from tests.sidecar.journal_kit import SqliteKit, admission, item
from tests.waiting import eventually

HOUR = 3600.0


@dataclass
class Log:
    """A journal that is signed, and what is counted of its witnesses."""

    folder: Path
    journal: Journal
    registry: CollectorRegistry
    observer: Observer

    @asynccontextmanager
    async def publishing(self, witness: str, **settings: Any) -> AsyncIterator[None]:
        given = Settings(signing_key=self.folder / "key", witness=witness, **settings)
        running = asyncio.create_task(Publisher(given, self.journal, self.observer).run())
        yield
        assert not running.done()
        running.cancel()

    async def admit(self, count: int) -> None:
        for _ in range(count):
            await self.journal.append(admission(item()))

    def heads(self) -> list[int]:
        """The indexes of the heads that the witness `heads`, a file, has."""
        file = self.folder / "heads"
        return [opened(json.loads(line)).last_index for line in file.read_text().splitlines()] if file.exists() else []

    def count(self, name: str) -> float:
        return self.registry.get_sample_value(f"ostinato_{name}_total") or 0.0


@pytest.fixture(name="log")
async def _log(tmp_path: Path) -> AsyncIterator[Log]:
    kit, registry = SqliteKit(tmp_path / "journal.db"), CollectorRegistry()
    kit.configure(signer=signer_of(new_key()))
    journal = Journal(kit.open(), now_millis=kit.clock.now_millis)
    yield Log(tmp_path, journal, registry, Observer(Metrics(registry), lambda kind, reason: None))
    await journal.close()


async def test_a_head_goes_out_after_so_many_entries(log: Log) -> None:
    """Fewer new entries than set wait; with the last of them the newest head goes out, and it alone."""
    async with log.publishing(str(log.folder / "heads"), witness_entries=4, witness_seconds=HOUR):
        await eventually(lambda: log.heads() == [1], "the first head is published at once")
        await log.admit(3)
        await asyncio.sleep(0.2)
        assert log.heads() == [1]
        await log.admit(1)
        await eventually(lambda: log.heads() == [1, 5], "the head of entry 5 is published")


async def test_a_head_goes_out_after_so_many_seconds(log: Log) -> None:
    """A single new entry waits no longer than set; without new entries nothing goes out."""
    async with log.publishing(str(log.folder / "heads"), witness_entries=1000, witness_seconds=0.1):
        await eventually(lambda: log.heads() == [1], "the first head is published at once")
        await asyncio.sleep(0.3)
        assert log.heads() == [1]
        await log.admit(1)
        await eventually(lambda: log.heads() == [1, 2], "the head of entry 2 is published")


async def test_a_witness_that_talks_nonsense_is_tried_again(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no answer of HTTP is a failure as any other: it is counted, and the next attempt follows."""
    monkeypatch.setattr("sidecar.witness.RETRY_SECONDS", 0.01)

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\xff\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1") as server, log.publishing(url(server)):
        await eventually(lambda: log.count("witness_failures") >= 2, "two attempts have failed")


def url(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def test_a_witness_that_drips_its_answer_holds_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt ends at its deadline, with its connection, while the witness goes on sending a header that never ends; none is
    left behind in a thread."""
    monkeypatch.setattr("sidecar.witness.PUBLISH_SECONDS", 0.2)
    monkeypatch.setattr("sidecar.witness.RETRY_SECONDS_MAX", 0.01)
    began, ended = [0], [0]

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began[0] += 1
        with contextlib.suppress(OSError, EOFError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not writer.is_closing():
                writer.write(b"y")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        ended[0] += 1

    threads = threading.active_count()
    async with await asyncio.start_server(drip, "127.0.0.1") as server:
        async with log.publishing(url(server)):
            await eventually(lambda: ended[0] >= 8, "eight attempts have ended")
            assert began[0] - ended[0] <= 2
            assert threading.active_count() <= threads + 1, "the journal's own"
        await eventually(lambda: ended == began, "the last attempt has ended")


async def test_overlapping_heads_are_a_fork(log: Log) -> None:
    """A head that shares an entry with the newest recorded one and is not that one is refused and counted, also with the same
    last entry; a head of later entries is recorded, an earlier one refused as older."""
    signer = signer_of(new_key())
    (log.folder / "logs").write_text(f"{'f' * 32} {signer.public_pem.splitlines()[1]}\n")
    witness = Witness(log.folder / "logs", log.journal, log.observer)

    def head(first: int, *hashes: bytes) -> types_pb2.SignedHead:
        tree = SignedTree()
        tree.sign("f" * 32, first, [each * 32 for each in hashes], signer)
        return tree.head

    recorded = head(5, b"a", b"b", b"c")
    assert await witness.record(recorded) == await witness.record(recorded)
    forks = [head(5, b"x", b"b", b"c"), head(6, b"b", b"c"), head(7, b"c", b"d"), head(1, *[b"a"] * 5), head(1, *[b"a"] * 9)]
    for fork in forks:
        with pytest.raises(errors.InvalidRequest, match=r"head\.root: .*two histories"):
            await witness.record(fork)
    with pytest.raises(errors.InvalidRequest, match=r"head\.last_index"):
        await witness.record(head(3, b"a", b"b"))
    assert log.count("witnessed_forks") == len(forks)
    assert (await witness.record(head(8, b"d"))).header.index == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense key", "line 2: begins with no log id"),
        ("f" * 32, "line 2: the key holds no public key"),
        ("f" * 32 + " MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE", "line 2: the key"),
    ],
)
async def test_bad_keys_of_logs_are_refused(log: Log, line: str, why: str) -> None:
    """A line of --witness-keys that is not a log's id and a public key stops the start, and is named."""
    (log.folder / "logs").write_text(f"# log key\n{line}\n")
    with pytest.raises(StartupError, match=f"--witness-keys: .*{why}"):
        Witness(log.folder / "logs", log.journal, log.observer)
