"""From an item's end to what its callers are told, on a real journal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.answers import UnaryWaiter, ended_payload, outcome_kind
from sidecar.core import events as ev
from sidecar.item import ActiveItem
from sidecar.journal.model import Outcome, Sealed
from sidecar.journal.sqlite import SqliteSettings
from sidecar.journal.writer import Journal
from sidecar.observe import Metrics, Observer
from sidecar.pipeline import Outcomes
from tests.sidecar.held_kit import account
from tests.sidecar.journal_kit import SqliteKit, admission, completed, ended, item


class Host:
    """Keeps what Outcomes tells it, and the tasks that it starts."""

    def __init__(self) -> None:
        self.items: dict[int, ActiveItem] = {}
        self.clock = asyncio.get_running_loop().time
        self.told: list[ev.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    def dispatch(self, event: ev.Event) -> None:
        self.told.append(event)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))

    async def finish(self) -> None:
        """Until every task has ended. Raises what one of them raised."""
        while self.tasks:
            await self.tasks.pop()


@pytest.fixture(name="journal")
async def _journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """One that keeps no payload of an unkeyed item that has ended."""
    settings = SqliteSettings(reserve_bytes=0, digests_only=True)
    store = SqliteKit(tmp_path / "journal.db", settings=settings)
    journal = Journal(store.open()[0], now_millis=store.clock.now_millis)
    yield journal
    await journal.close()


def cancelled(admitted: Sealed) -> Outcome:
    error = errors.Cancelled("cancelled on request")
    return Outcome(admitted.header, outcome_kind(error), 1, ended_payload(error, types_pb2.Timing()))


def abandoned(admitted: Sealed) -> Outcome:
    return ended(admitted, types_pb2.ENTRY_KIND_ABANDONED)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (cancelled, "CANCELLED"),
        (abandoned, "ABANDONED"),
        (ended, "PAYLOAD_PRUNED"),
        (completed, "PAYLOAD_PRUNED"),
    ],
)
async def test_another_outcome_whose_payload_was_dropped(journal: Journal, first: Any, reason: str) -> None:
    """Where another sidecar's outcome came first and its payload is dropped already, callers are told what its header says,
    and the item ends here as any other."""
    (admitted,) = (await journal.append(admission(item(1)))).entries
    host, call = Host(), UnaryWaiter(1, account())
    unused = cast(Any, SimpleNamespace())
    work = host.items[1] = ActiveItem.of(admitted, [call], 0.0)
    outcomes = Outcomes(host, journal, unused, unused)
    await journal.append(first(admitted))
    (recorded,) = await journal.items(1, 1, 1)
    assert recorded.outcome is not None
    assert recorded.outcome.payload == b""

    outcomes.end(ev.End(1, 1, errors.EngineFailed("too late")))
    await host.finish()

    (result,) = generation_pb2.GenerateResponse.FromString(await call.answer(types_pb2.Stamp())).results
    assert (result.sequence, result.attempt, errors.from_status(result.status).reason) == (1, 1, reason)
    assert await work.ended == result
    assert (host.items, host.told) == ({}, [ev.Ended(1)])


async def test_a_collision_is_told(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """Two unseeded items with one answer are logged once, with what is known of the choice that the answer took."""
    unused = cast(Any, SimpleNamespace())
    host, observer = Host(), Observer(Metrics(CollectorRegistry()), lambda kind, reason: None)
    outcomes = Outcomes(host, journal, observer, unused)
    batch = (await journal.append(admission(item(1), item(1)))).entries
    for admitted in batch:
        work = host.items[admitted.header.sequence] = ActiveItem.of(admitted, [], 0.0)
        seed = admitted.header.seed
        work.output = types_pb2.Output(token_ids=range(40), seed=seed, engine_seed=seed, grade=types_pb2.GRADE_EXACT)
        outcomes.end(ev.End(work.sequence, 1, None))
    await host.finish()

    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    said = {name: getattr(record, name) for name in ("sequence", "tokens", "distinct_tokens", "logprobs_known", "choice_bits")}
    assert record.getMessage() == "collision: an unseeded answer equals that of another seed"
    assert said == {"sequence": 2, "tokens": 40, "distinct_tokens": 40, "logprobs_known": False, "choice_bits": 50.0}
