"""What the journal's tests are made of: drafts, a clock, and one store per backend."""

from __future__ import annotations

import itertools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import quote

import apsw
import psycopg

from ostinato.digest import input_digest
from ostinato.signature import PublicKeys
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.ledger import twins_of
from sidecar.journal.maintenance import Checker, Unsound, verify
from sidecar.journal.model import Admission, Audit, Draft, Key, Mark, Outcome, Sealed
from sidecar.journal.postgres import PostgresStore
from sidecar.journal.sql import Opening, SqlStore, Use
from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store, StoreSettings
from sidecar.opening import open_for_maintenance
from tests.sidecar.postgres_proxy import Proxy

LOG_ID = "0123456789abcdef0123456789abcdef"
SECRET = b"s" * 32
PARAMETERS = types_pb2.ResolvedParameters(temperature=1.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=16)
FINGERPRINT = b"f" * 32
NONCES = (number.to_bytes(16) for number in itertools.count(1))


def faults(journal: Path | str) -> list[str]:
    """The first that verify finds in a journal, by its path or URL; a file must not be in use. JournalUnusable: it cannot be
    read."""
    with closing(open_for_maintenance(str(journal), "read")) as store:
        try:
            verify(store, PublicKeys(), lambda index: None)
        except Unsound as error:
            return [error.fault]
    return []


def checked(entries: Iterable[Sealed]) -> Checker:
    """What the entries say; fails if there is a fault in them."""
    checker = Checker()
    assert [fault for entry in entries for fault in checker.check(entry)] == []
    return checker


@dataclass
class Clock:
    """Time that passes when told to."""

    millis: int = 1_700_000_000_000

    def now_millis(self) -> int:
        return self.millis

    def seconds(self) -> float:
        return self.millis / 1000

    def sleep(self, seconds: float) -> None:
        self.millis += round(seconds * 1000)


def item(*token_ids: int, seed: int | None = None, request_id: str = "") -> sequencer_pb2.AdmittedPayload:
    """What is admitted; without a seed it gets one."""
    return sequencer_pb2.AdmittedPayload(
        token_ids=token_ids or (1, 2, 3),
        parameters=PARAMETERS,
        seed=seed or 0,
        seed_derived=seed is None,
        request_id=request_id,
        nonce=next(NONCES),
    )


def prompt(admitted: Sealed) -> sequencer_pb2.AdmittedPayload:
    """What was admitted, as recorded."""
    return sequencer_pb2.AdmittedPayload.FromString(admitted.payload)


def admission(*items: sequencer_pb2.AdmittedPayload, key: str = "", tenant: str = "", digest: bytes = b"r" * 32) -> Admission:
    """A batch; of one item if none is given."""
    return Admission(items or (item(),), digest, key=key, tenant=tenant)


def completed(
    admitted: Sealed, *token_ids: int, attempt: int = 1, fingerprint: bytes = FINGERPRINT, text: str = "answer"
) -> Outcome:
    """An item's COMPLETED outcome, with this output."""
    output = types_pb2.Output(
        text=text,
        token_ids=token_ids or (7, 8),
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        seed=admitted.header.seed,
        grade=types_pb2.GRADE_EXACT,
    )
    item = prompt(admitted)
    payload = sequencer_pb2.CompletedPayload(output=output, nonce=item.nonce)
    twins = twins_of(item.tenant, input_digest(item.token_ids, item.parameters, item.seed))
    return Outcome(admitted.header, types_pb2.ENTRY_KIND_COMPLETED, attempt, payload, fingerprint, twins)


def ended(admitted: Sealed, kind: types_pb2.EntryKind.ValueType = types_pb2.ENTRY_KIND_FAILED, attempt: int = 1) -> Outcome:
    """An outcome without an output."""
    nonce = prompt(admitted).nonce
    payload = sequencer_pb2.EndedPayload(code=13, reason="ENGINE_FAILED", message="it broke", nonce=nonce)
    return Outcome(admitted.header, kind, attempt, payload, FINGERPRINT)


def audit(admitted: Sealed, kind: types_pb2.ComparisonKind.ValueType = types_pb2.COMPARISON_KIND_AUDIT) -> Audit:
    """A verdict about an item."""
    verdict = types_pb2.Comparison(sequence=admitted.header.sequence, kind=kind, verdict=types_pb2.VERDICT_MATCH)
    return Audit(admitted.header, verdict, prompt(admitted).nonce, FINGERPRINT)


ABOUT_AN_ITEM: Mapping[str, Callable[[Sealed], Draft]] = {"complete": completed, "end": ended, "audit": audit}
"""Ways to make a draft about an admitted item."""


def twin(entry: Sealed) -> types_pb2.Comparison | None:
    """What a COMPLETED entry says of its twin."""
    if entry.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        return None
    completed = sequencer_pb2.CompletedPayload.FromString(entry.payload)
    return completed.twin if completed.HasField("twin") else None


def sequences(entries: Sequence[Sealed]) -> list[int]:
    return [entry.header.sequence for entry in entries]


class Kit(ABC):
    """One journal, opened as often as wanted."""

    clock: Clock
    settings: StoreSettings

    def opening(self, writer: str, log_id: str, mark: Mark | None) -> Opening:
        return Opening(
            writer=writer, version="1.0", new_log_id=log_id, new_secret=SECRET, now_millis=self.clock.millis, mark=mark
        )

    @property
    @abstractmethod
    def location(self) -> str:
        """Its path or URL."""

    @abstractmethod
    def open(self, *, writer: str = "writer", log_id: str = LOG_ID, mark: Mark | None = None) -> Store: ...

    @abstractmethod
    def opened(self) -> AbstractContextManager[Store]: ...

    @abstractmethod
    def another(self) -> Kit:
        """One with nothing in it."""

    @abstractmethod
    def execute(self, statement: Any, *parameters: object) -> list[tuple[Any, ...]]:
        """In the database, as someone who can write its files; a file must not be open. What it returns."""

    @abstractmethod
    def fence(self, journal: Store) -> None:
        """Another process begins an epoch of this writer."""

    def maintained(self, use: Use = "change") -> AbstractContextManager[SqlStore]:
        """Opened for maintenance."""
        return closing(open_for_maintenance(self.location, use))

    def keys(self) -> list[Key]:
        with self.maintained() as kept, kept.snapshot() as tables:
            return tables.keys(1, 99)

    def faults(self) -> list[str]:
        return faults(self.location)

    def configure(self, **settings: Any) -> None:
        self.settings = replace(self.settings, **settings)


@dataclass
class SqliteKit(Kit):
    """One journal on a disk."""

    path: Path
    clock: Clock = field(default_factory=Clock)
    settings: StoreSettings = field(default_factory=StoreSettings)
    vfs: str | None = None

    @property
    def location(self) -> str:
        return str(self.path)

    def open(self, *, writer: str = "writer", log_id: str = LOG_ID, mark: Mark | None = None) -> SqliteStore:
        return SqliteStore.open(str(self.path), self.opening(writer, log_id, mark), self.settings, vfs=self.vfs)

    def opened(self) -> AbstractContextManager[SqliteStore]:
        return closing(self.open())

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with closing(apsw.Connection(str(self.path))) as db:
            return db.execute(statement, parameters).fetchall()

    def another(self) -> SqliteKit:
        return SqliteKit(self.path.with_name("another.db"), self.clock, self.settings)

    def fence(self, journal: Store) -> None:
        """As if another process had begun an epoch; the lock makes that impossible."""
        assert isinstance(journal, SqliteStore)
        journal._db.execute("UPDATE journal SET epoch = epoch + 1")


@dataclass
class PostgresKit(Kit):
    """One journal in a schema of its own. Its leases are by the server's clock, whatever the time is here."""

    url: str
    clock: Clock = field(default_factory=Clock)
    settings: StoreSettings = field(default_factory=StoreSettings)
    journals: list[PostgresStore] = field(default_factory=list)
    spare: str = ""
    """The URL of another schema, with nothing in it."""

    @property
    def location(self) -> str:
        return self.url

    def open(
        self,
        *,
        writer: str = "writer",
        log_id: str = LOG_ID,
        url: str = "",
        mark: Mark | None = None,
        seconds: Callable[[], float] = time.monotonic,
    ) -> PostgresStore:
        opening = self.opening(writer, log_id, mark)
        journal = PostgresStore.open(url or self.url, opening, self.settings, seconds=seconds)
        self.journals.append(journal)
        return journal

    def kill(self) -> None:
        """Every journal that is open, as their processes' deaths would."""
        while self.journals:
            self.journals.pop()._database.drop()

    def opened(self, writer: str = "writer") -> AbstractContextManager[PostgresStore]:
        return closing(self.open(writer=writer))

    def fence(self, journal: Store) -> None:
        self.open(writer=journal.head.writer).close()

    def another(self) -> PostgresKit:
        return PostgresKit(self.spare, self.clock, self.settings)

    def execute(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as db:
            found = db.execute(query, parameters)
            return found.fetchall() if found.description else []


NOW = 1_700_000_000_000
EXPIRE = "UPDATE writers SET lease_until = clock_timestamp() - interval '1 second' WHERE name = %s"


def admit(journal: PostgresStore, *items: sequencer_pb2.AdmittedPayload, key: str = "") -> tuple[Sealed, ...]:
    (appended,) = journal.append_many([admission(*items, key=key)], NOW)
    return appended.entries


def sound(store: PostgresKit) -> bool:
    return store.faults() == []


class Watch:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def through(line: Proxy, store: PostgresKit) -> str:
    """The store's URL, but by way of the proxy."""
    return re.sub(r"(?<=host=)[^&]*", quote(str(line.folder), safe=""), store.url)


FIRST_VERSION: Mapping[type[Kit], LiteralString] = {
    SqliteKit: """DROP INDEX openings; DROP TABLE heads; DROP TABLE notes; ALTER TABLE items DROP COLUMN verified;
      ALTER TABLE journal DROP COLUMN lost_sequence; ALTER TABLE journal DROP COLUMN secret; PRAGMA user_version = 1""",
    PostgresKit: """DROP INDEX openings; DROP TABLE heads; ALTER TABLE log DROP COLUMN secret;
      UPDATE ostinato SET version = 1""",
}
"""What makes the first version of the tables of the newest."""
