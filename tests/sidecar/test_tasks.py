"""A task that dies is seen: it ends the process, or is logged where the process goes on without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ostinato import errors
from ostinato.v1 import engine_pb2

from sidecar.config import Settings
from sidecar.journal import JournalBroken, Sealed
from sidecar.journal.grouped import GroupedJournal
from sidecar.shadow import Shadow
from tests.sidecar.journal_kit import SqliteStore, admission


async def hello() -> engine_pb2.Hello:
    return engine_pb2.Hello()


@pytest.mark.parametrize(
    ("error", "message", "traceback"),
    [
        (errors.EpochStale("4 has been here"), "no shadow any more", False),
        (errors.JournalBehind("7 was run here"), "no shadow any more", False),
        (AssertionError("never"), "the shadow has failed", True),
    ],
)
async def test_a_shadow_that_ends(
    error: Exception, message: str, traceback: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ends the shadow's stream for good is logged as an error, and the sidecar serves without it."""
    dispatcher: Any = SimpleNamespace(
        journal=None, observer=None, fingerprints=None, outcomes=SimpleNamespace(witnesses=[]), clock=lambda: 0.0
    )
    shadow = Shadow(dispatcher, Settings(shadow="unix:/nowhere"))

    async def run(listener: object, hello: Callable[[], Awaitable[engine_pb2.Hello]]) -> None:
        raise error

    monkeypatch.setattr(shadow._link, "run", run)
    await shadow.run(hello)
    await shadow.close()

    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR and each.name.startswith("sidecar")]
    assert record.getMessage() == message
    assert bool(record.exc_info) == traceback
    assert str(error) in (str(record.exc_info) if traceback else cast(Any, record).why)


async def test_a_commit_that_cannot_be_counted(tmp_path: Path) -> None:
    """What fails when it is told of a commit breaks the journal, so that the process ends and recovers, and does not go on
    without having heard."""

    def failing(entries: list[Sealed]) -> None:
        if entries:
            raise ZeroDivisionError

    store = SqliteStore(tmp_path / "journal.db")
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    journal = GroupedJournal(store.open()[0], now_millis=store.clock.now_millis, on_entries=cast(Any, failing))
    await journal.append(admission())

    reason = await asyncio.wait_for(asyncio.shield(journal.broken), 10)
    await journal.close()
    assert isinstance(reason, JournalBroken)
    assert "ZeroDivisionError" in str(reason)
    assert [type(context["exception"]) for context in seen] == [ZeroDivisionError]
