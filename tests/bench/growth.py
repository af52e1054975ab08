"""How the journal's file grows with what it records."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ostinato.v1 import types_pb2

from sidecar.journal.maintenance import prune
from sidecar.journal.model import Admission, Outcome
from sidecar.journal.sqlite import SqliteKept, SqliteSettings, SqliteStore
from tests.bench.journal import NEW_TOKENS, PROMPT_TOKENS, admission, outcome
from tests.bench.table import Table, count

ITEMS = 20_000
GROUP = 64
"""Items in a commit: their admissions in one, their outcomes in the next."""


def _keyed(draft: Admission, number: int) -> Admission:
    return Admission(draft.items, draft.request_digest, f"key-{number:032}")


def grown(path: Path, *, keyed: bool, settings: SqliteSettings) -> float:
    """Bytes an item, of the file once it is closed. Every item has ended."""
    journal, _ = SqliteStore.open(path, writer="bench", version="0", new_log_id="0" * 32, now_millis=1, settings=settings)
    empty = path.stat().st_size
    for first in range(0, ITEMS, GROUP):
        drafts = [admission(number) for number in range(first, first + GROUP)]
        admitted = journal.append_many([_keyed(d, first + n) if keyed else d for n, d in enumerate(drafts)], 1)
        ended: list[Outcome] = [outcome(answer.entries[0].header) for answer in admitted]
        journal.append_many(ended, 1)
        journal.maintain(1, idle=False)
    journal.close()
    return (path.stat().st_size - empty) / ITEMS


def pruned(path: Path) -> float:
    """Bytes an item that are in use after all payloads were dropped; the rest of the file is free to be used again."""
    kept = SqliteKept(path)
    for _ in prune(kept, lambda header: header.kind != types_pb2.ENTRY_KIND_UNSPECIFIED):
        pass
    used = kept.bytes_used()
    kept.close()
    return used / ITEMS


def measure() -> Table:
    note = (
        f"{ITEMS:,} items that have ended, one in a request, {PROMPT_TOKENS} token ids in and {NEW_TOKENS} out; the file "
        "closed. A keyed item keeps its payloads for --idempotency-ttl-seconds in both settings."
    )
    table = Table("Growth of the journal", ["", "bytes an item"], note)
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        for name, only in (("--payloads full", False), ("--payloads digests", True)):
            settings = SqliteSettings(reserve_bytes=0, digests_only=only)
            for what, keyed in (("", False), (", with a key", True)):
                path = Path(folder) / f"{only}{keyed}.sqlite"
                table.rows.append([name + what, count(grown(path, keyed=keyed, settings=settings))])
        table.rows.append(["--payloads full, all of it pruned", count(pruned(Path(folder) / "FalseFalse.sqlite"))])
    return table
