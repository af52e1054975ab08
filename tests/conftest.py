"""What holds for every test, and one PostgreSQL server for all of them, started when it is first wanted."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from serving.auth import ANONYMOUS, CALLER

from tests.postgres import Postgres

# How long an example takes is the machine's business.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of what a shell runs in the background. The programs that tests start would inherit it, and are to obey a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _anonymous() -> Iterator[None]:
    """No test runs as the caller of an earlier one."""
    token = CALLER.set(ANONYMOUS)
    yield
    CALLER.reset(token)


@pytest.fixture(scope="session", name="postgres")
def _postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server
