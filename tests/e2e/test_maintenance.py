"""Journals put back from an old copy, and journals without payloads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostinato import errors
from ostinato.v1 import types_pb2

from tests.e2e.kit import Door, opened
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
