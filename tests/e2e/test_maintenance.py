"""Journals put back from an old copy, and journals without payloads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from ostinato import errors
from ostinato.v1 import types_pb2

from tests.e2e.kit import Door, ended, opened
from tests.pair import Pair, python


@pytest.fixture(name="state", scope="module")
def _state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So that only the first service tests itself."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(name="pair")
def _pair(request: pytest.FixtureRequest, state: Path) -> Iterator[Pair]:
    with Pair(sidecar=getattr(request, "param", ()), state=state) as pair:
        yield pair.start()


def journal(pair: Pair) -> Path:
    return pair.folder / "journal.sqlite"


def command(pair: Pair, *argv: str) -> str:
    """What a command says about the pair's journal; it must succeed."""
    done = python("-m", "sidecar", *argv, "--journal", str(journal(pair)))
    assert done.returncode == 0, done.stderr
    return done.stderr


async def test_an_old_copy_is_found(pair: Pair) -> None:
    """A sidecar whose journal is behind its mark does not start; one without a mark is ended by the service, also by a new one;
    and where its operator has accepted the loss, it goes on behind what was lost."""
    async with opened(pair) as door:
        await door.client.generate("before")
    pair.sidecar.stop()
    copy = shutil.copyfile(journal(pair), pair.folder / "copy")
    pair.start_sidecar().wait_for("engine connected")
    async with opened(pair) as door:
        lost = await door.client.generate(["after", "after"])
    assert [result.sequence for result in lost.results] == [2, 3]
    pair.stop()
    shutil.copyfile(copy, journal(pair))

    with pytest.raises(AssertionError, match="accept-loss --through 3"):
        pair.start_sidecar()
    assert ended(pair.programs[-1])[0] == 1
    (pair.folder / "journal.sqlite.mark").unlink()
    pair.start_service()
    pair.start_sidecar()
    code, log = ended(pair.programs[-1])
    assert (code, "sequence 3 of log" in log, "accept-loss --through 3" in log) == (1, True, True)

    assert "2 sequences are lost" in command(pair, "accept-loss", "--through", "3")
    pair.start_sidecar().wait_for("engine connected")
    async with opened(pair) as door:
        assert (await door.client.generate("again")).stamp.first_sequence == 4
        with pytest.raises(errors.NotFound, match="sequence 3 is lost"):
            await door.client.get(3)
        with pytest.raises(errors.NotFound, match="no sequence 5"):
            await door.client.get(5)
        kinds = [entry.header.kind async for entry in door.client.tail()]
    assert kinds.count(types_pb2.ENTRY_KIND_LOST) == 1
    pair.stop()
    assert "are sound" in command(pair, "verify")


async def replayed(door: Door, first: int, last: int) -> list[types_pb2.Comparison]:
    return [response.comparison async for response in door.client.replay(first, last)]


@pytest.mark.parametrize("pair", [["--payloads", "digests"]], indirect=True)
async def test_digests_only(pair: Pair) -> None:
    """Without payloads a key's answer comes back until it is dropped, twins are compared, and nothing is run again."""
    async with opened(pair) as door:
        keyed = await door.client.generate("a", seed=1, key="k")
        plain = await door.client.generate("a", seed=1)
        assert plain.results[0].output == keyed.results[0].output
        await door.client.generate("b", seed=1)
        await door.client.generate("b", seed=1)
        twins = re.compile(r'ostinato_comparisons_total\{.*kind="twin".*verdict="match"')
        found = sum(value for name, value in pair.metrics().items() if twins.match(name))
        assert found == 2, "one by its output, one by its digest"
        (record,) = await door.client.get(plain.stamp.first_sequence)
        assert not (record.HasField("input") or record.HasField("result"))
        (verdict,) = await replayed(door, plain.stamp.first_sequence, plain.stamp.first_sequence)
        assert errors.from_status(verdict.status).reason == "PAYLOAD_PRUNED"

    pair.sidecar.kill()
    pair.start_sidecar().wait_for("engine connected")
    async with opened(pair) as door:
        assert await door.client.generate("a", seed=1, key="k") == keyed
        last = await door.last_sequence()
    pair.sidecar.stop()
    assert "2 payloads" in command(pair, "redact", str(keyed.stamp.first_sequence))
    pair.start_sidecar().wait_for("engine connected")
    async with opened(pair) as door:
        for _ in range(2):
            with pytest.raises(errors.PayloadPruned):
                await door.client.generate("a", seed=1, key="k")
        assert await door.last_sequence() == last


async def test_a_changed_answer_is_not_served(pair: Pair) -> None:
    """Text that was changed in the file is served neither to a retry by key nor by Get: both get RECORD_DAMAGED, and the
    sidecar logs it and serves on."""
    async with opened(pair) as door:
        (answer,) = (await door.client.generate("text", key="k")).results
    pair.sidecar.stop()
    with closing(apsw.Connection(str(journal(pair)))) as db:
        index = answer.receipt.header.index
        ((payload,),) = db.execute("SELECT payload FROM payloads WHERE entry_index = ?", (index,))
        text = answer.output.text.encode()
        assert text in payload
        db.execute("UPDATE payloads SET payload = ? WHERE entry_index = ?", (payload.replace(text, text[::-1].upper()), index))
    sidecar = pair.start_sidecar()
    sidecar.wait_for("engine connected")
    async with opened(pair) as door:
        with pytest.raises(errors.RecordDamaged):
            await door.client.generate("text", key="k")
        with pytest.raises(errors.RecordDamaged):
            await door.client.get(1)
        assert (await door.client.generate("other")).results[0].sequence == 2
    sidecar.wait_for("a record is damaged: look at the journal with verify")
