"""What several of these tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres
from tests.sidecar.journal_kit import Kit, PostgresKit, SqliteKit
from tests.sidecar.postgres_proxy import Proxy, proxy


@pytest.fixture(name="line")
def _line(postgres: Postgres) -> Iterator[Proxy]:
    """A way to the server that can be cut."""
    with proxy(postgres) as line:
        yield line


@pytest.fixture(name="kit", params=["sqlite", "postgres"])
def _kit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kit]:
    """A journal in each database."""
    if request.param == "sqlite":
        yield SqliteKit(tmp_path / "journal.db")
        return
    server: Postgres = request.getfixturevalue("postgres")
    kit = PostgresKit(server.url(server.schema()), spare=server.url(server.schema()))
    yield kit
    kit.kill()


@pytest.fixture(name="store")
def _store(postgres: Postgres) -> Iterator[PostgresKit]:
    """A journal's database of its own."""
    store = PostgresKit(postgres.url(postgres.schema()))
    yield store
    store.kill()
