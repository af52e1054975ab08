"""From an item's end to what its callers are told: the outcome is durable, then verified if they asked, then witnessed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.collisions import Collisions
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.elsewhere import ended
from sidecar.journal.model import Appended, Audit
from sidecar.journal.writer import Journal
from sidecar.observer import Observer
from sidecar.rerun import Rechecker, Record
from sidecar.results import answer_or_header, no_verdict, result_of, verification_of
from sidecar.work import RerunResult, Work

VERIFY = types_pb2.COMPARISON_KIND_VERIFY

Witness = Callable[[Record, int], None]
"""Told of an item that completed: its record, and the most runs that the engine was seen to hold with it, itself included."""


class Host(Protocol):
    """Whose items end."""

    works: dict[int, Work]
    clock: Callable[[], float]

    def tell(self, event: ev.Event) -> None: ...

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None: ...


class Outcomes:
    """One beside each Dispatcher."""

    def __init__(self, host: Host, journal: Journal, observer: Observer, rechecker: Rechecker) -> None:
        self._host, self._journal, self._observer, self._rechecker = host, journal, observer, rechecker
        self.witnesses: list[Witness] = []
        self._collisions = Collisions()
        self._ends: list[do.End] = []

    def end(self, end: do.End) -> None:
        """An item has ended. All that do in one turn of the loop become durable together, in one task."""
        self._ends.append(end)
        if len(self._ends) == 1:
            self._host.spawn(self._append())

    async def _append(self) -> None:
        ends, self._ends = self._ends, []
        works, now = [self._host.works[end.sequence] for end in ends], self._host.clock()
        outcomes = [work.outcome(end.error, end.attempt, now, self._collisions) for work, end in zip(works, ends, strict=True)]
        spans = [work.spans.item.child("journal") for work in works]
        appended = await self._journal.append_outcomes(outcomes)
        for span in spans:
            span.end()
        for work, each in zip(works, appended, strict=True):
            telling = self._tell(work, each)
            if each.entries and work.second is None and work.recovery is None:
                await telling
            else:  # there is more to wait for, and not for its neighbours
                self._host.spawn(telling)

    async def _tell(self, work: Work, appended: Appended) -> None:
        """Those who wait, and then the core."""
        result = await self._result(work, appended)
        del self._host.works[work.sequence]
        for call in work.calls:
            call.result(result)
        work.ended.set_result(result)
        if work.recovery is not None and work.output is not None:  # the answer is durable, and this is not part of it
            await self._rechecker.record(Audit(work.admitted, work.recovery, work.fingerprint_digest, work.output.grade))
        self._host.tell(ev.Ended(work.sequence))

    async def _result(self, work: Work, appended: Appended) -> types_pb2.Result:
        """What a later reader of the journal derives too, while payloads are kept. Raises JournalBroken."""
        if not appended.entries:  # another writer's outcome came first, and is the one
            work.forgo(errors.Abandoned("another outcome came first"))
            work.spans.item.end()
            return answer_or_header(await ended(self._journal, work.sequence))  # --payloads digests may have dropped it
        (sealed,) = appended.entries
        result = result_of(sealed)
        self._observer.ended(work, sealed, result)
        if work.output is not None and sealed.header.kind == types_pb2.ENTRY_KIND_COMPLETED:
            await self._judge(work, Record(work.admitted, sealed.header, work.input, work.output, work.company), result)
        else:
            work.forgo(errors.Abandoned("there is no answer to verify"))
        return result

    async def _judge(self, work: Work, record: Record, result: types_pb2.Result) -> None:
        if work.second is not None:
            result.comparison.CopyFrom(await self._verify(record, work.second))
        for witness in self.witnesses:
            witness(record, max(work.company, work.company_at_end))

    async def _verify(self, record: Record, second: asyncio.Future[RerunResult]) -> types_pb2.Comparison:
        sequence = record.completed.sequence
        try:
            entry = (await self._rechecker.check(record, VERIFY, second)).entry
        except errors.OstinatoError as error:
            entry = await self._rechecker.record(
                Audit(record.admitted, no_verdict(sequence, VERIFY, error), grade=record.completed.grade)
            )
        return verification_of(sequence, entry)
