"""No test of the service leaves an unexpected error in its log. And a llama engine for a module that needs one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from service.engines.llama import load
from tests.service.llama_kit import Bench, small

GRPC = "PollerCompletionQueue"
"""gRPC's own poller, which may still write to the loop of an earlier test."""
ON_PURPOSE = ("crashing, as the script says", "a step failed", "could not prepare")


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    errors = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR and record.getMessage() not in ON_PURPOSE and GRPC not in record.getMessage()
    ]
    assert errors == []


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="bench")
async def _bench() -> AsyncIterator[Bench]:
    engine = load(small())
    yield Bench(engine)
    await engine.close()
