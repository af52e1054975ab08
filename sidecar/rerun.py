"""Second runs: a recorded input is run again, and the output is compared with the record.

Audits, canaries, replays and verifications share this. A second run has no sequence of its own and is never recovered. A run
without an output gives no verdict and is only counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ostinato import enums, errors, tracing
from ostinato.chain import sealed_input
from ostinato.compare import Side, compare
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.answers import no_verdict, verification_of
from sidecar.collisions import sampling_label
from sidecar.core import events as ev
from sidecar.fingerprints import Fingerprints
from sidecar.item import RerunResult, kv_tokens, submission
from sidecar.journal.model import Audit, ItemEntries, Sealed
from sidecar.journal.writer import Journal
from sidecar.observe import Observer, run_span
from sidecar.quota import JournalQuota

Kind: TypeAlias = types_pb2.ComparisonKind.ValueType
VERIFY = types_pb2.COMPARISON_KIND_VERIFY

URGENCY = {engine_pb2.PURPOSE_VERIFY: ev.Urgency.VERIFY, engine_pb2.PURPOSE_REPLAY: ev.Urgency.REPLAY}
"""Runs that a caller waits for. All others are background runs."""


@dataclass(frozen=True, slots=True)
class Record:
    """A completed item, as far as it is needed to run it again and to compare the output."""

    admitted: types_pb2.EntryHeader
    completed: types_pb2.EntryHeader
    input: sequencer_pb2.AdmittedPayload
    output: types_pb2.Output
    company: int = 0
    """As CompletedPayload.company."""
    canary: str = ""
    """The canary's name, if this is not an item but a canary."""

    @classmethod
    def of(cls, entries: ItemEntries) -> Record:
        """The record of an item that has completed. Raises PayloadPruned."""
        admitted, outcome = entries.admitted, entries.outcome
        assert outcome is not None
        assert outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED
        if not (admitted.payload and outcome.payload):
            raise errors.PayloadPruned(f"the payloads of sequence {outcome.header.sequence} are not kept any more")
        given = admitted.read(sequencer_pb2.AdmittedPayload)
        completed = outcome.read(sequencer_pb2.CompletedPayload)
        return cls(admitted.header, outcome.header, given, completed.output, completed.company)


@dataclass(frozen=True, slots=True)
class Recheck:
    """A verdict, and the output of the second run."""

    comparison: types_pb2.Comparison
    output: types_pb2.Output
    entry: Sealed | None
    """The AUDITED entry. None if the journal was full."""


@dataclass(slots=True, eq=False)
class _Rerun:
    input: sequencer_pb2.AdmittedPayload
    sequence: int
    purpose: engine_pb2.Purpose.ValueType
    result: asyncio.Future[RerunResult]
    span: tracing.Span
    fingerprint_digest: bytes = b""
    run_id: int = 0
    ended: bool = False
    """Whether the core knows that the run has ended."""

    def end(self, result: RerunResult | errors.OstinatoError) -> None:
        self.ended = True
        if self.result.done():
            return
        if isinstance(result, RerunResult):
            self.result.set_result(result)
        else:
            self.result.set_exception(result)


class Rerunner:
    """The second runs of one pipeline. `dispatch` hands an event to the core."""

    def __init__(
        self,
        dispatch: Callable[[ev.Event], None],
        journal: Journal,
        observer: Observer,
        fingerprints: Fingerprints,
        quota: JournalQuota,
    ) -> None:
        self._dispatch, self._journal, self._observer, self._fingerprints = dispatch, journal, observer, fingerprints
        self._quota = quota
        self._reruns: dict[int, _Rerun] = {}
        """By rerun id."""
        self._runs: dict[int, _Rerun] = {}
        """By run id: those in the engine."""
        self._last_id = 0

    def start(
        self,
        given: sequencer_pb2.AdmittedPayload,
        sequence: int,
        kind: Kind,
        tenant: str | None = None,
        *,
        exclusive: bool = False,
    ) -> asyncio.Future[RerunResult]:
        """Queue a second run, which `tenant` has asked for; an exclusive one has the engine to itself.

        The future fails with what ended the run without an output. To give up the run, cancel the future or set its exception.
        """
        self._last_id += 1
        rerun_id = self._last_id
        purpose = enums.value(engine_pb2.Purpose, enums.word(types_pb2.ComparisonKind, kind))  # both enums have the same words
        result: asyncio.Future[RerunResult] = asyncio.get_running_loop().create_future()
        self._reruns[rerun_id] = _Rerun(given, sequence, purpose, result, run_span(purpose, sequence))
        result.add_done_callback(lambda _: self._done(rerun_id))
        urgency = URGENCY.get(purpose, ev.Urgency.BACKGROUND)
        self._dispatch(ev.Rerun(rerun_id, kv_tokens(given), urgency, exclusive, tenant))
        return result

    def _done(self, rerun_id: int) -> None:
        rerun = self._reruns.pop(rerun_id)
        if not rerun.ended:
            self._runs.pop(rerun.run_id, None)
            self._dispatch(ev.CancelRerun(rerun_id))
        # Reads the exception, so that asyncio does not log one that no caller awaits.
        rerun.span.end(None if rerun.result.cancelled() else rerun.result.exception())

    def submission(self, run_id: int, rerun_id: int, timeout_seconds: float, fingerprint_digest: bytes) -> engine_pb2.Submit:
        """The message that starts a run on the engine with this fingerprint."""
        rerun = self._runs[run_id] = self._reruns[rerun_id]
        rerun.run_id, rerun.fingerprint_digest = run_id, fingerprint_digest
        return submission(
            rerun.input,
            timeout_seconds,
            run_id=run_id,
            purpose=rerun.purpose,
            sequence=rerun.sequence,
            attempt=1,
            stream=False,
            traceparent=rerun.span.traceparent,
        )

    def finished(self, run_id: int, output: types_pb2.Output) -> None:
        """A run has made this output. Other runs than second runs are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(RerunResult(output, rerun.fingerprint_digest))

    def failed(self, run_id: int, error: errors.OstinatoError) -> None:
        """A run has failed. Other runs than second runs are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(error)

    def lost(self, rerun_id: int, error: errors.OstinatoError) -> None:
        """The core has given up a second run."""
        if (rerun := self._reruns.get(rerun_id)) is not None:
            self._runs.pop(rerun.run_id, None)
            rerun.end(error)

    async def check(
        self, record: Record, kind: Kind, second: asyncio.Future[RerunResult] | None = None, tenant: str | None = None
    ) -> Recheck:
        """Run the record again, or await the run `second`, and append the verdict. `tenant`: who asked for it. Raises the error
        of a run without output."""
        given, sequence = record.input, record.completed.sequence
        try:
            result = await (second or self.start(given, sequence, kind))
        except errors.OstinatoError as error:
            self._observer.not_compared(kind, error.reason)
            raise
        recorded_fields = self._fingerprints.fields(record.completed.fingerprint_digest)
        label = sampling_label(given.parameters)
        expected = Side.recorded(record.completed, record.output, recorded_fields, record.company, label)
        digest = sealed_input(record.completed.form, given)
        fields = self._fingerprints.fields(result.fingerprint_digest)
        actual = Side(result.output, digest, result.fingerprint_digest, fingerprint_fields=fields)
        comparison = compare(expected, actual, kind, sequence)
        about = record.admitted, comparison, given.nonce, result.fingerprint_digest, comparison.grade
        audit = Audit(*about, canary=record.canary)
        return Recheck(comparison, result.output, await self.append(audit, tenant))

    async def verify(self, record: Record, second: asyncio.Future[RerunResult]) -> types_pb2.Comparison:
        """What the answer says of the verification that its request asked for."""
        sequence, tenant = record.completed.sequence, record.input.tenant
        try:
            entry = (await self.check(record, VERIFY, second, tenant)).entry
        except errors.OstinatoError as error:
            verdict = no_verdict(sequence, VERIFY, error)
            entry = await self.append(Audit(record.admitted, verdict, record.input.nonce, grade=record.completed.grade), tenant)
        return verification_of(sequence, entry)

    async def append(self, audit: Audit, tenant: str | None = None) -> Sealed | None:
        """Append the entry from which a verdict is counted. `tenant`: who asked for it. None if the journal is full; that is
        counted instead."""
        try:
            entries = (await self._journal.append(audit)).entries
            if tenant is not None:
                self._quota.add(tenant, entries)
            return entries[0]
        except errors.Refused as error:
            self._observer.not_compared(audit.comparison.kind, error.reason)
            return None
