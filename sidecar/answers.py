"""Those who wait for a batch: one answer at the end, or a stream of events. What waits for a reader is kept serialised, so that
its size is known and small, and is counted in the call's account."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from typing import Protocol

from ostinato import enums, errors
from ostinato.chain import OUTCOMES, receipt
from ostinato.errors import Cancelled, JournalUnavailable, PayloadPruned
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from sidecar.held import COPIES, Account
from sidecar.journal.model import ItemEntries, JournalBroken, Outcome, Sealed
from sidecar.journal.writer import Journal

MESSAGE_BYTES = 1 << 16
"""A message of tokens that has so many is closed: a client reads 4 MiB, and of a lost call gRPC keeps the message at work."""
PIECE_BYTES = 160
"""Held beside the bytes of whatever waits: objects."""
RUN_BYTES, RUN_FACTOR = 1024, 7
"""Of a run that is not serialised: held at worst beside its bytes, and for each of them."""


class Waiter(Protocol):
    """Told what happens to its items, on the event loop; never blocks it."""

    wants_tokens: bool
    sequences: range
    """The items that it waits for; empty until they are known."""

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None: ...

    def lost(self, error: errors.OstinatoError) -> None:
        """The call is over without an outcome of its items. The first error counts."""
        ...


class UnaryWaiter:
    """Collects the results of a whole batch."""

    wants_tokens = False

    def __init__(self, count: int, account: Account) -> None:
        self.sequences = range(0)
        self._count = count
        self._results: dict[int, bytes] = {}
        """By sequence: a response with this result alone. Serialised messages one behind the other are one message."""
        self._lost: errors.OstinatoError | None = None
        self._over = asyncio.Event()
        self._account = account
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None:
        if self._account.lost.done():
            return
        data = self._results[result.sequence] = generation_pb2.GenerateResponse(results=[result]).SerializeToString()
        if len(self._results) == self._count:
            self._over.set()
        self._account.add(COPIES * len(data))

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._over.set()

    def _forget(self) -> None:
        self._results.clear()
        self.lost(self._account.error)

    async def answer(self, stamp: types_pb2.Stamp) -> bytes:
        """A serialised GenerateResponse with the results ascending, when all have ended. Raises what the call was lost for."""
        await self._over.wait()
        if self._lost is not None:
            raise self._lost
        results = [self._results[sequence] for sequence in sorted(self._results)]
        return b"".join([generation_pb2.GenerateResponse(stamp=stamp).SerializeToString(), *results])


class StreamWaiter:
    """Events that wait for a reader, serialised when they are taken."""

    wants_tokens = True

    def __init__(self, count: int, account: Account) -> None:
        self.sequences = range(0)
        self._open = count
        self._events: deque[_Tokens | _Event] = deque()
        self._lost: errors.OstinatoError | None = None
        self._something = asyncio.Event()
        self._account = account
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None:
        if self._account.lost.done():
            return
        last = self._events[-1] if self._events else None
        if not isinstance(last, _Tokens) or last.bytes > MESSAGE_BYTES:
            last = _Tokens()
            self._put(last)
        before = last.held
        last.add(run)
        self._account.change(last.held - before)

    def restarted(self, event: generation_pb2.Restarted) -> None:
        self._happened(generation_pb2.GenerateEvent(restarted=event))

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        completed = result.HasField("output")
        event = generation_pb2.GenerateEvent(finished=result) if completed else generation_pb2.GenerateEvent(failed=result)
        self._happened(event)

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._something.set()

    def _happened(self, event: generation_pb2.GenerateEvent) -> None:
        if not self._account.lost.done():
            waiting = _Event(event.SerializeToString())
            self._put(waiting)
            self._account.add(waiting.held)

    def _put(self, event: _Tokens | _Event) -> None:
        self._events.append(event)
        self._something.set()

    def _forget(self) -> None:
        self._events.clear()
        self._something.set()

    async def next(self) -> bytes | None:
        """The next GenerateEvent, serialised; None: every item has ended and was told. Raises SlowReader; and what the call was
        lost for, behind what had come before."""
        while not self._events and self._open and self._lost is None and not self._account.lost.done():
            self._something.clear()
            await self._something.wait()
        if self._account.lost.done():
            raise self._account.error
        if self._events:
            event = self._events.popleft()
            self._account.drop(event.held)
            return event.data()
        if self._lost is not None:
            raise self._lost
        return None


class _Event:
    """An event that waits as it will be written."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.held = COPIES * len(data) + PIECE_BYTES

    def data(self) -> bytes:
        return self._data


class _Run:
    """Tokens of one item and attempt: the first run as it came, which is mostly all, or else bytes, which are smaller. To
    append to a message's text in place would keep every earlier text too."""

    def __init__(self, first: generation_pb2.TokenRun) -> None:
        self.attempt = first.attempt
        self._first: generation_pb2.TokenRun | None = first
        self._size = first.ByteSize()
        self._pieces: list[bytes] = []
        self.held = RUN_BYTES + RUN_FACTOR * self._size

    def add(self, run: generation_pb2.TokenRun) -> int:
        """What continues it. Bytes."""
        self.pack()
        data = run.SerializeToString()
        self._pieces.append(data)
        self.held += PIECE_BYTES + len(data)
        return len(data)

    def pack(self) -> None:
        """It waits: to bytes."""
        if self._first is not None:
            self._pieces.append(self._first.SerializeToString())
            self._first, self.held = None, PIECE_BYTES + self._size

    def put_into(self, tokens: generation_pb2.Tokens) -> None:
        if self._first is not None:
            tokens.runs.append(self._first)
            return
        whole, *others = map(generation_pb2.TokenRun.FromString, self._pieces)
        texts = [whole.text]
        for run in others:
            whole.token_ids.extend(run.token_ids)
            whole.logprobs.extend(run.logprobs)
            texts.append(run.text)
        whole.text = "".join(texts)
        tokens.runs.append(whole)


class _Tokens:
    """A message of tokens that grows while it waits."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._newest: dict[int, _Run] = {}
        """By sequence."""
        self.bytes = self.held = 0
        """About as large as it will be, and held for it at worst."""

    def add(self, run: generation_pb2.TokenRun) -> None:
        """Into the run that it continues, if there is one of the same attempt."""
        newest = self._newest.get(run.sequence)
        if newest is None or newest.attempt != run.attempt:
            newest = self._newest[run.sequence] = _Run(run)
            self._runs.append(newest)
            self.held += newest.held
            self.bytes += run.ByteSize()
        else:
            before = newest.held
            self.bytes += newest.add(run)
            self.held += newest.held - before
        if self.bytes > MESSAGE_BYTES:
            for each in self._runs:
                each.pack()
            self.held = sum(each.held for each in self._runs)

    def data(self) -> bytes:
        event = generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens())
        for run in self._runs:
            run.put_into(event.tokens)
        return event.SerializeToString()


ENDED_BY_KIND: Mapping[types_pb2.EntryKind.ValueType, type[errors.Ended]] = {
    types_pb2.ENTRY_KIND_CANCELLED: errors.Cancelled,
    types_pb2.ENTRY_KIND_ABANDONED: errors.Abandoned,
}
"""Kinds of outcome that one error makes, so that the header alone says which."""


def outcome_kind(error: errors.OstinatoError | None) -> types_pb2.EntryKind.ValueType:
    """The kind of entry that an item's end becomes."""
    if error is None:
        return types_pb2.ENTRY_KIND_COMPLETED
    if isinstance(error, errors.Cancelled):
        return types_pb2.ENTRY_KIND_CANCELLED
    return types_pb2.ENTRY_KIND_ABANDONED if isinstance(error, errors.Abandoned) else types_pb2.ENTRY_KIND_FAILED


def ended_payload(error: errors.OstinatoError, timing: types_pb2.Timing) -> sequencer_pb2.EndedPayload:
    """What is recorded of an item without output."""
    return sequencer_pb2.EndedPayload(code=error.code.value[0], reason=error.reason, message=error.message, timing=timing)


def result_of(outcome: Sealed) -> types_pb2.Result:
    """Raises PayloadPruned where the payload was dropped."""
    header = outcome.header
    result = types_pb2.Result(sequence=header.sequence, attempt=header.attempt)
    if not outcome.payload:
        raise errors.PayloadPruned(f"the payload of sequence {header.sequence} is not kept any more")
    if header.kind == types_pb2.ENTRY_KIND_COMPLETED:
        completed = sequencer_pb2.CompletedPayload.FromString(outcome.payload)
        result.output.CopyFrom(completed.output)
        result.timing.CopyFrom(completed.timing)
        result.receipt.CopyFrom(receipt(header, outcome.previous_hash, outcome.entry_hash))
    else:
        ended = sequencer_pb2.EndedPayload.FromString(outcome.payload)
        kind = errors.TABLE.get(ended.reason, errors.EngineFailed)
        result.status.CopyFrom(errors.to_status(kind(ended.message)))
        result.timing.CopyFrom(ended.timing)
    return result


def answer_of(entries: ItemEntries) -> types_pb2.Result:
    """A result with all that belongs to it. The item must have ended. Raises PayloadPruned."""
    assert entries.outcome is not None
    result = result_of(entries.outcome)
    asked = bool(entries.admitted.payload) and sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload).verify
    if result.HasField("output") and (asked or entries.verified is not None):
        result.comparison.CopyFrom(verification_of(result.sequence, entries.verified))
    return result


def answer_or_header(entries: ItemEntries) -> types_pb2.Result:
    """As `answer_of`. Where the outcome's payload was dropped, a status that the entry's header gives: CANCELLED, ABANDONED,
    or PAYLOAD_PRUNED for the other kinds, whose reason or output only the payload had."""
    assert entries.outcome is not None
    header = entries.outcome.header
    if entries.outcome.payload:
        return answer_of(entries)
    kind = enums.word(types_pb2.EntryKind, header.kind)
    why = f"sequence {header.sequence} ended as {kind}; its payload is not kept any more"
    error = ENDED_BY_KIND.get(header.kind, errors.PayloadPruned)(why)
    return types_pb2.Result(sequence=header.sequence, attempt=header.attempt, status=errors.to_status(error))


def is_whole(entries: ItemEntries) -> bool:
    """Whether the journal has all of its answer: the outcome, and the verdict that was asked for."""
    if entries.outcome is None or entries.outcome.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        return entries.outcome is not None
    asked = bool(entries.admitted.payload) and sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload).verify
    return not asked or entries.verified is not None


def verification_of(sequence: int, verified: Sealed | None) -> types_pb2.Comparison:
    """The verdict that the client asked for; None: the journal has none, and will not get one any more."""
    if verified is not None and verified.payload:
        return sequencer_pb2.AuditedPayload.FromString(verified.payload).comparison
    missing = errors.Abandoned("no verdict was recorded: the sidecar stopped before, or the journal was full")
    return no_verdict(sequence, types_pb2.COMPARISON_KIND_VERIFY, missing)


def no_verdict(sequence: int, kind: types_pb2.ComparisonKind.ValueType, error: errors.OstinatoError) -> types_pb2.Comparison:
    """What is said where there was no second output: why."""
    return types_pb2.Comparison(sequence=sequence, kind=kind, status=errors.to_status(error))


def stamp_of(header: types_pb2.EntryHeader) -> types_pb2.Stamp:
    """Of the batch that this item belongs to, from its ADMITTED header."""
    return types_pb2.Stamp(
        log_id=header.log_id,
        writer=header.writer,
        epoch=header.epoch,
        first_sequence=header.first_sequence,
        count=header.count,
    )


def record_of(entries: ItemEntries, fingerprints: Mapping[bytes, types_pb2.Fingerprint]) -> sequencer_pb2.ItemRecord:
    """What is known of an item; what was pruned is left out. `fingerprints`: by digest."""
    record = sequencer_pb2.ItemRecord(admitted=entries.admitted.header)
    if entries.admitted.payload:
        record.input.CopyFrom(sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload))
    if entries.outcome is not None:
        record.outcome.CopyFrom(entries.outcome.header)
        if entries.outcome.payload:
            record.result.CopyFrom(answer_of(entries))
        if record.outcome.fingerprint_digest in fingerprints:
            record.fingerprint.CopyFrom(fingerprints[record.outcome.fingerprint_digest])
    return record


PAGE_ENTRIES = 256
"""Read at once."""
ENDS = OUTCOMES | {types_pb2.ENTRY_KIND_AUDITED}
"""Kinds of entries that may make an answer whole."""
PAUSE_SECONDS = 0.2
"""Before the journal is asked again, if it could not be."""


class RemoteWaiters:
    """Follows the journal while anybody waits."""

    def __init__(self, journal: Journal, supervise: Callable[[asyncio.Task[None]], None]) -> None:
        """`supervise` gets the task that follows; its failure must end the process, or calls would wait for ever."""
        self._journal, self._supervise = journal, supervise
        self._calls: dict[int, list[Waiter]] = {}
        """By sequence."""
        self._following: asyncio.Task[None] | None = None

    async def join(self, call: Waiter, sequences: Sequence[int]) -> None:
        """Tell the call how these items end, which had not ended a moment ago and are none of this sidecar's."""
        for sequence in sequences:
            self._calls.setdefault(sequence, []).append(call)
        try:
            head = await self._journal.head()
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow(head.index + 1))
                self._supervise(self._following)
            for entries in await self._journal.items(sequences[0], sequences[-1], sequences[-1] - sequences[0] + 1):
                self._tell(entries, head.writer)
        except BaseException:
            self.leave(call)
            raise

    async def cancel(self, first: int, last: int, here: Container[int]) -> int:
        """End those of these items that have not ended and are not here. How many: another's outcome may still come first."""
        cancelled = 0
        while page := await self._journal.unfinished(first, last, PAGE_ENTRIES):
            payload = ended_payload(Cancelled("cancelled on request"), types_pb2.Timing())
            appended = [
                await self._journal.append(Outcome(entry.header, types_pb2.ENTRY_KIND_CANCELLED, 1, payload))
                for entry in page
                if entry.header.sequence not in here
            ]
            cancelled += sum(len(each.entries) for each in appended)
            first = page[-1].header.sequence + 1
        return cancelled

    def claim(self, sequence: int) -> list[Waiter]:
        """Who waits for an item that is this sidecar's from now on."""
        return self._calls.pop(sequence, [])

    def leave(self, call: Waiter) -> None:
        """This call waits no more."""
        for sequence in call.sequences:
            if call in (calls := self._calls.get(sequence, [])):
                calls.remove(call)
                if not calls:
                    del self._calls[sequence]
        if not self._calls and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self, index: int) -> None:
        with contextlib.suppress(JournalBroken):  # the process ends, and its calls with it
            while self._calls:
                try:
                    index = await self._look(index)
                except JournalUnavailable:
                    await asyncio.sleep(PAUSE_SECONDS)

    async def _look(self, index: int) -> int:
        """Wait for entries from this index on; the index behind them."""
        await self._journal.wait(index)
        page = await self._journal.entries(index, PAGE_ENTRIES, payloads=False)
        for header in [entry.header for entry in page]:
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                for sequence in list(self._calls):
                    for entries in await self._journal.items(sequence, sequence, 1):
                        self._tell(entries, header.writer)
            elif header.sequence in self._calls and header.kind in ENDS:
                self._tell(await ended(self._journal, header.sequence))
        return index + len(page)

    def _tell(self, entries: ItemEntries, over: str = "") -> None:
        """If the answer is whole. What the writer `over` has left without a verdict will not get one any more."""
        sequence = entries.admitted.header.sequence
        if entries.outcome is None or sequence not in self._calls:
            return
        if not is_whole(entries) and entries.outcome.header.writer != over:
            return
        try:
            answer = answer_of(entries)
        except PayloadPruned as error:  # as a later call with the same key
            for call in self._calls.pop(sequence):
                call.lost(error)
                self.leave(call)
            return
        for call in self._calls.pop(sequence):
            call.result(answer)


async def ended(journal: Journal, sequence: int) -> ItemEntries:
    """What is recorded of an item that has ended, however long the journal is away."""
    while True:
        with contextlib.suppress(JournalUnavailable):
            (entries,) = await journal.items(sequence, sequence, 1)
            assert entries.outcome is not None
            return entries
        await asyncio.sleep(PAUSE_SECONDS)


PAGE_ITEMS = 64
"""Read at once."""


async def pages(journal: Journal, first: int, last: int) -> AsyncIterator[Sequence[ItemEntries]]:
    """The items of a range, some at once."""
    while first <= last and (page := await journal.items(first, last, PAGE_ITEMS)):
        yield page
        first = page[-1].admitted.header.sequence + 1
