"""What holds for every test: their order, and one PostgreSQL server for all of them, started when it is first wanted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from serving.auth import ANONYMOUS, CALLER

from tests import pair  # noqa: F401  # so that all workers share its folder of proofs
from tests.postgres import Postgres

# How long an example takes is the machine's business.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


# A shell ignores SIGINT for what it runs in the background, and nohup ignores SIGHUP. The programs that tests start would
# inherit that, and are to obey both.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


LONGEST = ("e2e/test_determinism.py", "simulation/test_points.py", "test_readme.py")
"""Files that take a minute or more. They are first: at the end, one worker would run such a file while the others are idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; otherwise in their order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


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
