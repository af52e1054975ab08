"""The pipeline around a core that does nothing, on a real journal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never, cast

import pytest
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2
from serving.auth import CALLER, Identity, Role

from sidecar.admission import draft
from sidecar.answers import UnaryWaiter, ended_payload, outcome_kind, stamp_of
from sidecar.api import SequencerServicer
from sidecar.config import Settings
from sidecar.core import events as ev
from sidecar.item import ActiveItem
from sidecar.journal.model import JournalBroken, Outcome, Sealed
from sidecar.journal.store import StoreSettings
from sidecar.journal.writer import Journal
from sidecar.observe import Metrics, Observer
from sidecar.pipeline import PendingAdmission, Pipeline
from tests.sidecar.held_kit import account, held
from tests.sidecar.journal_kit import SqliteKit, admission, completed, ended, item, prompt
from tests.waiting import eventually


@pytest.fixture(name="journal")
async def _journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """One that keeps no payload of an unkeyed item that has ended."""
    settings = StoreSettings(digests_only=True)
    store = SqliteKit(tmp_path / "journal.db", settings=settings)
    journal = Journal(store.open(), now_millis=store.clock.now_millis)
    yield journal
    await journal.close()


class Watched(Pipeline):
    """Notes what its core is told, which does nothing."""

    def __init__(self, journal: Journal) -> None:
        link: Any = SimpleNamespace()
        observer = Observer(Metrics(CollectorRegistry()), lambda kind, reason: None)
        super().__init__(Settings(), journal, link, observer, held()[0], asyncio.get_running_loop().time, os.urandom)
        self.told: list[ev.Event] = []

    def dispatch(self, event: ev.Event) -> None:
        self.told.append(event)

    async def finish(self) -> None:
        """Until every item has ended. Raises what was raised meanwhile."""
        while self.items or self._tasks:
            await asyncio.sleep(0.001)
            if self.broken.done():
                self.broken.result()


def cancelled(admitted: Sealed) -> Outcome:
    error = errors.Cancelled("cancelled on request")
    return Outcome(admitted.header, outcome_kind(error), 1, ended_payload(error, types_pb2.Timing(), prompt(admitted).nonce))


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
    pipeline, waiter = Watched(journal), UnaryWaiter(1, account())
    pipeline.items[1] = ActiveItem(admitted.header, item(1), 0.0, [waiter])
    await journal.append(first(admitted))
    (recorded,) = await journal.items(1, 1, 1)
    assert recorded.outcome is not None
    assert recorded.outcome.payload == b""

    pipeline._perform(ev.End(1, 1, errors.EngineFailed("too late")))
    pipeline._record()
    await pipeline.finish()

    (result,) = generation_pb2.GenerateResponse.FromString(await waiter.answer(types_pb2.Stamp())).results
    assert (result.sequence, result.attempt, errors.from_status(result.status).reason) == (1, 1, reason)
    assert (pipeline.items, pipeline.told) == ({}, [ev.Ended((1,))])


async def test_the_load_of_a_tenant_is_its_own(journal: Journal) -> None:
    """A tenant is told how many of its own items run and wait; an admin, what the core has."""
    pipeline = Watched(journal)
    for sequence, tenant in enumerate(("acme", "acme", "zeta"), start=1):
        given = item(1)
        given.tenant = tenant
        header = types_pb2.EntryHeader(sequence=sequence)
        pipeline.items[sequence] = ActiveItem(header, given, 0.0, [], submitted_at=1.0 if sequence == 2 else None)
    told = {}
    for tenant, role in (("acme", Role.TENANT), ("zeta", Role.TENANT), ("none", Role.TENANT), ("ops", Role.ADMIN)):
        token = CALLER.set(Identity(tenant, role))
        told[tenant] = pipeline.load()
        CALLER.reset(token)

    assert told == {"acme": (1, 1), "zeta": (0, 1), "none": (0, 0), "ops": (0, 0)}


async def test_a_collision_is_told(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """Two unseeded items with one answer are logged once, with what is known of the choice that the answer took."""
    pipeline = Watched(journal)
    batch = (await journal.append(admission(item(1), item(1)))).entries
    for admitted in batch:
        payload = sequencer_pb2.AdmittedPayload.FromString(admitted.payload)
        active = pipeline.items[admitted.header.sequence] = ActiveItem(admitted.header, payload, 0.0, [])
        seed = admitted.header.seed
        active.output = types_pb2.Output(token_ids=range(40), seed=seed, engine_seed=seed, grade=types_pb2.GRADE_EXACT)
        pipeline._perform(ev.End(active.sequence, 1, None))
    pipeline._record()
    await pipeline.finish()

    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    said = {name: getattr(record, name) for name in ("sequence", "tokens", "distinct_tokens", "logprobs_known", "choice_bits")}
    assert record.getMessage() == "collision: an unseeded answer equals that of another seed"
    assert said == {"sequence": 2, "tokens": 40, "distinct_tokens": 40, "logprobs_known": False, "choice_bits": 50.0}


async def test_an_input_is_what_was_recorded(journal: Journal) -> None:
    """What an item runs with equals its ADMITTED entry, field for field, with a derived seed and with a given one."""
    pipeline, waiter = Watched(journal), UnaryWaiter(2, account())
    request = generation_pb2.GenerateRequest(idempotency_key="key", request_id="id", required_grade=types_pb2.GRADE_SERIAL)
    parameters = types_pb2.ResolvedParameters(max_new_tokens=3)
    prepared = [
        engine_pb2.PreparedItem(token_ids=[1, 2], parameters=parameters),
        engine_pb2.PreparedItem(token_ids=[3], parameters=parameters, seed=7),
    ]
    draft_ = draft(request, engine_pb2.PrepareResponse(items=prepared, model_digest=b"m"), "tenant", os.urandom)
    answer = asyncio.get_running_loop().create_future()
    pipeline._pending[1] = batch = PendingAdmission(1, draft_, waiter, 0.0, answer)
    pipeline._number(batch)
    await answer

    recorded = [entries.admitted for entries in await journal.items(1, 2, 2)]
    assert [pipeline.items[1].input, pipeline.items[2].input] == [
        sequencer_pb2.AdmittedPayload.FromString(sealed.payload) for sealed in recorded
    ]
    assert pipeline.items[1].input.seed != 0
    assert pipeline.items[2].input.seed == 7
    assert batch.numbered.result() == stamp_of(recorded[0].header)
    assert pipeline.told == [ev.Numbered(1, 1)]


@pytest.mark.parametrize("kind", [errors.JournalFull, errors.JournalUnavailable])
async def test_a_batch_that_the_journal_does_not_take(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, kind: type[errors.OstinatoError]
) -> None:
    """It is refused with the journal's error, and the core and the process go on without it."""

    def refuse(_draft: object) -> asyncio.Future[Never]:
        refused: asyncio.Future[Never] = asyncio.get_running_loop().create_future()
        refused.set_exception(kind("no", retry_after=7))
        return refused

    monkeypatch.setattr(journal, "append", refuse)
    pipeline = Watched(journal)
    prepared = engine_pb2.PreparedItem(token_ids=[1], parameters=types_pb2.ResolvedParameters(max_new_tokens=3))
    draft_ = draft(generation_pb2.GenerateRequest(), engine_pb2.PrepareResponse(items=[prepared]), "tenant", os.urandom)
    answer = asyncio.get_running_loop().create_future()
    pipeline._pending[1] = batch = PendingAdmission(1, draft_, UnaryWaiter(1, account()), 0.0, answer)
    pipeline._number(batch)

    with pytest.raises(kind) as refused:
        await batch.numbered
    assert refused.value.retry_after == 7
    assert pipeline.told == [ev.NotNumbered(1)]


async def test_outcomes_after_the_journal_is_over(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """The process ends because of all of them, and asyncio logs none as an exception that was not looked at."""
    pipeline = Watched(journal)
    for admitted in (await journal.append(admission(item(1), item(2)))).entries:
        pipeline.items[admitted.header.sequence] = ActiveItem(admitted.header, item(1), 0.0, [])
        pipeline._perform(ev.End(admitted.header.sequence, 1, errors.EngineFailed("no")))
    await journal.close()
    pipeline._record()

    await asyncio.wait([pipeline.broken])
    assert isinstance(pipeline.broken.exception(), JournalBroken)
    del pipeline
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_a_violation_in_the_middle_of_a_message(journal: Journal) -> None:
    """What the service says before it counts, then the stream is dropped; what it says after it is ignored."""
    pipeline, dropped = Watched(journal), list[str]()
    pipeline.link = cast(Any, SimpleNamespace(drop=lambda why: dropped.append(f"after {len(pipeline.told)} events: {why}")))
    started = [engine_pb2.RunEvent(run_id=run_id, started=engine_pb2.Started()) for run_id in (1, 2, 3)]

    pipeline.engine_events([*started[:2], engine_pb2.RunEvent(run_id=2), started[2]])

    assert pipeline.told == [ev.Reported((ev.Started(1), ev.Started(2)))]
    assert dropped == ["after 1 events: an event of run 2 that says nothing"]


async def test_a_cancel_tells_how_many_it_ended(journal: Journal) -> None:
    """Cancel waits for all items of its range that run here, ends those that run elsewhere, and counts those that ended as
    CANCELLED."""
    pipeline = Watched(journal)
    *here, _, _ = (await journal.append(admission(*map(item, range(1, 6))))).entries
    for admitted in here:
        pipeline.items[admitted.header.sequence] = ActiveItem(admitted.header, item(1), 0.0, [])
    cancelling = asyncio.ensure_future(pipeline.cancel_items(2, 4))
    await asyncio.sleep(0)
    assert pipeline.told == [ev.CancelItems(2, 4)]
    pipeline._perform(ev.End(2, 1, errors.Cancelled("cancelled on request")))
    pipeline._perform(ev.End(3, 1, errors.EngineFailed("before")))
    pipeline._record()

    assert await cancelling == 2
    assert set(pipeline.items) == {1}
    assert [entries.outcome is not None for entries in await journal.items(1, 5, 5)] == [False, True, True, True, False]


async def test_a_cancel_while_items_are_left(journal: Journal) -> None:
    """A Cancel whose item this process leaves to the next epoch is told to come back."""
    pipeline = Watched(journal)
    (admitted,) = (await journal.append(admission(item(1)))).entries
    pipeline.items[1] = ActiveItem(admitted.header, item(1), 0.0, [])
    cancelling = asyncio.ensure_future(pipeline.cancel_items(1, 1))
    await asyncio.sleep(0)
    pipeline._perform(ev.LeaveToRecovery(1))

    with pytest.raises(errors.Draining):
        await cancelling


async def test_a_run_has_what_is_left_of_the_time(journal: Journal) -> None:
    """The engine is told how long a run may take: what is left of its item's time."""
    (admitted,) = (await journal.append(admission(item(1)))).entries
    pipeline, sent = Watched(journal), list[engine_pb2.Submit]()
    pipeline.link, pipeline.engine, pipeline.clock = engine_that(sent.append), engine_pb2.DescribeResponse(), lambda: 7.0
    pipeline.items[1] = ActiveItem(admitted.header, prompt(admitted), 0.0, [])

    pipeline._submit(ev.Submit(1, 1, attempt=1, expires_at=57.0, company=1))

    assert [submit.timeout_millis for submit in sent] == [50_000]


def engine_that(submit: Callable[[engine_pb2.Submit], None]) -> Any:
    return SimpleNamespace(submit=submit)


@pytest.mark.parametrize("alone", [False, True])
async def test_a_replay_alone_asks_for_the_whole_engine(journal: Journal, alone: bool) -> None:
    """The runs of a replay with `alone` are exclusive, those of another are not."""
    (admitted,) = (await journal.append(admission(item(1), key="kept"))).entries
    await journal.append(completed(admitted))
    pipeline, unused = Watched(journal), cast(Any, None)
    pipeline.engine = engine_pb2.DescribeResponse()
    request = sequencer_pb2.ReplayRequest(range=generation_pb2.SequenceRange(first=1, last=1), alone=alone)
    CALLER.set(Identity("ops", Role.ADMIN))

    replay: Any = SequencerServicer(pipeline, unused, Settings()).Replay(request, unused)
    async with contextlib.aclosing(replay) as answers:
        answer = asyncio.ensure_future(anext(answers))
        await eventually(lambda: pipeline.told, "a run is asked for")
        answer.cancel()
        await asyncio.wait([answer])

    (rerun,) = (told for told in pipeline.told if isinstance(told, ev.Rerun))
    assert rerun.exclusive == alone
