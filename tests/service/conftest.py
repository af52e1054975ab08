"""Whatever a test of the service does, the service itself logs no error over it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

ON_PURPOSE = ("crashing, as the script says", "a step failed", "could not prepare")


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    errors = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR and record.getMessage() not in ON_PURPOSE
    ]
    assert errors == []
