"""Faults in the product, and the promise that each breaks. A checker that misses its faults proves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import apsw
from msgspec import structs

from ostinato import errors
from ostinato.digest import request_digest
from ostinato.resume import Progress
from ostinato.v1 import generation_pb2, types_pb2

from service.stream import Stream
from sidecar import answers, api, pipeline, streaming
from sidecar.answers import stamp_of
from sidecar.core import events as ev
from sidecar.core import sequencer
from sidecar.core.sequencer import Item, Sequencer
from sidecar.core.window import Window
from sidecar.journal import sqlite
from sidecar.journal.ledger import Known, Ledger, needs
from sidecar.journal.model import Admission, Appended, Binding, Draft, ItemEntries, Outcome, Sealed
from sidecar.journal.sqlite import SqliteTables
from sidecar.journal.writer import Journal
from sidecar.pipeline import PendingAdmission, Pipeline
from tests.simulation.plan import plan_of
from tests.simulation.promises import PROMISES
from tests.simulation.stores import SECRET
from tests.simulation.world import simulate

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One fault."""

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


@breaks(1)
def a_number_is_used_again_after_a_restart() -> AbstractContextManager[Any]:
    """The first number of a new epoch is the last of the one before."""
    open_ = Ledger.open

    def opened(self: Ledger, version: str) -> Sealed:
        self.head = structs.replace(self.head, last_sequence=max(0, self.head.last_sequence - 1))
        return open_(self, version)

    return instead(Ledger, "open", opened)


@breaks(1)
def a_gap_behind_every_batch() -> AbstractContextManager[Any]:
    """A batch of two burns a third number."""
    admit = Ledger._admit

    def admitted(self: Ledger, admission: Admission) -> Appended:
        made = admit(self, admission)
        if len(admission.items) == 2 and made.entries:
            self.head = structs.replace(self.head, last_sequence=self.head.last_sequence + 1)
        return made

    return instead(Ledger, "_admit", admitted)


# ---- 2: refusals and outcomes


@breaks(2)
def a_refusal_that_burns_numbers() -> AbstractContextManager[Any]:
    """What is refused is appended all the same."""
    perform = Pipeline._perform

    async def append(self: Pipeline, admission: Admission) -> None:
        await self.journal.append(admission)

    def performed(self: Pipeline, effect: ev.Effect) -> None:
        if isinstance(effect, ev.Refuse):
            self.spawn(append(self, self._pending[effect.batch_id].admission))
        perform(self, effect)

    return instead(Pipeline, "_perform", performed)


@breaks(2)
def a_lost_outcome() -> AbstractContextManager[Any]:
    """Every failure is forgotten where it should become durable."""
    record = Pipeline._record

    def completed(self: Pipeline, effect: ev.End) -> None:
        if effect.error is None:
            record(self, effect)

    return instead(Pipeline, "_record", completed)


@breaks(2)
@contextmanager
def two_outcomes() -> Iterator[None]:
    """Every outcome is appended twice, and the ledger takes both."""
    append, end = Journal.append_outcomes, Ledger._end

    async def twice(self: Journal, outcomes: Sequence[Outcome]) -> list[Appended]:
        await append(self, outcomes)
        return await append(self, outcomes)

    def any_(self: Ledger, outcome: Outcome) -> Appended:
        self._unfinished.add(outcome.admitted.sequence)
        return end(self, outcome)

    with instead(Journal, "append_outcomes", twice), instead(Ledger, "_end", any_):
        yield


@breaks(2)
@contextmanager
def admitted_while_it_drains() -> Iterator[None]:
    """A sidecar that was told to stop goes on taking work."""

    refusal = Sequencer.refusal

    def admitting(self: Sequencer, admit: ev.Admit, queued: int) -> errors.OstinatoError | None:
        draining, self.draining = self.draining, False
        error = refusal(self, admit, queued)
        self.draining = draining
        return error

    with instead(Sequencer, "refusal", admitting):
        yield


@breaks(2)
def a_stream_that_starts_over_unsaid() -> AbstractContextManager[Any]:
    """A second attempt's tokens are sent behind those of the first."""

    def restart(self: Progress, attempt: int) -> None:
        self.attempt, self._seen, self.sent = attempt, 0, []

    return instead(Progress, "restart", restart)


@breaks(2)
def a_stream_that_ends_too_early() -> AbstractContextManager[Any]:
    """A streamed failure is counted and not sent."""
    result_ = streaming.StreamWaiter.result

    def result(self: streaming.StreamWaiter, result: types_pb2.Result) -> None:
        result_(self, result)
        if not result.HasField("output"):
            self._events.pop()

    return instead(streaming.StreamWaiter, "result", result)


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


@breaks(4)
def the_newest_first() -> AbstractContextManager[Any]:
    """What came last is submitted first."""

    def submit(self: Sequencer, window: Window, now: float) -> None:
        while self.waiting:
            item = list(self.waiting.values())[-1]
            if not window.fits(window.need(item.need.kv_tokens)):
                return
            unchecked_submit(self, item, window, now)

    return instead(Sequencer, "_submit_what_fits", submit)


@breaks(4)
def a_small_one_overtakes() -> AbstractContextManager[Any]:
    """Whatever fits is submitted, though the head has to wait."""

    def submit(self: Sequencer, window: Window, now: float) -> None:
        for item in list(self.waiting.values()):
            if window.fits(window.need(item.need.kv_tokens)):
                unchecked_submit(self, item, window, now)

    return instead(Sequencer, "_submit_what_fits", submit)


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


@breaks(5)
def the_replaced_stream_goes_on() -> AbstractContextManager[Any]:
    """The service takes a newer sidecar in and leaves the older one's stream as it is."""
    return instead(Stream, "replace", lambda self, epoch: None)


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


@breaks(6)
def any_request_may_use_a_key() -> AbstractContextManager[Any]:
    """The request that comes with a bound key is not compared with the one that bound it."""
    join = Pipeline._join

    async def joined(self: Pipeline, request: Any, binding: Binding, waiter: Any) -> types_pb2.Stamp:
        return await join(self, request, replace(binding, request_digest=request_digest(request)), waiter)

    return instead(Pipeline, "_join", joined)


@breaks(6)
def another_answer_the_second_time() -> AbstractContextManager[Any]:
    """A recorded answer comes back with another attempt in it."""

    def changed(entries: ItemEntries) -> types_pb2.Result:
        result = answers.answer_of(entries)
        result.timing.total_micros += 1
        return result

    return instead(pipeline, "answer_of", changed)


# ---- 7: what was acknowledged


@breaks(7)
def numbers_are_told_too_early() -> AbstractContextManager[Any]:
    """A batch is acknowledged with the numbers that it will have, once it is durable."""
    number = Pipeline._number

    async def numbered(self: Pipeline, batch: PendingAdmission) -> None:
        if not batch.admission.key:
            guess = Ledger(self.journal._store.head, Known(), 0, SECRET).append(batch.admission)
            batch.settle(stamp_of(guess.entries[0].header))
        await number(self, batch)

    return instead(Pipeline, "_number", numbered)


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


@breaks(7, file=True)
def the_disk_is_not_synced() -> AbstractContextManager[Any]:
    """Commits are left to the operating system."""
    connect = sqlite.connect

    def unsynced(*arguments: Any) -> apsw.Connection:
        db = connect(*arguments)
        db.pragma("synchronous", "OFF")
        return db

    return instead(sqlite, "connect", unsynced)


@breaks(7)
def what_has_no_key_runs_again() -> AbstractContextManager[Any]:
    """Recovery takes up everything."""
    recovered = Sequencer._recovered

    def all_of_them(self: Sequencer, event: ev.Recovered) -> None:
        recovered(self, structs.replace(event, keyed=True))

    return instead(Sequencer, "_recovered", all_of_them)


@breaks(7)
def recovery_counts_from_one() -> AbstractContextManager[Any]:
    """What is taken up in a later epoch is called the first attempt again."""
    recovered = Sequencer._recovered

    def first(self: Sequencer, event: ev.Recovered) -> None:
        recovered(self, structs.replace(event, attempt=1))

    return instead(Sequencer, "_recovered", first)


@breaks(7)
def recovery_takes_up_nothing() -> AbstractContextManager[Any]:
    """What has a key is abandoned too."""
    recovered = Sequencer._recovered

    def none(self: Sequencer, event: ev.Recovered) -> None:
        recovered(self, structs.replace(event, keyed=False))

    return instead(Sequencer, "_recovered", none)
