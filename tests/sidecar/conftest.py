"""What several of these tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgres import Postgres
from tests.sidecar.journal_kit import PostgresKit
from tests.sidecar.postgres_proxy import Proxy, proxy


@pytest.fixture(name="line")
def _line(postgres: Postgres) -> Iterator[Proxy]:
    """A way to the server that can be cut."""
    with proxy(postgres) as line:
        yield line


@pytest.fixture(name="store")
def _store(postgres: Postgres) -> Iterator[PostgresKit]:
    """A journal's database of its own."""
    store = PostgresKit(postgres.url(postgres.schema()))
    yield store
    store.kill()
