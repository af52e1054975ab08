"""The public services, Generation and Sequencer: thin layers over the pipeline and the journal.

What a caller may not see does not exist for it: NOT_FOUND, never PERMISSION_DENIED.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence

from ostinato import errors
from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import generation_pb2, generation_pb2_grpc, sequencer_pb2, sequencer_pb2_grpc, types_pb2
from serving.auth import Context, caller
from serving.handlers import remaining
from serving.hop import is_short, text_cost

from sidecar.admission import check_key, response_bytes_max
from sidecar.answers import StreamWaiter, UnaryWaiter, pages, record_of
from sidecar.checks import replay
from sidecar.config import Settings
from sidecar.divergence.output import report
from sidecar.divergence.statistics import CONFIDENCE
from sidecar.divergence.tracker import DivergenceTracker
from sidecar.held import Account
from sidecar.journal.model import ItemEntries, Sealed
from sidecar.journal.writer import Journal
from sidecar.pipeline import Pipeline
from sidecar.witness import Witness

PAGE_ENTRIES = 256
"""Entries in one read."""
MESSAGE_BYTES = 1 << 20
"""One message carries payloads up to about this size. A single payload may be larger."""


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """See generation.proto."""

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self.held = pipeline.held

    # Returns bytes: results are kept serialised while they wait.
    async def Generate(  # type: ignore[override]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> bytes | None:
        with self.held.account(stream=False) as account:
            return await self.answer(request, context, account)

    # Writes by itself: an async generator cannot be closed while its reader is slow.
    async def GenerateStream(  # type: ignore[override]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        with self.held.account(stream=True) as account:
            await self.stream(request, context, account)

    def answer(
        self, request: generation_pb2.GenerateRequest, context: Context, account: Account
    ) -> Coroutine[None, None, bytes | None]:
        """Generate, for a call with this account: a serialised GenerateResponse."""
        return self._pipeline.generate(request, context, UnaryWaiter(len(request.items), account))

    def stream(
        self, request: generation_pb2.GenerateRequest, context: Context, account: Account
    ) -> Coroutine[None, None, bytes | None]:
        """GenerateStream, for a call with this account: writes serialised events. Raises SlowReader."""
        return self._pipeline.generate(request, context, StreamWaiter(len(request.items), account, context.write))

    async def Cancel(self, request: generation_pb2.CancelRequest, context: Context) -> generation_pb2.CancelResponse:
        first, last = await self._range(request)
        cancelled = await self._pipeline.cancel_items(first, last)
        return generation_pb2.CancelResponse(cancelled=cancelled, ended=last - first + 1 - cancelled)

    async def _range(self, request: generation_pb2.CancelRequest) -> tuple[int, int]:
        match request.WhichOneof("target"):
            case "range":
                first, last = ends_of(request.range)
                if (newest := await reach(self._pipeline.journal, first, last)) < last:
                    raise errors.NotFound(f"the newest sequence is {newest}")
                return first, last
            case "idempotency_key":
                header = (await items_of(self._pipeline.journal, request.idempotency_key))[0].admitted.header
                return header.first_sequence, header.first_sequence + header.count - 1
            case _:
                raise errors.invalid("target", "is missing")

    async def GetModel(self, request: generation_pb2.GetModelRequest, context: Context) -> generation_pb2.GetModelResponse:
        model = types_pb2.Model()
        model.CopyFrom(self._pipeline.connected_engine().model)
        model.limits.batch_items_max = self._settings.batch_items_max
        model.limits.idempotency_key_bytes_max = self._settings.idempotency_key_bytes_max
        model.limits.request_id_bytes_max = self._settings.request_id_bytes_max
        return generation_pb2.GetModelResponse(model=model)

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        if is_short(request):
            return await self._pipeline.link.tokenize(request, remaining(context))
        async with self._pipeline.preparing.place(caller().tenant, text_cost(request)):
            return await self._pipeline.link.tokenize(request, remaining(context))


class ConcurrencyLimit:
    """A bound on calls of one kind, of all and of each tenant."""

    def __init__(self, what: str, most: int, tenant_most: int | None = None) -> None:
        """`tenant_most`: None is no bound of its own."""
        self._what, self._most, self._tenant_most = what, most, tenant_most
        self._taken: Counter[str] = Counter()
        """By tenant."""

    @contextlib.contextmanager
    def acquired(self) -> Iterator[None]:
        """Around a call. Raises QueueFull at a bound."""
        tenant = caller().tenant
        if self._tenant_most is not None and self._taken[tenant] >= self._tenant_most:
            raise errors.QueueFull(f"{self._tenant_most} {self._what} of this tenant run already", retry_after=1.0)
        if self._taken.total() >= self._most:
            raise errors.QueueFull(f"{self._most} {self._what} run already", retry_after=1.0)
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]


class SequencerServicer(sequencer_pb2_grpc.SequencerServicer):
    """See sequencer.proto. Reads are served while the journal is full and while the engine is away."""

    def __init__(
        self, pipeline: Pipeline, tracker: DivergenceTracker, settings: Settings, witness: Witness | None = None
    ) -> None:
        self._pipeline, self._witness = pipeline, witness
        self._held = pipeline.held
        self._settings = settings
        self._tracker = tracker
        self._journal = pipeline.journal
        self._followers = ConcurrencyLimit("followers", settings.followers_max)
        self._tails = ConcurrencyLimit("calls of Tail without follow", settings.tails_max)
        self._replays = ConcurrencyLimit(
            "replays", settings.replays_max, settings.tenant_replays_max if settings.tenants else None
        )

    async def Get(self, request: sequencer_pb2.GetRequest, context: Context) -> sequencer_pb2.GetResponse:
        match request.WhichOneof("target"):
            case "sequence":
                if request.sequence < 1:
                    raise errors.invalid("sequence", "must be at least 1")
                self._held.check()
                items = await self._journal.items(request.sequence, request.sequence, 1)
                if not items or not visible(items[0]):
                    raise errors.NotFound(await self._why_not(request.sequence))
            case "idempotency_key":
                self._held.check()
                items = await items_of(self._journal, request.idempotency_key)
            case _:
                raise errors.invalid("target", "is missing")
        self._held.check()  # again: others that were read meanwhile may wait for their readers
        known = self._pipeline.fingerprints.known if request.HasField("sequence") else {}
        response = sequencer_pb2.GetResponse(items=[record_of(entries, known) for entries in items])
        size, most = response.ByteSize(), response_bytes_max(context.invocation_metadata() or (), self._settings)
        if size > most:
            what = f"the answer has {size} bytes, the client reads {most}: raise metadata {RESPONSE_BYTES_METADATA}"
            first, last = (items[place].admitted.header.sequence for place in (0, -1))
            others = f", get sequences {first} to {last} one by one, or Tail the journal" if last > first else ""
            raise errors.invalid(str(request.WhichOneof("target")), what + others)
        return response

    async def _why_not(self, sequence: int) -> str:
        """Why the sequence has no item. That it was lost is told to admins only: its tenant is unknown."""
        newest = (await self._journal.head()).last_sequence
        # Numbers have no gaps: one up to the newest that was not admitted is in a LOST entry.
        if caller().admin and sequence <= newest and not await self._journal.items(sequence, sequence, 1):
            return f"sequence {sequence} is lost: it was given out, and the journal's end with its item was lost"
        return f"no sequence {sequence}"

    async def Tail(self, request: sequencer_pb2.TailRequest, context: Context) -> AsyncIterator[sequencer_pb2.TailResponse]:
        caller().require_admin("Tail")
        self._held.check()
        with (self._followers if request.follow else self._tails).acquired():
            index = max(1, request.from_index)
            while True:
                page = await self._journal.entries(index, PAGE_ENTRIES, payloads=request.payloads)
                if page:
                    index = page[-1].header.index + 1
                    for entries in _messages(page):
                        yield sequencer_pb2.TailResponse(entries=entries)
                elif request.follow:
                    await self._journal.wait(index)
                else:
                    return

    async def Replay(
        self, request: sequencer_pb2.ReplayRequest, context: Context
    ) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
        if request.alone:
            caller().require_admin("Replay with alone")
        first, last = ends_of(request.range)
        if request.concurrency > 64:
            raise errors.invalid("concurrency", "at most 64 are allowed")
        self._held.check()
        last = await reach(self._journal, first, last)
        self._pipeline.connected_engine()
        concurrency = 1 if request.alone else request.concurrency or 8
        with self._replays.acquired():
            runs = replay(self._pipeline, first, last, concurrency, exclusive=request.alone, tenant=caller().tenant)
            async for response in runs:
                if not caller().admin:
                    response.comparison.ClearField("company")
                yield response

    async def Head(self, request: sequencer_pb2.HeadRequest, context: Context) -> sequencer_pb2.HeadResponse:
        caller().require_admin("Head")
        head = await self._journal.head()
        return sequencer_pb2.HeadResponse(
            log_id=head.log_id,
            writer=head.writer,
            epoch=head.epoch,
            index=head.index,
            entry_hash=head.entry_hash,
            last_sequence=head.last_sequence,
            unfinished=len(self._pipeline.items),
            signed=await self._journal.newest_signed(),
        )

    async def Report(self, request: sequencer_pb2.ReportRequest, context: Context) -> sequencer_pb2.ReportResponse:
        caller().require_admin("Report")
        if not (request.confidence >= 0 and (1 + request.confidence) / 2 < 1):  # NaN is neither
            raise errors.invalid("confidence", "must be above 0 and below 1, or 0 for 0.95")
        head, known = await self._journal.head(), self._pipeline.fingerprints.known
        response = report(self._tracker.checkpoint, request.confidence or CONFIDENCE, known)
        response.log_id, response.writer = head.log_id, head.writer
        return response

    async def Witness(self, request: sequencer_pb2.WitnessRequest, context: Context) -> sequencer_pb2.WitnessResponse:
        caller().require_admin("Witness")
        if self._witness is None:
            raise errors.NotBuilt("this sidecar witnesses no other log: it has no --witness-keys")
        return await self._witness.record(request.head)


def _messages(page: Sequence[Sealed]) -> Iterator[list[sequencer_pb2.Entry]]:
    """The page, in as many parts as every client can read."""
    entries: list[sequencer_pb2.Entry] = []
    size = 0
    for sealed in page:
        if entries and size + len(sealed.payload) > MESSAGE_BYTES:
            yield entries
            entries, size = [], 0
        entries.append(sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload))
        size += len(sealed.payload)
    yield entries


def ends_of(sequences: generation_pb2.SequenceRange) -> tuple[int, int]:
    """First and last, both included. Raises InvalidRequest for a range that is empty or begins before 1."""
    if not 1 <= sequences.first <= sequences.last:
        raise errors.invalid("range", "first must be at least 1 and last at least first")
    return sequences.first, sequences.last


async def items_of(journal: Journal, key: str) -> Sequence[ItemEntries]:
    """The batch of the caller's key. Raises NotFound if it is not bound, and RecordDamaged."""
    check_key(key)
    binding = await journal.binding(caller().tenant, key)
    if binding is None:
        raise errors.NotFound("this key is not bound")
    return await journal.batch(caller().tenant, key, binding)


def visible(item: ItemEntries) -> bool:
    """Whether the caller may see it. Without its payload the tenant is unknown, and only an admin may."""
    if not item.admitted.payload:
        return caller().admin
    return caller().may_see(item.admitted.read(sequencer_pb2.AdmittedPayload).tenant)


async def reach(journal: Journal, first: int, last: int) -> int:
    """The last sequence of the range that was given out. Raises NotFound if none was.

    For a tenant each of the range has to be its own: NotFound names the first that is not, and does not tell whether it exists.
    """
    if caller().admin:
        newest = (await journal.head()).last_sequence
        if first > newest:
            raise errors.NotFound(f"the newest sequence is {newest}")
        return min(last, newest)
    async for page in pages(journal, first, last):
        for item in page:
            if item.admitted.header.sequence != first or not visible(item):
                raise errors.NotFound(f"no sequence {first}")
            first += 1
    if first <= last:
        raise errors.NotFound(f"no sequence {first}")
    return last
