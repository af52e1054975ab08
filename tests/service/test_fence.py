"""Who is let in, as a sequence of comings and goings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import EpochStale, JournalBehind, StreamRefused, WriterBusy

from service.stream import Fence, Writer
from tests.service.support import hello_of

steps = st.lists(
    st.tuples(st.sampled_from(["log1", "log2"]), st.sampled_from(["a", "b"]), st.integers(1, 5)) | st.none(), max_size=30
)


@given(steps)
def test_fence(history: list[tuple[str, str, int] | None]) -> None:
    """A writer's epochs never fall on a log; while somebody is connected nobody else is admitted; refusals change nothing."""
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
    """A sidecar is refused if its log had a newer sequence run here, and the writer connected before stays."""
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
