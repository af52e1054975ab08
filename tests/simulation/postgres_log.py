"""A journal on a real PostgreSQL server, in a world whose clock stops while the server answers.

The driver is synchronous and runs in the journal's thread, which the world's clock drives; so nothing of it is simulated. What
a sidecar leaves that dies is what its server makes of a connection that is gone: a transaction that stood open is undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

import psycopg

from sidecar.journal.model import Sealed
from sidecar.journal.postgres import PostgresStore, PostgresTables
from sidecar.journal.store import Store, StoreSettings
from tests.postgres import Postgres
from tests.simulation.loop import NO_NODE
from tests.simulation.stores import ALL, opening

LEASE_SECONDS = 3.0
OUTAGE_SECONDS = 2.5
"""Of a server that dies."""
_NO_ROOM = """CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql
  AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$;
  CREATE TRIGGER full_disk BEFORE INSERT ON payloads EXECUTE FUNCTION full_disk()"""


class PostgresLog:
    """A schema of its own. It has one sidecar at a time here; tests/soak has several, as processes."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self._url = server.url(server.schema())
        self._opened: list[PostgresStore] = []
        self._full = self._down = False

    def open(self, now_millis: int) -> Store:
        journal = PostgresStore.open(
            self._url,
            opening(now_millis),
            StoreSettings(lease_seconds=LEASE_SECONDS),
            seconds=asyncio.get_running_loop().time,
        )
        self._opened.append(journal)
        return journal

    def crash(self, backend: Store | None, rng: random.Random, *, power: bool) -> None:
        self.power_off()

    def power_off(self) -> None:
        """The sidecar's connection is gone, with whatever stands open on it. Not so a commit that the server has read."""
        for journal in self._opened:
            journal._database.drop()
        self._opened.clear()

    def entries(self) -> Sequence[Sealed]:
        if self._down:
            self._start_server()
        with psycopg.connect(self._url, autocommit=True) as db:
            return PostgresTables(db).entries(1, ALL, payloads=True)

    def fail_in(self, operations: int) -> None: ...

    def fill(self, full: bool) -> None:
        self._full = full
        if self._down:
            return
        with psycopg.connect(self._url, autocommit=True) as db:
            db.execute("DROP FUNCTION IF EXISTS full_disk CASCADE")
            if full:
                db.execute(_NO_ROOM)

    def crash_server(self, loop: asyncio.AbstractEventLoop) -> None:
        """kill -9 of all its processes; it recovers after a while of the loop's time."""
        self._server.crash()
        self._down = True
        loop.call_later(OUTAGE_SECONDS, self._start_server, context=NO_NODE)

    def _start_server(self) -> None:
        if self._down:
            self._server.start()
            self._down = False
            self.fill(self._full)


def cut(tables: Any) -> None:
    """Break the line that these tables are read by: what comes next on it fails."""
    with contextlib.suppress(psycopg.Error):
        tables._db.close()
