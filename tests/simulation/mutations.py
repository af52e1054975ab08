"""Faults in the product, and the promise that each breaks. A checker that misses its faults proves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from msgspec import structs

from ostinato.resume import Progress
from ostinato.v1 import generation_pb2, types_pb2

from service.stream import Stream
from sidecar import answers, api, pipeline
from sidecar.answers import stamp_of
from sidecar.core import events as ev
from sidecar.core import sequencer
from sidecar.core.sequencer import Item, Sequencer
from sidecar.core.window import Window
from sidecar.journal import sqlite
from sidecar.journal.ledger import Known, Ledger, needs
from sidecar.journal.model import Admission, Appended, Binding, Draft, ItemEntries, Outcome
from sidecar.journal.sqlite import SqliteTables
from sidecar.journal.writer import Journal
from sidecar.pipeline import PendingAdmission, Pipeline
from tests.simulation.plan import plan_of
from tests.simulation.promises import PROMISES
from tests.simulation.stores import SECRET
from tests.simulation.world import simulate

Patch = Callable[[], AbstractContextManager[Any]]
Real = Callable[..., Any]
"""What a fault stands in place of."""


@dataclass(frozen=True, slots=True)
class Mutation:
    promise: int
    name: str
    patch: Patch
    file: bool
    """Whether it is one of the file's, not of a log that many share."""


PATIENCE_SECONDS = 60.0
"""Of a world with a fault in it: most that do not end by then never do."""

MUTATIONS: list[Mutation] = []


def breaks(promise: int, *, file: bool = False) -> Callable[[Patch], Patch]:
    """The mutation that this context manager is, by its name."""

    def register(patch: Patch) -> Patch:
        MUTATIONS.append(Mutation(promise, patch.__name__, patch, file))
        return patch

    return register


def fault(promise: int, owner: object, name: str, *, file: bool = False) -> Callable[[Real], None]:
    """The mutation that this function is in place of the owner's, which it is given as its first argument."""

    def register(faulty: Real) -> None:
        def patch() -> AbstractContextManager[Any]:
            real = getattr(owner, name)
            return instead(owner, name, lambda *given, **more: faulty(real, *given, **more))

        MUTATIONS.append(Mutation(promise, faulty.__name__, patch, file))

    return register


def caught(mutation: Mutation, most: int) -> int | None:
    """The first seed, of at most `most`, in which the checker of its promise finds it."""
    # Every fourth seed is one of a file.
    seeds = [seed for seed in range(4 * most) if (seed % 4 == 0) == mutation.file][:most]
    with mutation.patch():
        for seed in seeds:
            plan = replace(plan_of(seed), settle_seconds=PATIENCE_SECONDS)
            if any(PROMISES[mutation.promise](simulate(plan))):
                return seed
    return None


def instead(owner: object, name: str, stand_in: object) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, stand_in)


# ---- 1: numbers


@fault(1, Ledger, "open")
def a_number_is_used_again_after_a_restart(open_: Real, self: Ledger, version: str) -> Any:
    """The first number of a new epoch is the last of the one before."""
    self.head = structs.replace(self.head, last_sequence=max(0, self.head.last_sequence - 1))
    return open_(self, version)


@fault(1, Ledger, "_admit")
def a_gap_behind_every_batch(admit: Real, self: Ledger, admission: Admission) -> Any:
    """A batch of two burns a third number."""
    made = admit(self, admission)
    if len(admission.items) == 2 and made.entries:
        self.head = structs.replace(self.head, last_sequence=self.head.last_sequence + 1)
    return made


# ---- 2: refusals and outcomes


@fault(2, Pipeline, "_perform")
def a_refusal_that_burns_numbers(perform: Real, self: Pipeline, effect: ev.Effect) -> None:
    """What is refused is appended all the same."""
    if isinstance(effect, ev.Refuse):
        self.spawn(_append(self, self._pending[effect.batch_id].admission))
    perform(self, effect)


async def _append(pipeline: Pipeline, admission: Admission) -> None:
    await pipeline.journal.append(admission)


@fault(2, Pipeline, "_record")
def a_lost_outcome(record: Real, self: Pipeline) -> None:
    """Every failure is forgotten where it should become durable."""
    self._ends = [end for end in self._ends if end.error is None]
    if self._ends:
        record(self)


@breaks(2)
@contextmanager
def two_outcomes() -> Iterator[None]:
    """Every outcome is appended twice, and the ledger takes both."""
    append, end = Journal.append, Ledger._end

    def twice(self: Journal, draft: Draft) -> asyncio.Future[Appended]:
        if isinstance(draft, Outcome):
            _ = append(self, draft)
        return append(self, draft)

    def any_(self: Ledger, outcome: Outcome) -> Appended:
        self._unfinished.add(outcome.admitted.sequence)
        return end(self, outcome)

    with instead(Journal, "append", twice), instead(Ledger, "_end", any_):
        yield


@fault(2, Sequencer, "refusal")
def admitted_while_it_drains(refusal: Real, self: Sequencer, admit: ev.Admit, queued: int) -> Any:
    """A sidecar that was told to stop goes on taking work."""
    draining, self.draining = self.draining, False
    error = refusal(self, admit, queued)
    self.draining = draining
    return error


@fault(2, Progress, "restart")
def a_stream_that_starts_over_unsaid(_: Real, self: Progress, attempt: int) -> None:
    """A second attempt's tokens are sent behind those of the first."""
    self.attempt, self._seen, self.sent = attempt, 0, []


@fault(2, answers.StreamWaiter, "result")
def a_stream_that_ends_too_early(result_: Real, self: answers.StreamWaiter, result: types_pb2.Result) -> None:
    """A streamed failure is counted and not sent."""
    result_(self, result)
    if not result.HasField("output"):
        self._events.pop()


@breaks(2)
@contextmanager
def an_answer_to_a_caller_out_of_reach_is_lost() -> Iterator[None]:
    """What is answered while the path to its caller is cut is never sent, also not when the path is healed."""
    servicer = api.GenerationServicer
    answer, stream = servicer.answer, servicer.stream

    async def lost_if_cut(context: Any) -> None:
        network, path = context._call.network, context._call.path
        if network.is_cut(path):
            await asyncio.Future()  # until the connection breaks or the deadline passes

    async def unary(self: Any, request: Any, context: Any, account: Any) -> bytes | None:
        response = await answer(self, request, context, account)
        await lost_if_cut(context)
        return response

    async def streamed(self: Any, request: Any, context: Any, account: Any) -> None:
        write = context.write

        async def unless_cut(data: bytes) -> None:
            if generation_pb2.GenerateEvent.FromString(data).WhichOneof("event") in ("finished", "failed"):
                await lost_if_cut(context)
            await write(data)

        context.write = unless_cut
        await stream(self, request, context, account)

    with instead(servicer, "answer", unary), instead(servicer, "stream", streamed):
        yield


# ---- 3: real time


@breaks(3)
def numbers_from_a_pool() -> AbstractContextManager[Any]:
    """Single items take the number after the next, and the next single item the one that was left."""
    admit, left = Ledger._admit, list[int]()

    def admitted(self: Ledger, admission: Admission) -> Appended:
        last = self.head.last_sequence
        if len(admission.items) > 1 or (admission.tenant, admission.key) in self._bindings:
            return admit(self, admission)
        if left:
            self.head = structs.replace(self.head, last_sequence=left.pop() - 1)
            made = admit(self, admission)
            self.head = structs.replace(self.head, last_sequence=last)
            return made
        left.append(last + 1)
        self.head = structs.replace(self.head, last_sequence=last + 1)
        return admit(self, admission)

    return instead(Ledger, "_admit", admitted)


# ---- 4: submission


def unchecked_submit(core: Sequencer, item: Item, window: Window, now: float) -> None:
    """Submit the item, whatever else waits: past the assertions of order, which would find the fault first."""
    core._newest_submitted = 0
    waiting = core.waiting
    core.waiting = {item.sequence: waiting.pop(item.sequence)}
    item.blocks = window.need(item.need.kv_tokens)
    core._submit(item, window, now)
    core.waiting = waiting


@fault(4, Sequencer, "_submit_what_fits")
def the_newest_first(_: Real, self: Sequencer, window: Window, now: float) -> None:
    """What came last is submitted first."""
    while self.waiting:
        item = list(self.waiting.values())[-1]
        if not window.fits(window.need(item.need.kv_tokens)):
            return
        unchecked_submit(self, item, window, now)


@fault(4, Sequencer, "_submit_what_fits")
def a_small_one_overtakes(_: Real, self: Sequencer, window: Window, now: float) -> None:
    """Whatever fits is submitted, though the head has to wait."""
    for item in list(self.waiting.values()):
        if window.fits(window.need(item.need.kv_tokens)):
            unchecked_submit(self, item, window, now)


@breaks(4)
@contextmanager
def a_lost_engine_goes_ahead_of_a_takeover() -> Iterator[None]:
    """What waits again after a loss is put in front, though older items were taken over meanwhile; and nothing asserts."""

    def wait(self: Sequencer, items: Sequence[Item]) -> None:
        lost = self.window is None and any(item.run_id for item in items)
        new = {item.sequence: item for item in items}
        self.items |= new
        self.waiting = {**new, **self.waiting} if lost else dict(sorted({**self.waiting, **new}.items()))

    def submit(self: Sequencer, window: Window, now: float) -> None:
        while self.waiting:
            head = next(iter(self.waiting.values()))
            head.blocks = window.need(head.need.kv_tokens)
            if (error := sequencer.unfit(head, window)) is not None:
                self._end(head, error)
            elif window.fits(head.blocks, exclusive=head.quarantined):
                unchecked_submit(self, head, window, now)
            else:
                return

    with instead(Sequencer, "_wait", wait), instead(Sequencer, "_submit_what_fits", submit):
        yield


@breaks(4)
@contextmanager
def more_than_the_engine_holds() -> Iterator[None]:
    """Room is not counted, and nothing asserts."""

    def take(self: Window, blocks: int, *, exclusive: bool = False) -> None:
        self.runs, self.blocks = self.runs + 1, self.blocks + blocks

    with instead(Window, "fits", lambda *_, **__: True), instead(Window, "take", take):
        yield


# ---- 5: epochs


@fault(5, Stream, "replace")
def the_replaced_stream_goes_on(_: Real, self: Stream, epoch: int) -> None:
    """The service takes a newer sidecar in and leaves the older one's stream as it is."""


@breaks(5, file=True)
@contextmanager
def epochs_stand_still() -> Iterator[None]:
    """A restarted sidecar takes itself for the one before, and does not compare its epoch with the entries."""

    def begin(self: SqliteTables, new_log_id: str, writer: str) -> tuple[str, str, int]:
        self._db.execute("INSERT OR IGNORE INTO journal VALUES (1, ?, ?, 1, 0, NULL)", (new_log_id, writer))
        log_id, owner, epoch = self._db.execute("SELECT log_id, writer, epoch FROM journal").get
        return log_id, owner, epoch

    with instead(SqliteTables, "begin_epoch", begin), mock.patch("sidecar.journal.sqlite.check_recent"):
        yield


# ---- 6: keys


@breaks(6)
@contextmanager
def keys_are_forgotten() -> Iterator[None]:
    """Neither the journal nor the ledger remembers what a key is bound to."""
    init = Ledger.__init__

    def made(self: Ledger, head: Any, known: Known, *rest: Any) -> None:
        init(self, head, replace(known, bindings={}), *rest)

    async def unbound(self: Journal, tenant: str, key: str) -> Binding | None:
        return None

    with instead(Ledger, "__init__", made), instead(Journal, "binding", unbound):
        yield


@fault(6, Pipeline, "_join")
async def any_request_may_use_a_key(join: Real, self: Pipeline, request: Any, binding: Binding, waiter: Any) -> Any:
    """The request that comes with a bound key is not compared with the one that bound it."""
    return await join(self, request, replace(binding, request_digest=b""), waiter)


@fault(6, pipeline, "answer_of")
def another_answer_the_second_time(answer_of: Real, entries: ItemEntries) -> types_pb2.Result:
    """A recorded answer comes back with another attempt in it."""
    result: types_pb2.Result = answer_of(entries)
    result.timing.total_micros += 1
    return result


# ---- 7: what was acknowledged


@fault(7, Pipeline, "_number")
def numbers_are_told_too_early(number: Real, self: Pipeline, batch: PendingAdmission) -> None:
    """A batch is acknowledged with the numbers that it will have, once it is durable."""
    if not batch.admission.key:
        guess = Ledger(self.journal._store.head, Known(), 0, SECRET).append(batch.admission)
        batch.settle(stamp_of(guess.entries[0].header))
    number(self, batch)


@breaks(7, file=True)
def answers_before_they_are_durable() -> AbstractContextManager[Any]:
    """The journal answers, and commits with the next group."""
    append_many = sqlite.SqliteStore.append_many
    held: dict[int, list[Draft]] = {}

    def later(self: Any, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        before, outcomes = held.pop(id(self), []), [draft for draft in drafts if isinstance(draft, Outcome)]
        if len(outcomes) < len(drafts):
            return append_many(self, [*before, *drafts], now_millis)[len(before) :]
        append_many(self, before, now_millis)
        held[id(self)] = list(drafts)
        known = self._tables.look_up(needs(drafts, SECRET), now_millis)()
        ledger = Ledger(self.head, known, now_millis, SECRET)
        return [ledger.append(draft) for draft in drafts]

    return instead(sqlite.SqliteStore, "append_many", later)


@fault(7, sqlite, "connect", file=True)
def the_disk_is_not_synced(connect: Real, *arguments: Any) -> Any:
    """Commits are left to the operating system."""
    db = connect(*arguments)
    db.pragma("synchronous", "OFF")
    return db


@fault(7, Sequencer, "_recovered")
def what_has_no_key_runs_again(recovered: Real, self: Sequencer, event: ev.Recovered) -> None:
    """Recovery takes up everything."""
    recovered(self, structs.replace(event, keyed=True))


@fault(7, Sequencer, "_recovered")
def recovery_counts_from_one(recovered: Real, self: Sequencer, event: ev.Recovered) -> None:
    """What is taken up in a later epoch is called the first attempt again."""
    recovered(self, structs.replace(event, attempt=1))


@fault(7, Sequencer, "_recovered")
def recovery_takes_up_nothing(recovered: Real, self: Sequencer, event: ev.Recovered) -> None:
    """What has a key is abandoned too."""
    recovered(self, structs.replace(event, keyed=False))
