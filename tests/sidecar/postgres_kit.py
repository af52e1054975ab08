"""A journal in PostgreSQL, as several tests of it want one."""

from __future__ import annotations

import re
from urllib.parse import quote

from ostinato.v1 import sequencer_pb2

from sidecar.journal.model import Sealed
from sidecar.journal.postgres import PostgresStore
from tests.sidecar.journal_kit import PostgresKit, admission
from tests.sidecar.postgres_proxy import Proxy

NOW = 1_700_000_000_000
EXPIRE = "UPDATE writers SET lease_until = clock_timestamp() - interval '1 second' WHERE name = %s"


def admit(journal: PostgresStore, *items: sequencer_pb2.AdmittedPayload, key: str = "") -> tuple[Sealed, ...]:
    (appended,) = journal.append_many([admission(*items, key=key)], NOW)
    return appended.entries


def sound(store: PostgresKit) -> bool:
    return [fault for page in store.verify() for fault in page.faults] == []


class Watch:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def through(line: Proxy, store: PostgresKit) -> str:
    """The store's URL, but by way of the proxy."""
    return re.sub(r"(?<=host=)[^&]*", quote(str(line.folder), safe=""), store.url)
