"""Calls that wait for another sidecar's items, on a real journal that two writers share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.answers import RemoteWaiters, UnaryWaiter
from sidecar.answers import ended as recorded
from sidecar.journal.model import Note, Sealed
from sidecar.journal.store import StoreSettings
from sidecar.journal.writer import Journal
from tests.postgres import Postgres
from tests.sidecar.held_kit import account
from tests.sidecar.journal_kit import PostgresKit, admission, audit, completed, ended, item


@dataclass
class Two:
    """A writer that works, and one where calls wait."""

    store: PostgresKit
    there: Journal
    here: Journal
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    """That it has started."""

    def __post_init__(self) -> None:
        self.remote = RemoteWaiters(self.here, self.tasks.append)

    async def admitted(self, count: int) -> tuple[Sealed, ...]:
        return (await self.there.append(admission(*(item(number) for number in range(1, count + 1)), key="k"))).entries


@pytest.fixture(name="two")
async def _two(postgres: Postgres) -> AsyncIterator[Two]:
    async with opened(PostgresKit(postgres.url(postgres.schema()))) as two:
        yield two


@asynccontextmanager
async def opened(store: PostgresKit) -> AsyncIterator[Two]:
    there, here = (Journal(store.open(writer=name), now_millis=store.clock.now_millis) for name in ("there", "here"))
    yield Two(store, there, here)
    await asyncio.gather(there.close(), here.close())
    store.kill()


async def told(call: UnaryWaiter) -> list[types_pb2.Result]:
    answer = await asyncio.wait_for(call.answer(types_pb2.Stamp()), 10)
    return list(generation_pb2.GenerateResponse.FromString(answer).results)


async def test_outcomes_arrive(two: Two) -> None:
    """A call is told every outcome once: those that came before it joined, while it did, and after; whatever the order."""
    entries = await two.admitted(4)
    await two.there.append(completed(entries[2]))
    call, sequences = UnaryWaiter(4, account()), [entry.header.sequence for entry in entries]
    joining = asyncio.create_task(two.remote.join(call, sequences))
    await two.there.append(ended(entries[0]))
    await joining
    await two.there.append(completed(entries[3]))
    await two.there.append(completed(entries[1]))
    results = await told(call)

    assert [result.sequence for result in results] == sequences
    assert [result.HasField("output") for result in results] == [False, True, True, True]


async def test_many_wait(two: Two) -> None:
    """Many calls wait for one item, and one that comes when the others have been told is told too."""
    (entry,) = await two.admitted(1)
    calls = [UnaryWaiter(1, account()) for _ in range(5)]
    for call in calls[:4]:
        await two.remote.join(call, [1])
    await two.there.append(completed(entry))
    answers = [await told(call) for call in calls[:4]]
    await two.remote.join(calls[4], [1])

    assert [await told(calls[4])] * 4 == answers


async def test_leaving(two: Two) -> None:
    """A waiter that is removed is not told. Without waiters the journal is not followed, until one joins again."""
    (first, second) = await two.admitted(2)
    gone, stays = UnaryWaiter(1, account()), UnaryWaiter(1, account())
    await two.remote.join(gone, [1])
    gone.sequences = range(1, 2)
    two.remote.remove(gone)
    assert two.remote._following is None
    await two.remote.join(stays, [2])
    await two.there.append(completed(first))
    await two.there.append(completed(second))
    await told(stays)

    assert gone._results == {}


async def test_a_claimed_item(two: Two) -> None:
    """Who waits for an item that this sidecar takes over waits for this sidecar from then on."""
    await two.admitted(1)
    call = UnaryWaiter(1, account())
    await two.remote.join(call, [1])

    assert two.remote.claim(1) == [call]
    assert two.remote.claim(1) == []


async def test_cancelling(two: Two) -> None:
    """Items that run elsewhere are ended from here, the first outcome winning; those that run here are left to the caller."""
    entries = await two.admitted(4)
    await two.there.append(completed(entries[0]))
    call = UnaryWaiter(2, account())
    await two.remote.join(call, [2, 4])

    assert await two.remote.cancel(1, 4, {3}) == 2
    assert (await two.there.append(completed(entries[1]))).entries == ()
    assert [result.status.code for result in await told(call)] == [1, 1]
    assert [pair.outcome is not None for pair in await two.here.items(1, 4, 4)] == [True, True, False, True]
    outcome = (await recorded(two.here, 2)).outcome
    assert outcome is not None
    assert outcome.header.writer == "here"


async def test_verdicts(two: Two) -> None:
    """An answer that the client wants verified is told with its verdict; where its writer was started again, without one."""
    wanted = [item(number) for number in (1, 2)]
    for one in wanted:
        one.verify = True
    first, second = (await two.there.append(admission(*wanted, key="k"))).entries
    call = UnaryWaiter(2, account())
    await two.remote.join(call, [1, 2])
    for entry in (first, second):
        await two.there.append(completed(entry))
    await two.there.append(audit(first, types_pb2.COMPARISON_KIND_VERIFY))
    await asyncio.sleep(0)
    two.store.open(writer="there")
    results = await told(call)

    assert [result.comparison.verdict for result in results] == [types_pb2.VERDICT_MATCH, types_pb2.VERDICT_UNSPECIFIED]
    assert [bool(result.comparison.status.code) for result in results] == [False, True]


async def test_followers_see_other_writers(two: Two) -> None:
    """A follower is woken by another writer's entry, misses none and sees none twice."""
    (head, seen) = await two.here.head(), list[int]()

    async def follow() -> None:
        index = head.index + 1
        while len(seen) < 30:
            await two.here.wait(index)
            page = await two.here.entries(index, 7, payloads=False)
            seen.extend(entry.header.index for entry in page)
            index += len(page)

    following = asyncio.create_task(follow())
    for number in range(15):
        for journal in (two.there, two.here):
            await journal.append(admission(item(number + 1)))
            await journal.append(Note("n", b"no entry"))
    await asyncio.wait_for(following, 10)

    assert seen == list(range(head.index + 1, head.index + 31))


async def test_an_answer_that_is_not_kept(postgres: Postgres) -> None:
    """Where the payload of the outcome was dropped, every call that waits for the item ends with PAYLOAD_PRUNED, and a call
    that waits for another item is still told."""
    store = PostgresKit(postgres.url(postgres.schema()), settings=StoreSettings(digests_only=True))
    async with opened(store) as two:
        (first,) = (await two.there.append(admission(item(1)))).entries  # without a key: dropped with its outcome
        (second,) = (await two.there.append(admission(item(2), key="k"))).entries
        calls = [UnaryWaiter(1, account()), UnaryWaiter(1, account()), UnaryWaiter(1, account()), UnaryWaiter(1, account())]
        sequences = (1, 1, 2, 1)
        for call, sequence in zip(calls, sequences, strict=True):
            call.sequences = range(sequence, sequence + 1)
        for call in calls[:3]:
            await two.remote.join(call, call.sequences)
        await two.there.append(completed(first))
        for call in calls[:2]:
            with pytest.raises(errors.PayloadPruned):
                await told(call)
        await two.remote.join(calls[3], [1])
        with pytest.raises(errors.PayloadPruned):
            await told(calls[3])
        await two.there.append(completed(second))
        assert [result.sequence for result in await told(calls[2])] == [2]


async def test_a_follower_that_fails(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the task that follows the journal reaches the task that supervises it, and is not lost."""
    await two.admitted(1)
    await two.remote.join(UnaryWaiter(1, account()), [1])

    async def entries(index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        raise ZeroDivisionError

    monkeypatch.setattr(two.here, "entries", entries)
    await two.there.append(Note("n", b"no entry"))
    await two.there.append(admission(item(2)))
    await asyncio.wait(two.tasks, timeout=10)

    (task,) = two.tasks
    assert isinstance(task.exception(), ZeroDivisionError)
