"""From an item's end to what its callers are told: the outcome is durable, then verified if they asked, then witnessed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.elsewhere import ended
from sidecar.journal import Audit, Journal, Outcome
from sidecar.observer import Observer
from sidecar.recheck import Rechecker, Record
from sidecar.results import answer_of, no_verdict, result_of, verification_of
from sidecar.work import Made, Work

VERIFY = types_pb2.COMPARISON_KIND_VERIFY

Witness = Callable[[Record, int], None]
"""Told of an item that completed: its record, and the most runs that the engine was seen to hold with it, itself included."""


class Outcomes:
    """One beside each Dispatcher."""

    def __init__(self, journal: Journal, observer: Observer, rechecker: Rechecker) -> None:
        self._journal, self._observer, self._rechecker = journal, observer, rechecker
        self.witnesses: list[Witness] = []

    async def append(self, work: Work, outcome: Outcome) -> types_pb2.Result:
        """The result, durable: what a later reader of the journal derives too. Raises JournalBroken."""
        with work.spans.item.child("journal"):
            appended = await self._journal.append(outcome)
        if not appended.entries:  # another writer's outcome came first, and is the one
            work.forgo(errors.Abandoned("another outcome came first"))
            work.spans.item.end()
            return answer_of(await ended(self._journal, work.sequence))
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

    async def _verify(self, record: Record, second: asyncio.Future[Made]) -> types_pb2.Comparison:
        sequence = record.completed.sequence
        try:
            entry = (await self._rechecker.check(record, VERIFY, second)).entry
        except errors.OstinatoError as error:
            entry = await self._rechecker.record(
                Audit(record.admitted, no_verdict(sequence, VERIFY, error), grade=record.completed.grade)
            )
        return verification_of(sequence, entry)
