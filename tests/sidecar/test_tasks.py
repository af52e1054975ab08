"""A task that dies is seen: it ends the process, or is logged where the process goes on without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from sidecar.journal.model import JournalBroken, Sealed
from sidecar.journal.writer import Journal
from tests.sidecar.journal_kit import SqliteKit, admission


async def test_a_commit_that_cannot_be_counted(tmp_path: Path) -> None:
    """What fails when it is told of a commit breaks the journal, so that the process ends and recovers, and does not go on
    without having heard."""

    def failing(entries: list[Sealed]) -> None:
        if entries:
            raise ZeroDivisionError

    store = SqliteKit(tmp_path / "journal.db")
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    journal = Journal(store.open()[0], now_millis=store.clock.now_millis, on_entries=cast(Any, failing))
    await journal.append(admission())

    reason = await asyncio.wait_for(asyncio.shield(journal.broken), 10)
    await journal.close()
    assert isinstance(reason, JournalBroken)
    assert "ZeroDivisionError" in str(reason)
    assert [type(context["exception"]) for context in seen] == [ZeroDivisionError]
