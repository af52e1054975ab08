"""Those who wait for items, and what they are answered.

A `Waiter` collects or streams the results of one call. An answer is derived from journal entries alone: a later answer equals
the first, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence

import grpc

from ostinato import enums, errors
from ostinato.chain import OUTCOMES, receipt
from ostinato.errors import Cancelled, JournalUnavailable, PayloadPruned
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2
from serving.handlers import written

from sidecar.held import COPIES, Account
from sidecar.journal.model import ItemEntries, JournalBroken, Outcome, Sealed
from sidecar.journal.writer import Journal

MESSAGE_BYTES = 1 << 16
"""A message of tokens is closed at this size. Clients read 4 MiB; gRPC keeps one message of a lost call in memory."""
PIECE_BYTES = 160
"""Memory of a waiting piece beside its bytes: Python objects."""
RUN_BYTES = 400
"""Memory of a run whose pieces wait, beside them."""
RESULTS = generation_pb2.GenerateResponse.RESULTS_FIELD_NUMBER
TOKENS, RUNS = generation_pb2.GenerateEvent.TOKENS_FIELD_NUMBER, generation_pb2.Tokens.RUNS_FIELD_NUMBER


class Waiter:
    """One call that waits for items. Told what happens to them on the event loop, and never blocks it."""

    wants_tokens = False
    batch_id = 0
    """0: the call joined items that were admitted before."""
    sequences = range(0)
    """Empty until they are known."""

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None:
        raise NotImplementedError

    def lost(self, error: errors.OstinatoError) -> None:
        """The call ends without an outcome of its items. The first error counts."""
        raise NotImplementedError

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> bytes | None:
        """The response, or None if it was written. Raises what the call is lost for. `repeated`: the key was bound before."""
        raise NotImplementedError


class UnaryWaiter(Waiter):
    """Collects the results of a whole batch, serialised, so that their size is known: they are counted in the account."""

    def __init__(self, count: int, account: Account) -> None:
        self._count, self._account = count, account
        self._results: dict[int, bytes] = {}
        """By sequence."""
        self._ended: asyncio.Future[errors.OstinatoError | None] = asyncio.get_running_loop().create_future()
        account.forget = self._forget

    def result(self, result: types_pb2.Result) -> None:
        if self._account.error is not None:
            return
        data = self._results[result.sequence] = result.SerializeToString()
        if len(self._results) == self._count and not self._ended.done():
            self._ended.set_result(None)
        self._account.add(COPIES * len(data))

    def lost(self, error: errors.OstinatoError) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    def _forget(self) -> None:
        self._results.clear()
        if not self._ended.done():
            self._ended.set_result(self._account.error)

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> bytes:
        """A serialised GenerateResponse, its results in ascending order of sequence."""
        error = await self._ended or self._account.error
        if error is not None:
            raise error
        results = [part for sequence in sorted(self._results) for part in _as_field(RESULTS, self._results[sequence])]
        return b"".join([generation_pb2.GenerateResponse(stamp=stamp).SerializeToString(), *results])


def _as_field(number: int, data: bytes) -> tuple[bytes, bytes]:
    """A serialised message as a field of a longer one, without a copy of it in between."""
    head, size = bytearray((number << 3 | 2,)), len(data)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head), data


class StreamWaiter(Waiter):
    """Writes events as its reader takes them. Tokens that wait are merged."""

    wants_tokens = True

    def __init__(self, count: int, account: Account, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._open = count
        self._events: deque[_Tokens | bytes] = deque()
        self._lost: errors.OstinatoError | None = None
        self._changed = asyncio.Event()
        self._account, self._write = account, write
        account.forget = self._forget

    def tokens(self, run: generation_pb2.TokenRun) -> None:
        if self._account.error is not None:
            return
        last = self._events[-1] if self._events else None
        if not isinstance(last, _Tokens) or last.bytes > MESSAGE_BYTES:
            last = _Tokens()
            self._put(last)
        self._account.add(last.add(run))

    def restarted(self, event: generation_pb2.Restarted) -> None:
        self._put_event(generation_pb2.GenerateEvent(restarted=event))

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        completed = result.HasField("output")
        event = generation_pb2.GenerateEvent(finished=result) if completed else generation_pb2.GenerateEvent(failed=result)
        self._put_event(event)

    def lost(self, error: errors.OstinatoError) -> None:
        self._lost = self._lost or error
        self._changed.set()

    def _put_event(self, event: generation_pb2.GenerateEvent) -> None:
        if self._account.error is None:
            data = event.SerializeToString()
            self._put(data)
            self._account.add(_held(data))

    def _put(self, event: _Tokens | bytes) -> None:
        self._events.append(event)
        self._changed.set()

    def _forget(self) -> None:
        self._events.clear()
        self._changed.set()

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> None:
        """Writes serialised events until each item has ended. Raises SlowReader, too."""
        admitted = generation_pb2.Admitted(stamp=stamp, repeated_key=repeated)
        event: bytes | None = generation_pb2.GenerateEvent(admitted=admitted).SerializeToString()
        while event is not None:
            await written(self._write(event), lost=self._account.lost)
            event = await self.next()

    async def next(self) -> bytes | None:
        """The next serialised GenerateEvent; None: every item has ended. An error comes after the events before it."""
        while not self._events and self._open and self._lost is None and self._account.error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._account.error is not None:
            raise self._account.error
        if self._events:
            event = self._events.popleft()
            self._account.add(-(event.held if isinstance(event, _Tokens) else _held(event)))
            return event.data() if isinstance(event, _Tokens) else event
        if self._lost is not None:
            raise self._lost
        return None


def _held(data: bytes) -> int:
    """Memory of a serialised event that waits."""
    return COPIES * len(data) + PIECE_BYTES


class _Tokens:
    """A message of tokens that grows while it waits: of each run its pieces, serialised. A message to whose text is appended
    would keep every earlier text."""

    def __init__(self) -> None:
        self._runs: list[list[bytes]] = []
        self._newest: dict[int, tuple[int, list[bytes]]] = {}
        """By sequence: the attempt, and its pieces."""
        self.bytes = self.held = 0
        """About its serialised size, and the memory that it takes."""

    def add(self, run: generation_pb2.TokenRun) -> int:
        """Merge it with the run that it continues, if that is of the same attempt. The memory that this takes."""
        data = run.SerializeToString()
        held = PIECE_BYTES + len(data)
        attempt, pieces = self._newest.get(run.sequence, (None, []))
        if attempt != run.attempt:
            pieces = []
            self._newest[run.sequence] = run.attempt, pieces
            self._runs.append(pieces)
            held += RUN_BYTES
        pieces.append(data)
        self.bytes += len(data)
        self.held += held
        return held

    def data(self) -> bytes:
        runs = b"".join(part for pieces in self._runs for part in _as_field(RUNS, _joined(pieces)))
        return b"".join(_as_field(TOKENS, runs))


def _joined(pieces: Sequence[bytes]) -> bytes:
    if len(pieces) == 1:
        return pieces[0]
    whole, *others = map(generation_pb2.TokenRun.FromString, pieces)
    for run in others:
        whole.token_ids.extend(run.token_ids)
        whole.logprobs.extend(run.logprobs)
    whole.text = "".join([whole.text, *(run.text for run in others)])
    return whole.SerializeToString()


class CancelWaiter(Waiter):
    """Waits for the ends of items that are cancelled on request."""

    def __init__(self, count: int) -> None:
        self._open, self._cancelled = count, 0
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._check()

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        self._cancelled += result.status.code == grpc.StatusCode.CANCELLED.value[0]
        self._check()

    def lost(self, error: errors.OstinatoError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _check(self) -> None:
        if not self._open and not self._ended.done():
            self._ended.set_result(self._cancelled)

    async def cancelled(self) -> int:
        """How many ended as CANCELLED, when all have ended."""
        return await self._ended


# ---- answers, from journal entries


ENDED_BY_KIND: Mapping[types_pb2.EntryKind.ValueType, type[errors.Ended]] = {
    types_pb2.ENTRY_KIND_CANCELLED: errors.Cancelled,
    types_pb2.ENTRY_KIND_ABANDONED: errors.Abandoned,
}
"""Kinds of outcome that one error makes. The header alone shows which."""


def outcome_kind(error: errors.OstinatoError | None) -> types_pb2.EntryKind.ValueType:
    if error is None:
        return types_pb2.ENTRY_KIND_COMPLETED
    if isinstance(error, errors.Cancelled):
        return types_pb2.ENTRY_KIND_CANCELLED
    return types_pb2.ENTRY_KIND_ABANDONED if isinstance(error, errors.Abandoned) else types_pb2.ENTRY_KIND_FAILED


def ended_payload(error: errors.OstinatoError, timing: types_pb2.Timing, nonce: bytes) -> sequencer_pb2.EndedPayload:
    code, reason = error.code.value[0], error.reason
    return sequencer_pb2.EndedPayload(code=code, reason=reason, message=error.message, timing=timing, nonce=nonce)


def result_of(outcome: Sealed) -> types_pb2.Result:
    """The result of an outcome's entry. Raises PayloadPruned."""
    header = outcome.header
    if not outcome.payload:
        raise PayloadPruned(f"the payload of sequence {header.sequence} is not kept any more")
    result = types_pb2.Result(sequence=header.sequence, attempt=header.attempt)
    if header.kind == types_pb2.ENTRY_KIND_COMPLETED:
        completed = outcome.read(sequencer_pb2.CompletedPayload)
        result.timing.CopyFrom(completed.timing)
        result.output.CopyFrom(completed.output)
        result.receipt.CopyFrom(receipt(header, outcome.previous_hash, outcome.entry_hash, completed.nonce))
        if outcome.signed is not None:
            outcome.signed.put_into(result.receipt)
    else:
        ended = outcome.read(sequencer_pb2.EndedPayload)
        result.timing.CopyFrom(ended.timing)
        error = errors.TABLE.get(ended.reason, errors.EngineFailed)(ended.message)
        result.status.CopyFrom(errors.to_status(error))
    return result


def answer_of(entries: ItemEntries) -> types_pb2.Result:
    """The result, and the verdict if one was asked for. The item must have ended. Raises PayloadPruned."""
    assert entries.outcome is not None
    result = result_of(entries.outcome)
    if result.HasField("output") and (_verify(entries) or entries.verified is not None):
        result.comparison.CopyFrom(verification_of(result.sequence, entries.verified))
    return result


def answer_or_header(entries: ItemEntries) -> types_pb2.Result:
    """As `answer_of`. If the outcome's payload was dropped, the status that its header shows: CANCELLED, ABANDONED, or
    PAYLOAD_PRUNED for the other kinds."""
    assert entries.outcome is not None
    header = entries.outcome.header
    if entries.outcome.payload:
        return answer_of(entries)
    kind = enums.word(types_pb2.EntryKind, header.kind)
    why = f"sequence {header.sequence} ended as {kind}; its payload is not kept any more"
    error = ENDED_BY_KIND.get(header.kind, PayloadPruned)(why)
    return types_pb2.Result(sequence=header.sequence, attempt=header.attempt, status=errors.to_status(error))


def is_whole(entries: ItemEntries) -> bool:
    """Whether the journal has the outcome, and the verdict if one was asked for."""
    if entries.outcome is None or entries.outcome.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        return entries.outcome is not None
    return not _verify(entries) or entries.verified is not None


def _verify(entries: ItemEntries) -> bool:
    return bool(entries.admitted.payload) and entries.admitted.read(sequencer_pb2.AdmittedPayload).verify


def verification_of(sequence: int, verified: Sealed | None) -> types_pb2.Comparison:
    """The verdict of a verification. None: the journal has none, and will not get one."""
    if verified is not None and verified.payload:
        comparison = sequencer_pb2.AuditedPayload.FromString(verified.payload).comparison
        if verified.header.form:
            comparison.ClearField("company")  # how much others ran is not for a tenant
        return comparison
    missing = errors.Abandoned("no verdict was recorded: the sidecar stopped before, or the journal was full")
    return no_verdict(sequence, types_pb2.COMPARISON_KIND_VERIFY, missing)


def no_verdict(sequence: int, kind: types_pb2.ComparisonKind.ValueType, error: errors.OstinatoError) -> types_pb2.Comparison:
    """Why there is no second output to compare."""
    return types_pb2.Comparison(sequence=sequence, kind=kind, status=errors.to_status(error))


def stamp_of(header: types_pb2.EntryHeader) -> types_pb2.Stamp:
    """The stamp of a batch, from the ADMITTED header of any of its items."""
    return types_pb2.Stamp(
        log_id=header.log_id,
        writer=header.writer,
        epoch=header.epoch,
        first_sequence=header.first_sequence,
        count=header.count,
    )


def record_of(entries: ItemEntries, fingerprints: Mapping[bytes, types_pb2.Fingerprint]) -> sequencer_pb2.ItemRecord:
    """What the journal has of an item; what was pruned is left out. `fingerprints`: by digest."""
    record = sequencer_pb2.ItemRecord(admitted=entries.admitted.header)
    if entries.admitted.payload:
        record.input.CopyFrom(entries.admitted.read(sequencer_pb2.AdmittedPayload))
    if entries.outcome is not None:
        record.outcome.CopyFrom(entries.outcome.header)
        if entries.outcome.payload:
            record.result.CopyFrom(answer_of(entries))
        if record.outcome.fingerprint_digest in fingerprints:
            record.fingerprint.CopyFrom(fingerprints[record.outcome.fingerprint_digest])
    return record


PAGE_ITEMS = 16
"""An item with all its logprobs has more than a megabyte."""


async def pages(journal: Journal, first: int, last: int) -> AsyncIterator[Sequence[ItemEntries]]:
    """The items of a range, a page at a time."""
    while first <= last and (page := await journal.items(first, last, PAGE_ITEMS)):
        yield page
        first = page[-1].admitted.header.sequence + 1


# ---- items that another sidecar of the same log runs


PAGE_ENTRIES = 256
"""Entries in one read."""
ENDS = OUTCOMES | {types_pb2.ENTRY_KIND_AUDITED}
"""Kinds of entries that may complete an answer."""
PAUSE_SECONDS = 0.2
"""Before the journal is read again, if it was unavailable."""


class RemoteWaiters:
    """Waiters for items that another sidecar runs. Follows the journal while there are any."""

    def __init__(self, journal: Journal, supervise: Callable[[asyncio.Task[None]], None]) -> None:
        """`supervise` gets the task that follows the journal. Its failure must end the process: calls would wait for ever."""
        self._journal, self._supervise = journal, supervise
        self._waiters: dict[int, list[Waiter]] = {}
        """By sequence."""
        self._following: asyncio.Task[None] | None = None

    async def join(self, waiter: Waiter, sequences: Sequence[int]) -> None:
        """Tell the waiter how these items end. They had not ended a moment ago, and another sidecar runs them."""
        for sequence in sequences:
            self._waiters.setdefault(sequence, []).append(waiter)
        try:
            head = await self._journal.head()
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow(head.index + 1))
                self._supervise(self._following)
            for entries in await self._journal.items(sequences[0], sequences[-1], sequences[-1] - sequences[0] + 1):
                self._deliver(entries, head.writer)
        except BaseException:
            self.remove(waiter)
            raise

    async def cancel(self, first: int, last: int, here: Container[int]) -> int:
        """Append a CANCELLED outcome for items first to last that have no outcome, without those of `here`.

        The number of outcomes that were appended: the other sidecar's may come first.
        """
        cancelled = 0
        while page := await self._journal.unfinished(first, last, PAGE_ENTRIES):
            appended = [
                await self._journal.append(Outcome(entry.header, types_pb2.ENTRY_KIND_CANCELLED, 1, _cancelled(entry)))
                for entry in page
                if entry.header.sequence not in here
            ]
            cancelled += sum(len(each.entries) for each in appended)
            first = page[-1].header.sequence + 1
        return cancelled

    def claim(self, sequence: int) -> list[Waiter]:
        """Remove and give the waiters for an item that this sidecar takes over."""
        return self._waiters.pop(sequence, [])

    def remove(self, waiter: Waiter) -> None:
        for sequence in waiter.sequences:
            if waiter in (waiters := self._waiters.get(sequence, [])):
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[sequence]
        if not self._waiters and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self, index: int) -> None:
        with contextlib.suppress(JournalBroken):  # the process ends, and its calls with it
            while self._waiters:
                try:
                    index = await self._read(index)
                except JournalUnavailable:
                    await asyncio.sleep(PAUSE_SECONDS)
                except errors.RecordDamaged as error:  # whether an item has ended cannot be read any more
                    for sequence in list(self._waiters):
                        self._lose(sequence, error)

    async def _read(self, index: int) -> int:
        """Await entries from this index on. The index behind them."""
        await self._journal.wait(index)
        page = await self._journal.entries(index, PAGE_ENTRIES, payloads=False)
        for header in [entry.header for entry in page]:
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                for sequence in list(self._waiters):
                    for entries in await self._journal.items(sequence, sequence, 1):
                        self._deliver(entries, header.writer)
            elif header.sequence in self._waiters and header.kind in ENDS:
                self._deliver(await ended(self._journal, header.sequence))
        return index + len(page)

    def _deliver(self, entries: ItemEntries, restarted: str = "") -> None:
        """Tell the result if it is whole. What the writer `restarted` left without a verdict will not get one."""
        sequence = entries.admitted.header.sequence
        if entries.outcome is None or sequence not in self._waiters:
            return
        if not is_whole(entries) and entries.outcome.header.writer != restarted:
            return
        try:
            answer = answer_of(entries)
        except PayloadPruned as error:  # as a later call with the same key
            self._lose(sequence, error)
            return
        for waiter in self._waiters.pop(sequence):
            waiter.result(answer)

    def _lose(self, sequence: int, error: errors.OstinatoError) -> None:
        for waiter in self._waiters.pop(sequence, ()):
            waiter.lost(error)
            self.remove(waiter)


def _cancelled(admitted: Sealed) -> sequencer_pb2.EndedPayload:
    nonce = admitted.read(sequencer_pb2.AdmittedPayload).nonce
    return ended_payload(Cancelled("cancelled on request"), types_pb2.Timing(), nonce)


async def ended(journal: Journal, sequence: int) -> ItemEntries:
    """What is recorded of an item that has ended, also if the journal is unavailable for a while."""
    while True:
        with contextlib.suppress(JournalUnavailable):
            (entries,) = await journal.items(sequence, sequence, 1)
            assert entries.outcome is not None
            return entries
        await asyncio.sleep(PAUSE_SECONDS)
