"""What a service remembers of the logs that it has run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ostinato import errors
from serving.program import StartupError

from service.stream import LOGS_MAX, SequenceFile
from tests.service.support import served, submit_of


def test_there_and_back(tmp_path: Path) -> None:
    """What is read is what was written, the largest number included; of very many logs the last ones."""
    memory = SequenceFile(tmp_path / "state" / "sequences.json")
    assert memory.read() == {}
    written = {f"log{number}": 2**64 - 1 - number for number in range(LOGS_MAX + 2)}
    memory.write(written)
    memory.close()
    assert memory.read() == dict(list(written.items())[2:])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"log": "x"}', '{"log": null}'])
def test_what_is_no_memory(tmp_path: Path, text: str) -> None:
    """A file that is something else is not taken for an empty one."""
    path = tmp_path / "sequences.json"
    path.write_text(text)
    with pytest.raises(StartupError, match="^--state-dir: .*sequences.json is not a list of sequences"):
        SequenceFile(path).read()


def test_a_memory_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that cannot be read is neither called another file nor to be removed: it may say that a journal lost its end."""
    path = tmp_path / "sequences.json"
    path.mkdir()
    with pytest.raises(StartupError, match="sequences.json cannot be read: Is a directory") as refused:
        SequenceFile(path).read()
    assert "remove" not in str(refused.value)


async def test_over_a_restart(tmp_path: Path) -> None:
    """A new service refuses a sidecar that knows less than what the one before has run, and takes one that knows as much."""
    async with served(state_dir=tmp_path) as service, service.stream(last_sequence=6) as stream:
        await stream.send(submit_of(1, sequence=7))
        await stream.output(1)
    async with served(state_dir=tmp_path) as service:
        async with service.stream(last_sequence=6) as behind:
            error = await behind.broken()
        assert isinstance(error, errors.JournalBehind)
        assert error.details == {"last_sequence": "6", "newest": "7"}
        async with service.stream(last_sequence=7) as stream:
            await stream.read()


async def test_while_it_runs(tmp_path: Path) -> None:
    """What was run is written soon, not only when the sidecar leaves."""
    memory = SequenceFile(tmp_path / "sequences.json")
    async with served(state_dir=tmp_path) as service, service.stream() as stream:
        await stream.send(submit_of(1, sequence=7))
        async with asyncio.timeout(30):
            while list(memory.read().values()) != [7]:
                await asyncio.sleep(0.01)
