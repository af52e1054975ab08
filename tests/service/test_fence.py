"""Which sidecar may drive the engine, and what of that is kept over restarts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.chain import SEQUENCE_MAX
from ostinato.errors import EpochStale, JournalBehind, OutOfOrder, ProtocolViolation, StreamRefused, WriterBusy
from serving.program import StartupError

from service.fence import EPOCH_JUMP_MAX, EPOCH_MAX, LOGS_MAX, SEQUENCE_JUMP_MAX, Fence, SequenceFile, Writer
from tests.service.support import hello_of, served, submit_of

steps = st.lists(
    st.tuples(st.sampled_from(["log1", "log2"]), st.sampled_from(["a", "b"]), st.integers(1, 5)) | st.none(), max_size=30
)


@given(steps)
def test_fence(history: list[tuple[str, str, int] | None]) -> None:
    """A writer's epochs never fall on a log; while one writer is connected no other is admitted; refusals change nothing."""
    fence = Fence()
    highest: dict[Writer, int] = {}
    connected: Writer | None = None
    for step in history:
        if step is None:
            fence.leave()
            connected = None
            continue
        log, name, epoch = step
        writer, before = Writer(log, name), (fence.connected, dict(fence._highest))
        wanted: type[StreamRefused] | None = None
        if epoch < highest.get(writer, 0):
            wanted = EpochStale
        elif connected not in (None, writer):
            wanted = WriterBusy

        if wanted is None:
            fence.admit(hello_of(log, name, epoch))
            highest[writer], connected = epoch, writer
        else:
            with pytest.raises(wanted):
                fence.admit(hello_of(log, name, epoch))
            assert before == (fence.connected, fence._highest)
        assert (fence.connected, fence._highest) == (connected, highest)


@given(st.lists(st.tuples(st.sampled_from(["log1", "log2"]), st.integers(1, 9)), max_size=20), st.integers(0, 10))
def test_a_journal_behind(ran: list[tuple[str, int]], last_sequence: int) -> None:
    """A sidecar whose journal ends before a sequence that was run here is refused, and the fence stays as it was."""
    fence = Fence()
    for log, sequence in ran:
        fence.ran(log, sequence)
    newest = max((sequence for log, sequence in ran if log == "log1"), default=0)
    if last_sequence < newest:
        with pytest.raises(JournalBehind, match=f"sequence {newest} of log log1"):
            fence.admit(hello_of("log1", last_sequence=last_sequence))
        assert fence.connected is None
    else:
        fence.admit(hello_of("log1", last_sequence=last_sequence))
    assert list(fence.sequences)[-1:] == [log for log, _ in ran[-1:]], "the log that was run last is the last"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """What is read is what was written, SEQUENCE_MAX included; of more than LOGS_MAX logs the last ones."""
    file = SequenceFile(tmp_path / "state" / "sequences.json")
    assert file.read() == {}
    written = {f"log{number}": SEQUENCE_MAX - number for number in range(LOGS_MAX + 2)}
    file.write(written)
    file.close()
    assert file.read() == dict(list(written.items())[2:])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"log": "x"}', '{"log": null}'])
def test_a_file_with_another_content(tmp_path: Path, text: str) -> None:
    """A file with another content is an error, not an empty file."""
    path = tmp_path / "sequences.json"
    path.write_text(text)
    with pytest.raises(StartupError, match="^--state-dir: .*sequences.json is not a list of sequences"):
        SequenceFile(path).read()


def test_a_file_with_a_sequence_that_no_log_reaches(tmp_path: Path) -> None:
    """A sequence beyond every log is not believed: the error names the log, and what to do about it."""
    (tmp_path / "sequences.json").write_text(json.dumps({"fine": "7", "log1": str(2**62)}))
    with pytest.raises(StartupError, match=f"log log1 cannot have reached sequence {2**62}: remove this log from the file"):
        SequenceFile(tmp_path / "sequences.json").read()


@given(st.integers(1, 2**64 - 1), st.integers(1, 2**64 - 1))
def test_epochs_beyond_every_sidecar(first: int, second: int) -> None:
    """An epoch beyond EPOCH_MAX, or further than EPOCH_JUMP_MAX above the highest of its writer, is refused and not remembered:
    the sidecar with the next epoch is still admitted."""
    fence, admitted = Fence(), 0
    for epoch in (first, second):
        fits = epoch <= EPOCH_MAX and (not admitted or epoch <= admitted + EPOCH_JUMP_MAX)
        if epoch >= admitted and not fits:
            with pytest.raises(ProtocolViolation, match=f"epoch {epoch} of writer a of log log1 is too far above {admitted}"):
                fence.admit(hello_of("log1", "a", epoch))
        elif epoch >= admitted:
            fence.admit(hello_of("log1", "a", epoch))
            admitted = epoch
        fence.leave()

    fence.admit(hello_of("log1", "a", min(admitted + 1, EPOCH_MAX)))


async def test_a_sequence_beyond_every_log() -> None:
    """A stream that submits a sequence far above what its journal has ends, and the service does not remember the sequence; nor
    does it admit a journal that claims more than any log has."""
    async with served() as service:
        for sequence in (2**62, 2**63, SEQUENCE_JUMP_MAX + 8, 2**64 - 1):
            async with service.stream(last_sequence=7) as stream:
                await stream.send(submit_of(1, sequence=sequence))
                with pytest.raises(OutOfOrder, match=f"sequence {sequence} is too far above 7"):
                    raise await stream.broken()
        async with service.stream(last_sequence=SEQUENCE_MAX + 1) as stream:
            assert "no log has reached" in str(await stream.broken())
        async with service.stream(last_sequence=7) as stream:
            await stream.send(submit_of(1, sequence=SEQUENCE_JUMP_MAX + 7), submit_of(2, sequence=SEQUENCE_JUMP_MAX + 8))
            await stream.output(2)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The error about an unreadable file does not say that it may be removed: it may show that a journal lost its end."""
    path = tmp_path / "sequences.json"
    path.mkdir()
    with pytest.raises(StartupError, match="sequences.json cannot be read: Is a directory") as refused:
        SequenceFile(path).read()
    assert "remove" not in str(refused.value)


async def test_a_restarted_service_knows_the_sequences(tmp_path: Path) -> None:
    """A restarted service refuses a sidecar whose journal ends before what was run, and takes one whose journal has it."""
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


async def test_sequences_are_written_while_runs_go_on(tmp_path: Path) -> None:
    """The newest sequence is written while the sidecar is connected, not only at the end of its stream."""
    file = SequenceFile(tmp_path / "sequences.json")
    async with served(state_dir=tmp_path) as service, service.stream() as stream:
        await stream.send(submit_of(1, sequence=7))
        async with asyncio.timeout(30):
            while list(file.read().values()) != [7]:
                await asyncio.sleep(0.01)
