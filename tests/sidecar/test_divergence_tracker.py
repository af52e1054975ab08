"""The tracker and its checkpoint: no comparison is lost or counted twice, whenever the process dies."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence import tracker
from sidecar.divergence.tracker import VERSION, Checkpoint, Counts, DivergenceTracker, events
from sidecar.journal.model import Admission, Audit, Note, Outcome, Sealed
from sidecar.journal.writer import Journal
from tests.sidecar.journal_kit import SqliteKit, admission, completed, item, prompt

WRITER = "writer"
COMPLETE, AUDIT, SAVE, CRASH = "complete", "audit", "save", "crash"

lives = st.lists(
    st.one_of(
        st.tuples(st.just(COMPLETE), st.integers(0, 2)),
        st.tuples(st.just(COMPLETE), st.integers(0, 2)),
        st.tuples(st.just(AUDIT), st.integers(0, 2)),
        st.tuples(st.just(SAVE), st.just(0)),
        st.tuples(st.just(CRASH), st.just(0)),
    ),
    max_size=14,
)


class Life:
    """A sidecar's journal and tracker, from one kill -9 to the next."""

    def __init__(self, store: SqliteKit) -> None:
        self.store = store

    async def begin(self) -> None:
        self.tracker = DivergenceTracker(WRITER)
        backend = self.store.open()
        self.journal = Journal(backend, now_millis=self.store.clock.now_millis, on_entries=self.tracker.committed)
        await self.tracker.restore(self.journal)

    async def crash(self) -> None:
        """Nothing is saved, and the tracker's memory is lost. Committed entries are on the disk."""
        await self.journal.close()
        await self.begin()

    async def complete(self, token: int) -> Sealed:
        (admitted,) = (await self.journal.append(admission(item(1, seed=9)))).entries
        return (await self.journal.append(outcome(admitted, token))).entries[0]

    async def audit(self, token: int) -> None:
        (admitted,) = (await self.journal.append(admission(item(token)))).entries
        verdict = types_pb2.VERDICT_DIVERGED if token else types_pb2.VERDICT_MATCH
        comparison = types_pb2.Comparison(
            sequence=admitted.header.sequence, kind=types_pb2.COMPARISON_KIND_AUDIT, verdict=verdict
        )
        await self.journal.append(Audit(admitted.header, comparison, prompt(admitted).nonce, b"f" * 32, types_pb2.GRADE_EXACT))

    async def everything(self) -> Counts:
        """The fold over the whole journal."""
        counts = Counts()
        for entry in await self.journal.entries(1, 10_000, payloads=True):
            for event in events(entry):
                counts = counts.after(event)
        return counts


def outcome(admitted: Sealed, token: int) -> Outcome:
    draft = completed(admitted, 7, token)
    assert isinstance(draft.payload, sequencer_pb2.CompletedPayload)
    draft.payload.collision = sequencer_pb2.COLLISION_NONE
    return draft


@settings(max_examples=40, deadline=None)
@given(lives)
def test_a_crash_anywhere_changes_no_count(given: list[tuple[str, int]]) -> None:
    """Whenever it is saved and whenever it dies, the counts equal the fold over the whole journal."""

    async def live() -> None:
        with tempfile.TemporaryDirectory() as folder:
            life = Life(SqliteKit(Path(folder) / "journal.db"))
            await life.begin()
            for do, token in given:
                match do:
                    case "complete":
                        await life.complete(token)
                    case "audit":
                        await life.audit(token)
                    case "save":
                        await life.tracker.save(life.journal)
                    case _:
                        await life.crash()
                assert life.tracker.checkpoint.counts == await life.everything()
            await life.crash()
            assert life.tracker.checkpoint.counts == await life.everything()
            assert life.tracker.checkpoint.index == (await life.journal.head()).index
            await life.journal.close()

    asyncio.run(live())


@pytest.fixture(name="life")
async def _life(tmp_path: Path) -> AsyncIterator[Life]:
    life = Life(SqliteKit(tmp_path / "journal.db"))
    await life.begin()
    yield life
    await life.journal.close()


async def test_a_start_reads_only_new_entries(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads only the entries since the checkpoint."""
    for _ in range(3):
        await life.complete(0)
    await life.tracker.save(life.journal)
    saved = life.tracker.checkpoint.index
    await life.complete(1)
    asked: list[int] = []
    entries = Journal.entries

    async def watched(journal: Journal, from_index: int, limit: int, *, payloads: bool) -> object:
        asked.append(from_index)
        return await entries(journal, from_index, limit, payloads=payloads)

    monkeypatch.setattr(Journal, "entries", watched)
    await life.crash()

    assert min(asked) == saved + 1
    assert life.tracker.checkpoint.counts == await life.everything()


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"no JSON",
        b'{"version": 2, "index": "three"}',
        b"[1]",
        msgspec.json.encode(Checkpoint(version=VERSION + 1, index=2)),
        msgspec.json.encode(Checkpoint(index=1_000)),
    ],
    ids=["empty", "garbage", "wrong type", "no object", "newer version", "beyond the head"],
)
async def test_an_unusable_checkpoint(life: Life, kept: bytes) -> None:
    """With a checkpoint that is damaged, of another version, or ahead of the journal, the journal is counted from its start."""
    for token in (0, 0, 1):
        await life.complete(token)
    await life.journal.append(Note(f"divergence/{WRITER}", kept))
    await life.crash()

    assert life.tracker.checkpoint.counts == await life.everything() != Counts()


@pytest.mark.parametrize("digests_only", [False, True], ids=["full", "digests"])
async def test_what_is_committed_while_it_is_restored(life: Life, monkeypatch: pytest.MonkeyPatch, digests_only: bool) -> None:
    """Entries that are committed before, during and after the restore are each counted once, also if their payloads are dropped
    at once."""
    for _ in range(6):
        await life.complete(0)
    await life.journal.close()
    counted = life.tracker.checkpoint.counts.collision_checks
    life.store.settings = replace(life.store.settings, digests_only=digests_only)
    life.tracker = DivergenceTracker(WRITER)
    life.journal = Journal(
        life.store.open(), now_millis=life.store.clock.now_millis, on_entries=lambda entries: life.tracker.committed(entries)
    )
    entries = Journal.entries
    reads = 0

    async def interrupted(journal: Journal, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        nonlocal reads
        page = await entries(journal, from_index, limit, payloads=payloads)
        reads += 1
        await life.complete(0)
        return page

    monkeypatch.setattr(tracker, "PAGE_ENTRIES", 5)
    monkeypatch.setattr(Journal, "entries", interrupted)
    await life.complete(0)
    await life.tracker.restore(life.journal)
    monkeypatch.undo()
    await life.complete(0)

    assert reads > 1
    assert life.tracker.checkpoint.counts.collision_checks == counted + 1 + reads + 1
    assert life.tracker.checkpoint.index == (await life.journal.head()).index
    if not digests_only:
        assert life.tracker.checkpoint.counts == await life.everything()


async def test_only_own_entries_are_counted(life: Life) -> None:
    """On a shared log each sidecar counts its own entries."""
    for token in (0, 1):
        await life.complete(token)
    other = DivergenceTracker("another")
    await other.restore(life.journal)

    assert other.checkpoint.counts == Counts()
    assert other.checkpoint.index == life.tracker.checkpoint.index


async def test_what_was_not_compared_is_kept(life: Life) -> None:
    """Second runs without a verdict, which have no entry, are in the checkpoint."""
    for reason in ("busy", "busy", "drained"):
        life.tracker.not_compared(types_pb2.COMPARISON_KIND_AUDIT, reason)
    await life.tracker.save(life.journal)
    await life.crash()

    assert life.tracker.checkpoint.counts.not_compared == {"audit": {"busy": 2, "drained": 1}}


async def test_nothing_changed_is_not_written(life: Life) -> None:
    """A second save without a change writes nothing."""
    await life.complete(0)
    await life.tracker.save(life.journal)
    note = await life.journal.notes("divergence/")
    await life.journal.append(Note(f"divergence/{WRITER}", b"a mark"))
    await life.tracker.save(life.journal)

    assert list(note) == [f"divergence/{WRITER}"]
    assert (await life.journal.notes("divergence/")) == {f"divergence/{WRITER}": b"a mark"}


async def test_a_batch_of_many(life: Life) -> None:
    """Entries that are committed together are each counted once, twins in the batch included."""
    drafts: list[Admission] = [admission(*(item(1, seed=9) for _ in range(5))) for _ in range(10)]
    batches = await asyncio.gather(*(life.journal.append(draft) for draft in drafts))
    await asyncio.gather(*(life.journal.append(outcome(entry, 0)) for batch in batches for entry in batch.entries))

    (group,) = life.tracker.checkpoint.counts.groups
    assert (group.sums.matched, group.sums.diverged) == (49, 0)
    assert life.tracker.checkpoint.counts.collision_checks == 50
