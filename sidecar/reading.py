"""The Sequencer service: the journal read, followed and run again."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from ostinato import errors
from ostinato.v1 import sequencer_pb2, sequencer_pb2_grpc
from ostinato.wire import RESPONSE_BYTES_METADATA
from serving.auth import Context, caller

from sidecar.access import need_sight, visible
from sidecar.admission import check_key, response_bytes_max
from sidecar.checks import replay
from sidecar.config import Settings
from sidecar.dispatcher import Dispatcher
from sidecar.divergence.output import report
from sidecar.divergence.statistics import CONFIDENCE
from sidecar.divergence.tracker import DivergenceTracker
from sidecar.held import Held
from sidecar.journal.model import Sealed
from sidecar.results import record_of

PAGE_ENTRIES = 256
"""Read at once."""

MESSAGE_BYTES = 1 << 20
"""One message carries payloads up to about this size; a single one may be larger."""


class Places:
    """A bound on calls of one kind."""

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most, self._taken = what, most, 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Raises QueueFull if all are taken."""
        if self._taken >= self._most:
            raise errors.QueueFull(f"{self._most} {self._what} run already", retry_after=1.0)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class SequencerServicer(sequencer_pb2_grpc.SequencerServicer):
    """See sequencer.proto. Reads are served while the journal is full and while the engine is away."""

    def __init__(self, dispatcher: Dispatcher, tracker: DivergenceTracker, held: Held, settings: Settings) -> None:
        self._dispatcher = dispatcher
        self._held = held
        self._settings = settings
        self._tracker = tracker
        self._journal = dispatcher.journal
        self._followers = Places("followers", settings.followers_max)
        self._tails = Places("calls of Tail without follow", settings.tails_max)
        self._replays = Places("replays", settings.replays_max)

    async def Get(self, request: sequencer_pb2.GetRequest, context: Context) -> sequencer_pb2.GetResponse:
        match request.WhichOneof("target"):
            case "sequence":
                if request.sequence < 1:
                    raise errors.invalid("sequence", "must be at least 1")
                first, count = request.sequence, 1
            case "idempotency_key":
                check_key(request.idempotency_key)
                binding = await self._journal.binding(caller().tenant, request.idempotency_key)
                if binding is None:
                    raise errors.NotFound("this key is not bound")
                first, count = binding.first_sequence, binding.count
            case _:
                raise errors.invalid("target", "is missing")
        self._held.check()
        items = await self._journal.items(first, first + count - 1, count)
        if not items or (request.HasField("sequence") and not visible(items[0])):
            raise errors.NotFound(await self._why_not(first))
        known = self._dispatcher.fingerprints.known if request.HasField("sequence") else {}
        response = sequencer_pb2.GetResponse(items=[record_of(entries, known) for entries in items])
        size, most = response.ByteSize(), response_bytes_max(context.invocation_metadata() or (), self._settings)
        if size > most:
            what = f"the answer has {size} bytes, the client reads {most}: raise metadata {RESPONSE_BYTES_METADATA}"
            others = f", get sequences {first} to {first + count - 1} one by one, or Tail the journal" if count > 1 else ""
            raise errors.invalid(str(request.WhichOneof("target")), what + others)
        return response

    async def _why_not(self, sequence: int) -> str:
        """Why there is no item with this sequence. That it was lost is said to admins only: it may have been of any tenant."""
        newest = (await self._journal.head()).last_sequence
        # DivergenceCollector have no gaps: one up to the newest that was not admitted is in a LOST entry.
        if caller().admin and sequence <= newest and not await self._journal.items(sequence, sequence, 1):
            return f"sequence {sequence} is lost: it was given out, and the journal's end with its item was lost"
        return f"no sequence {sequence}"

    async def Tail(self, request: sequencer_pb2.TailRequest, context: Context) -> AsyncIterator[sequencer_pb2.TailResponse]:
        caller().need_admin("Tail")
        self._held.check()
        with (self._followers if request.follow else self._tails).one():
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
        if not 1 <= request.range.first <= request.range.last:
            raise errors.invalid("range", "first must be at least 1 and last at least first")
        if request.concurrency > 64:
            raise errors.invalid("concurrency", "at most 64 are allowed")
        first, newest = request.range.first, (await self._journal.head()).last_sequence
        if first > newest:
            raise errors.NotFound(f"the newest sequence is {newest}")
        self._held.check()
        last = min(request.range.last, newest)
        if self._dispatcher.engine is None:
            raise errors.EngineUnavailable("no engine is connected", retry_after=1.0)
        await need_sight(self._journal, first, last)
        concurrency = 1 if request.alone else request.concurrency or 8
        with self._replays.one():
            async for response in replay(self._dispatcher, first, last, concurrency, alone=request.alone):
                yield response

    async def Head(self, request: sequencer_pb2.HeadRequest, context: Context) -> sequencer_pb2.HeadResponse:
        caller().need_admin("Head")
        head = await self._journal.head()
        return sequencer_pb2.HeadResponse(
            log_id=head.log_id,
            writer=head.writer,
            epoch=head.epoch,
            index=head.index,
            entry_hash=head.entry_hash,
            last_sequence=head.last_sequence,
            unfinished=len(self._dispatcher.works),
        )

    async def Report(self, request: sequencer_pb2.ReportRequest, context: Context) -> sequencer_pb2.ReportResponse:
        caller().need_admin("Report")
        if not (request.confidence >= 0 and (1 + request.confidence) / 2 < 1):  # NaN is neither
            raise errors.invalid("confidence", "must be above 0 and below 1, or 0 for 0.95")
        head, known = await self._journal.head(), self._dispatcher.fingerprints.known
        response = report(self._tracker.counts, self._tracker.index, request.confidence or CONFIDENCE, known)
        response.log_id, response.writer = head.log_id, head.writer
        return response


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
