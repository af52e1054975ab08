"""What an item costs the journal's thread: processor time, which a busy machine blurs least."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from sidecar.journal.settings import SqliteSettings
from sidecar.journal.sqlite import SqliteJournal
from tests.bench.journal import admission, outcome
from tests.bench.table import Table, count, median

GROUPS, ITEMS = (64, 256), 5_120
"""Items in a commit, and in all."""


def appended(group: int) -> float:
    """Seconds of processor time for an item: both of its entries sealed, written and committed."""
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        settings = SqliteSettings(reserve_bytes=0)
        path = Path(folder) / "journal.sqlite"
        journal, _ = SqliteJournal.open(path, writer="bench", version="0", new_log_id="0" * 32, now_millis=1, settings=settings)
        taken = 0.0
        for first in range(0, ITEMS, group):
            admissions = [admission(number) for number in range(first, first + group)]
            taken -= time.process_time()
            admitted = journal.append_many(admissions, 1)
            taken += time.process_time()
            outcomes = [outcome(answer.entries[0].header) for answer in admitted]
            taken -= time.process_time()
            journal.append_many(outcomes, 1)
            taken += time.process_time()
        journal.close()
        return taken / ITEMS


def measure(rounds: int) -> Table:
    note = "Admission and outcome of an item as in the journal's table, one thread, SQLite and its commits included."
    table = Table("Appending, processor time", ["items in a commit", "microseconds an item"], note)
    for group in GROUPS:
        table.rows.append([str(group), count(1e6 * median([appended(group) for _ in range(rounds)]))])
    return table
