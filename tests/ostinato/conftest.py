"""What the tests of the command share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ostinato.fake import Fake, Terminal, serving
from tests.waiting import apart


@pytest.fixture(name="ostinato")
def _ostinato() -> Iterator[Terminal]:
    """The command with a sidecar that has no sequences. A test file may add some to it."""
    fake = Fake()
    with apart(serving(fake)) as target:
        yield Terminal(fake, target)


@pytest.fixture(name="elsewhere")
def _elsewhere() -> Iterator[tuple[Fake, str]]:
    """Another sidecar, and its target."""
    fake = Fake()
    with apart(serving(fake)) as target:
        yield fake, target
