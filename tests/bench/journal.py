"""The journal by itself: items made durable, against SQLite doing the same inserts with nothing around it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count as counting
from pathlib import Path

import apsw

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal import Admission, Outcome
from sidecar.journal.grouped import GroupedJournal
from sidecar.journal.schema import connect, migrate
from sidecar.journal.sqlite import SqliteJournal, SqliteSettings
from tests.bench.loop import Round, closed_loop, middle, summary
from tests.bench.table import Table

REQUESTERS = (1, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 200, 64
HEADER_BYTES = {"admitted": 190, "completed": 260}


def admission(number: int) -> Admission:
    """One unkeyed item."""
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    digest = sha256(number.to_bytes(8)).digest()
    payload = sequencer_pb2.AdmittedPayload(
        token_ids=[(number + position) % 40_000 for position in range(PROMPT_TOKENS)],
        parameters=parameters,
        seed_derived=True,
        request_digest=digest,
        model_digest=digest,
    )
    return Admission((payload,), digest)


def outcome(admitted: types_pb2.EntryHeader) -> Outcome:
    """Its end."""
    output = types_pb2.Output(
        text="x" * 3 * NEW_TOKENS,
        token_ids=range(NEW_TOKENS),
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        seed=admitted.seed,
        grade=types_pb2.GRADE_EXACT,
    )
    payload = sequencer_pb2.CompletedPayload(output=output, timing=types_pb2.Timing(total_micros=1))
    return Outcome(admitted, types_pb2.ENTRY_KIND_COMPLETED, 1, payload, b"f" * 32)


async def _ours(folder: Path, requesters: int, seconds: float) -> Round:
    backend, _ = SqliteJournal.open(
        folder / "ours.sqlite",
        writer="bench",
        version="0",
        new_log_id="0" * 32,
        now_millis=0,
        settings=SqliteSettings(reserve_bytes=0),
    )
    journal, numbers = GroupedJournal(backend, now_millis=lambda: time.time_ns() // 10**6), counting()

    async def item() -> None:
        admitted = await journal.append(admission(next(numbers)))
        await journal.append(outcome(admitted.entries[0].header))

    try:
        return await closed_loop(requesters, seconds, item)
    finally:
        await journal.close()


def _bare(folder: Path, requesters: int, seconds: float) -> Round:
    """Transactions like those of a journal whose requesters all wait: one admits an item for each, the next ends them."""
    given = admission(1).items[0].SerializeToString()
    made = outcome(types_pb2.EntryHeader()).payload.SerializeToString()
    index, sequence, taken, began = 0, 0, list[float](), time.perf_counter()
    db = connect(folder / "bare.sqlite")
    db.execute("BEGIN")
    migrate(db)
    db.execute("COMMIT")
    while (sent := time.perf_counter()) < began + seconds:
        items = range(sequence, sequence + requesters)
        first = range(index, index + requesters)
        second = range(index + requesters, index + 2 * requesters)
        with _transaction(db):
            _entries(db, first, b"h" * HEADER_BYTES["admitted"], given)
            db.executemany("INSERT INTO items (sequence, admitted) VALUES (?, ?)", list(zip(items, first, strict=True)))
        with _transaction(db):
            _entries(db, second, b"h" * HEADER_BYTES["completed"], made)
            db.executemany("UPDATE items SET outcome = ? WHERE sequence = ?", list(zip(second, items, strict=True)))
            digests = [sha256(number.to_bytes(8)).digest() for number in items]
            db.executemany(
                "INSERT OR IGNORE INTO twins VALUES (?, ?, ?)",
                [(digest, b"f" * 32, number) for digest, number in zip(digests, second, strict=True)],
            )
        taken += [time.perf_counter() - sent] * requesters
        sequence, index = sequence + requesters, index + 2 * requesters
    db.close()
    return summary(taken, time.perf_counter() - began)


@contextmanager
def _transaction(db: apsw.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("COMMIT")


def _entries(db: apsw.Connection, indexes: range, header: bytes, payload: bytes) -> None:
    db.executemany("INSERT INTO entries VALUES (?, ?, ?)", [(index, header, b"e" * 32) for index in indexes])
    db.executemany("INSERT INTO payloads VALUES (?, ?)", [(index, payload) for index in indexes])


async def measure(rounds: int, seconds: float) -> Table:
    """Both, in turn, each time into a new file."""
    seen: dict[tuple[str, int], list[Round]] = {}
    for _ in range(rounds):
        for requesters in REQUESTERS:
            with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
                seen.setdefault(("the journal", requesters), []).append(await _ours(Path(folder), requesters, seconds))
                seen.setdefault(("SQLite alone", requesters), []).append(_bare(Path(folder), requesters, seconds))
    note = (
        f"An item is an admission with {PROMPT_TOKENS} token ids and, after it, an outcome with {NEW_TOKENS}: two synced "
        "commits. SQLite alone inserts the same rows from ready bytes; the journal also numbers, digests, chains, serialises, "
        "and answers each requester."
    )
    table = Table("Journal", ["", "requesters", "items/s", "p50 ms", "p99 ms"], note)
    for name, requesters in sorted(seen, key=lambda case: case[1]):
        table.rows.append([name, str(requesters), *middle(seen[name, requesters]).cells()])
    return table
