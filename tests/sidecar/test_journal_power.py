"""Loss of power at any write: nothing that was acknowledged is lost, and what is left is a sound journal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from ostinato.v1 import types_pb2

from sidecar.journal.model import Appended, Draft, JournalUnusable, Sealed
from sidecar.journal.sqlite import SqliteStore
from tests.sidecar.journal_disk import Disk, PowerLost
from tests.sidecar.journal_kit import ABOUT_AN_ITEM, SqliteKit, admission, checked, item

LOSSES = 4
"""Of power, in one run."""
SEEDS, MORE_SEEDS = 40, 300
"""In every run of the tests, and in `make sim`."""


class Run:
    """A journal under random work; `acknowledged` is what it has promised."""

    def __init__(self, seed: int, folder: Path, synchronous: str = "FULL") -> None:
        self.rng = random.Random(seed)
        self.disk = Disk()
        self.store = SqliteKit(folder / f"{seed}.db", vfs=self.disk.name)
        self.acknowledged: list[Sealed] = []
        self.unfinished: dict[int, Sealed] = {}
        self.synchronous = synchronous

    def work(self) -> None:
        """Append until the power fails."""
        self.disk.dark_after = self.rng.randrange(1, 120)
        journal: SqliteStore | None = None
        try:
            journal = self.store.open()
            self.unfinished = {one.admitted.header.sequence: one.admitted for one in journal.to_recover}
            journal._db.pragma("synchronous", self.synchronous)
            self.acknowledged = journal.entries(1, 10_000, payloads=True)
            for _ in range(40):
                self.acknowledge(journal.append_many(self.group(), self.store.clock.millis))
                if self.rng.random() < 0.1:
                    journal._wal_pages = 1 << 20  # as if it had grown: a checkpoint is due
                    journal.maintain(0, idle=True)
        except (PowerLost, JournalUnusable):
            pass
        finally:
            self.disk.dark = True
            if journal is not None:
                journal.close()

    def group(self) -> list[Draft]:
        drafts: list[Draft] = []
        for _ in range(self.rng.randrange(1, 6)):
            if self.unfinished and self.rng.random() < 0.5:
                entry = self.unfinished.pop(self.rng.choice(list(self.unfinished)))
                drafts.append(self.rng.choice(list(ABOUT_AN_ITEM.values()))(entry))
            else:
                key = self.rng.choice(["", f"key-{self.rng.randrange(20)}"])
                drafts.append(admission(*(item(1, seed=1) for _ in range(self.rng.randrange(1, 4))), key=key))
        return drafts

    def acknowledge(self, appended: Sequence[Appended]) -> None:
        for answer in appended:
            for entry in answer.entries:
                self.acknowledged.append(entry)
                if entry.header.kind == types_pb2.ENTRY_KIND_ADMITTED:
                    self.unfinished[entry.header.sequence] = entry

    def faults(self) -> list[str]:
        """What is wrong after the power is back."""
        self.disk.lose_power(self.rng)
        try:
            with self.store.opened() as journal:
                entries = journal.entries(1, 10_000, payloads=True)
        except JournalUnusable as error:
            return [str(error)]
        checked(entries)
        lost = [e.header.index for e in self.acknowledged if e not in entries[e.header.index - 1 : e.header.index]]
        return [f"entry {index} was acknowledged and is lost" for index in lost]


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.sim] if seed >= SEEDS else []) for seed in range(MORE_SEEDS)]
)
def test_power_loss(seed: int, tmp_path: Path) -> None:
    """However often power fails, at whatever write, every acknowledged entry is there and the chain holds."""
    run = Run(seed, tmp_path)
    for loss in range(LOSSES):
        run.work()
        assert run.faults() == [], f"seed {seed}, loss {loss}"
    assert len(run.acknowledged) > 0


def test_power_loss_would_show(tmp_path: Path) -> None:
    """The same runs without a sync at every commit do lose acknowledged entries: the simulation can tell."""
    runs = [Run(seed, tmp_path, synchronous="NORMAL") for seed in range(10)]
    for run in runs:
        run.work()

    assert any("is lost" in fault for run in runs for fault in run.faults())
