"""Runs of recorded inputs, and their comparison with the record."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ostinato import enums, errors, tracing
from ostinato.compare import Side, compare
from ostinato.digest import input_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.collisions import sampling_label
from sidecar.core import events as ev
from sidecar.fingerprints import Fingerprints
from sidecar.item import RerunResult, kv_tokens, run_span, submission
from sidecar.journal.model import Audit, ItemEntries, Sealed
from sidecar.journal.writer import Journal
from sidecar.observe import Observer

URGENCY = {engine_pb2.PURPOSE_VERIFY: ev.Urgency.VERIFY, engine_pb2.PURPOSE_REPLAY: ev.Urgency.REPLAY}
"""Of what somebody waits for; the rest is background."""


class EventSink(Protocol):
    """Where events for the core go."""

    engine: engine_pb2.DescribeResponse | None

    def dispatch(self, event: ev.Event) -> None: ...


@dataclass(slots=True, eq=False)
class _Rerun:
    payload: sequencer_pb2.AdmittedPayload
    sequence: int
    purpose: engine_pb2.Purpose.ValueType
    made: asyncio.Future[RerunResult]
    span: tracing.Span
    fingerprint_digest: bytes = b""
    run_id: int = 0
    over: bool = False
    """Whether the core knows that it has ended."""

    def end(self, result: RerunResult | errors.OstinatoError) -> None:
        self.over = True
        if self.made.done():
            return
        if isinstance(result, RerunResult):
            self.made.set_result(result)
        else:
            self.made.set_exception(result)


class Rerunner:
    """Keeps the futures of second runs. One beside each core."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._reruns: dict[int, _Rerun] = {}
        self._runs: dict[int, _Rerun] = {}
        self._last_id = 0

    def run(
        self,
        payload: sequencer_pb2.AdmittedPayload,
        sequence: int,
        purpose: engine_pb2.Purpose.ValueType,
        *,
        alone: bool = False,
    ) -> asyncio.Future[RerunResult]:
        """Asks for room, `alone` for all of it, at once. The future fails with what ended the run without an output; whoever
        does not want it any more cancels it, or makes it fail."""
        self._last_id += 1
        rerun_id = self._last_id
        made: asyncio.Future[RerunResult] = asyncio.get_running_loop().create_future()
        self._reruns[rerun_id] = _Rerun(payload, sequence, purpose, made, run_span(purpose, sequence))
        made.add_done_callback(lambda _: self._done(rerun_id))
        self._sink.dispatch(ev.Rerun(rerun_id, kv_tokens(payload), URGENCY.get(purpose, ev.Urgency.BACKGROUND), alone))
        return made

    def _done(self, rerun_id: int) -> None:
        rerun = self._reruns.pop(rerun_id)
        if not rerun.over:
            self._runs.pop(rerun.run_id, None)
            self._sink.dispatch(ev.CancelRerun(rerun_id))
        rerun.span.end(None if rerun.made.cancelled() else rerun.made.exception())  # seen, even if nobody waits

    def submission(self, run_id: int, rerun_id: int, timeout_seconds: float) -> engine_pb2.Submit:
        """The core found room: the message that starts it."""
        rerun = self._runs[run_id] = self._reruns[rerun_id]
        rerun.run_id = run_id
        if self._sink.engine is not None:
            rerun.fingerprint_digest = self._sink.engine.model.fingerprint.digest
        return submission(
            rerun.payload,
            run_id=run_id,
            purpose=rerun.purpose,
            sequence=rerun.sequence,
            attempt=1,
            stream=False,
            timeout_seconds=timeout_seconds,
            traceparent=rerun.span.traceparent,
        )

    def finished(self, run_id: int, output: types_pb2.Output) -> None:
        """The run made this; runs that are none of ours are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(RerunResult(output, rerun.fingerprint_digest))

    def failed(self, run_id: int, error: errors.OstinatoError) -> None:
        """The run ended without; runs that are none of ours are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(error)

    def lost(self, rerun_id: int, error: errors.OstinatoError) -> None:
        """The core gave it up."""
        if (rerun := self._reruns.get(rerun_id)) is not None:
            self._runs.pop(rerun.run_id, None)
            rerun.end(error)


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
        return Side.recorded(self.completed, self.output, fields, self.company, sampling_label(self.input.parameters))


@dataclass(frozen=True, slots=True)
class RecheckResult:
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
    ) -> asyncio.Future[RerunResult]:
        """Ask for the second run, `alone` with nothing beside it. A future that fails, or is cancelled, gives it up."""
        purpose = enums.value(engine_pb2.Purpose, enums.word(types_pb2.ComparisonKind, kind))  # they have the same words
        return self._reruns.run(given, sequence, purpose, alone=alone)

    async def check(self, record: Record, kind: Kind, second: asyncio.Future[RerunResult] | None = None) -> RecheckResult:
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
        return RecheckResult(comparison, made.output, entry)

    async def record(self, audit: Audit) -> Sealed | None:
        """Its entry, from which it is counted; None where the journal is full, and that is counted instead."""
        try:
            return (await self._journal.append(audit)).entries[0]
        except errors.Refused as error:
            self._observer.not_compared(audit.comparison.kind, error.reason)
            return None
