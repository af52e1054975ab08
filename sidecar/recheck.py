"""A completed item, run again from its record and compared with it: what audits, replays and all other second runs share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from ostinato import enums, errors
from ostinato.compare import Side, compare
from ostinato.digest import input_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.fingerprints import Fingerprints
from sidecar.journal import Audit, ItemEntries, Journal, Sealed
from sidecar.observer import Observer
from sidecar.rerunner import Rerunner
from sidecar.sampling import sampling
from sidecar.work import Made

Kind: TypeAlias = types_pb2.ComparisonKind.ValueType


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a completed item: enough to run it again and to judge what comes out."""

    admitted: types_pb2.EntryHeader
    completed: types_pb2.EntryHeader
    input: sequencer_pb2.AdmittedPayload
    output: types_pb2.Output
    company: int = 0
    """As CompletedPayload.company."""
    canary: str = ""
    """Its name, where it is no item."""

    @classmethod
    def of(cls, entries: ItemEntries) -> Record:
        """Raises PayloadPruned. The item must have completed."""
        admitted, outcome = entries.admitted, entries.outcome
        assert outcome is not None
        assert outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED
        if not (admitted.payload and outcome.payload):
            raise errors.PayloadPruned(f"the payloads of sequence {outcome.header.sequence} are not kept any more")
        given = sequencer_pb2.AdmittedPayload.FromString(admitted.payload)
        completed = sequencer_pb2.CompletedPayload.FromString(outcome.payload)
        return cls(admitted.header, outcome.header, given, completed.output, completed.company)

    def side(self, fingerprints: Fingerprints) -> Side:
        """The recorded run."""
        fields = fingerprints.fields(self.completed.fingerprint_digest)
        return Side.recorded(self.completed, self.output, fields, self.company, sampling(self.input.parameters))


@dataclass(frozen=True, slots=True)
class Checked:
    """A verdict, and the output that was judged."""

    comparison: types_pb2.Comparison
    output: types_pb2.Output
    entry: Sealed | None
    """AUDITED; None: the journal was full."""


class Rechecker:
    """Runs records again on one engine. Their verdicts become AUDITED entries."""

    def __init__(self, reruns: Rerunner, journal: Journal, observer: Observer, fingerprints: Fingerprints) -> None:
        self._reruns, self._journal, self._observer, self._fingerprints = reruns, journal, observer, fingerprints

    def begin(
        self, given: sequencer_pb2.AdmittedPayload, sequence: int, kind: Kind, *, alone: bool = False
    ) -> asyncio.Future[Made]:
        """Ask for the second run, `alone` with nothing beside it. A future that fails, or is cancelled, gives it up."""
        purpose = enums.value(engine_pb2.Purpose, enums.word(types_pb2.ComparisonKind, kind))  # they have the same words
        return self._reruns.run(given, sequence, purpose, alone=alone)

    async def check(self, record: Record, kind: Kind, second: asyncio.Future[Made] | None = None) -> Checked:
        """The verdict on a second run, which begins now if it has not. Raises what ended it without an output: that is no
        verdict, and only counted."""
        given, sequence = record.input, record.completed.sequence
        try:
            made = await (second or self.begin(given, sequence, kind))
        except errors.OstinatoError as error:
            self._observer.not_compared(kind, error.reason)
            raise
        digest = input_digest(given.token_ids, given.parameters, given.seed)
        fields = self._fingerprints.fields(made.fingerprint_digest)
        actual = Side(made.output, digest, made.fingerprint_digest, fingerprint_fields=fields)
        comparison = compare(record.side(self._fingerprints), actual, kind, sequence)
        entry = await self.record(
            Audit(record.admitted, comparison, made.fingerprint_digest, comparison.grade, canary=record.canary)
        )
        return Checked(comparison, made.output, entry)

    async def record(self, audit: Audit) -> Sealed | None:
        """Its entry, from which it is counted; None where the journal is full, and that is counted instead."""
        try:
            return (await self._journal.append(audit)).entries[0]
        except errors.Refused as error:
            self._observer.not_compared(audit.comparison.kind, error.reason)
            return None
