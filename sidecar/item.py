"""Calls and items at the edge: what the core does not need to know, and the world does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from ostinato import enums, tracing
from ostinato.compare import compare_prefix
from ostinato.errors import Disconnected, Draining, OstinatoError
from ostinato.resume import Progress
from ostinato.tracing import OFF, Kind, Span
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2

from sidecar.answers import Waiter, ended_payload, outcome_kind
from sidecar.collisions import Collisions, sampling_label
from sidecar.core.events import Need
from sidecar.journal.model import Admission, Binding, Outcome, Sealed


def run_span(purpose: engine_pb2.Purpose.ValueType, sequence: int) -> Span:
    """Of a second run, from when it is asked for: within what asked for it, or on its own."""
    return tracing.span(enums.word(engine_pb2.Purpose, purpose).lower(), {"ostinato.sequence": sequence}, Kind.CLIENT)


class ItemSpans:
    """Begins with the item's numbers. `caller`: the span of the call that brought it."""

    def __init__(self, header: types_pb2.EntryHeader, payload: sequencer_pb2.AdmittedPayload, caller: Span) -> None:
        self.item = self._part = OFF
        self._running, self._sequence = False, header.sequence
        if not tracing.on():
            return
        self.item = caller.child(
            "item",
            {
                "ostinato.sequence": header.sequence,
                "ostinato.log_id": header.log_id,
                "ostinato.writer": header.writer,
                "ostinato.epoch": header.epoch,
                "ostinato.request_id": payload.request_id,
                "ostinato.seed": str(payload.seed),
            },
        )
        self._part = self.item.child("queue")

    def submitted(self, attempt: int, company: int) -> str:
        """An attempt goes to the engine; the traceparent that goes with it."""
        if self.item is OFF:
            return ""
        self.lost()
        self._part.end()
        if attempt > 1:
            self.item.event("submitted again", {"ostinato.attempt": attempt})
        attributes = {"ostinato.sequence": self._sequence, "ostinato.attempt": attempt, "ostinato.company": company}
        self._part = self.item.child("run", attributes, Kind.CLIENT)
        self._running = True
        return self._part.traceparent

    def lost(self) -> None:
        """The engine is gone; if the item was in it, it waits again."""
        if self._running:
            self._running = False
            self._part.end(Disconnected("the engine was lost"))
            self._part = self.item.child("queue")

    def over(self, error: OstinatoError | None) -> None:
        """Nothing more is done for it but to write down how it ended."""
        self._running = False
        self._part.end(error)

    def ended(self, header: types_pb2.EntryHeader, error: OstinatoError | None) -> None:
        """The outcome is durable."""
        if self.item:
            self.item.note(
                {
                    "ostinato.attempt": header.attempt,
                    "ostinato.outcome": enums.word(types_pb2.EntryKind, header.kind),
                    "ostinato.grade": enums.word(types_pb2.Grade, header.grade),
                    "ostinato.fingerprint": header.fingerprint_digest.hex(),
                }
            )
            self.item.end(error)


GRADES = frozenset(types_pb2.Grade.values())
LEFT_SECONDS = 1.0
"""After which it makes sense to ask for what a drain left unfinished."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingAdmission:
    """A call that waits for its numbers."""

    admission: Admission
    call: Waiter
    asked_at: float
    answer: asyncio.Future[types_pb2.Stamp | Binding]
    caller: tracing.Span = field(default_factory=tracing.current)
    span: tracing.Span = field(default_factory=lambda: tracing.span("admission"))

    def settle(self, answer: types_pb2.Stamp | Binding) -> None:
        self.span.end()
        if not self.answer.done():
            self.answer.set_result(answer)

    def refuse(self, error: OstinatoError) -> None:
        self.span.end(error)
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class RerunResult:
    """What a second run made, and on what."""

    output: types_pb2.Output
    fingerprint_digest: bytes


@dataclass(slots=True, eq=False)
class ActiveItem:
    """From admission to its durable outcome. Times are seconds on the program's monotonic clock."""

    admitted: types_pb2.EntryHeader
    input: sequencer_pb2.AdmittedPayload
    admitted_at: float
    calls: list[Waiter]
    progress: Progress
    ended: asyncio.Future[types_pb2.Result]
    """The result, once it is durable."""
    spans: ItemSpans
    submitted_at: float | None = None
    first_token_at: float | None = None
    last_tokens_at: float | None = None
    fingerprint_digest: bytes = b""
    """Of the engine it was last submitted to."""
    first_fingerprint_digest: bytes = b""
    company: int = 0
    """Runs that the engine held when it was last submitted, itself included."""
    output: types_pb2.Output | None = None
    recovery: types_pb2.Comparison | None = field(default=None)
    left: Draining | None = None
    """Why nobody need wait for it in this process; None: it goes on."""
    second: asyncio.Future[RerunResult] | None = None
    """The run that verifies the first one, from the first one's end on."""
    company_at_end: int = 0
    """Runs that it held when this one ended."""
    collision: sequencer_pb2.Collision.ValueType = sequencer_pb2.COLLISION_UNSPECIFIED
    """What was found about its output, once there is an outcome."""

    @classmethod
    def of(cls, entry: Sealed, calls: list[Waiter], now: float, caller: tracing.Span | None = None) -> ActiveItem:
        """The work that an ADMITTED entry makes. `caller`: the span of the call that brought it, if there is one."""
        payload = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
        ended: asyncio.Future[types_pb2.Result] = asyncio.get_running_loop().create_future()
        spans = ItemSpans(entry.header, payload, tracing.current() if caller is None else caller)
        return cls(entry.header, payload, now, calls, Progress(entry.header.sequence), ended, spans)

    @property
    def sequence(self) -> int:
        return self.admitted.sequence

    def submit(self, run_id: int, attempt: int, timeout_seconds: float, now: float) -> engine_pb2.Submit:
        """The message that starts an attempt."""
        if self.submitted_at is None:
            self.submitted_at = now
        elif attempt != self.progress.attempt or self.progress.sent:
            self.progress.restart(attempt)
        self.progress.attempt = attempt
        return submission(
            self.input,
            run_id=run_id,
            purpose=engine_pb2.PURPOSE_PRIMARY,
            sequence=self.sequence,
            attempt=attempt,
            stream=any(call.wants_tokens for call in self.calls),
            timeout_seconds=timeout_seconds,
            traceparent=self.spans.submitted(attempt, self.company),
        )

    def join(self, call: Waiter) -> None:
        """Somebody else waits too. It is sent what was streamed so far, if anything was."""
        if self.left is not None:
            call.lost(self.left)
            return
        self.calls.append(call)
        run = self.progress.so_far()
        if call.wants_tokens and run is not None:
            call.tokens(run)

    def leave(self) -> None:
        """The next epoch's; those who wait are told to come back for it."""
        self.left = Draining("the sidecar stops and finishes this when it is started again", retry_after=LEFT_SECONDS)
        for call in self.calls:
            call.lost(self.left)
        self.spans.over(self.left)
        self.spans.item.end(self.left)
        self.ended.set_exception(self.left)
        self.ended.exception()  # somebody has to look at it, and there may be nobody

    def detach(self, call: Waiter, error: OstinatoError) -> None:
        """A call waits no more. Where nobody may come back there is no use in a second run."""
        if call in self.calls:
            self.calls.remove(call)
            if not self.calls and not self.input.idempotency_key:
                self.forgo(error)

    def forgo(self, error: OstinatoError) -> None:
        """Leave without a verdict, if a second run is under way."""
        if self.second is not None and not self.second.done():
            self.second.set_exception(error)

    def tokens(self, tokens: engine_pb2.RunTokens, now: float) -> None:
        """Tell those who stream. Raises ValueError if the tokens do not follow those before."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_tokens_at = now
        self._tell(*self.progress.accept(tokens))

    def finished(self, output: types_pb2.Output, vocabulary_size: int, drift: Sequence[str]) -> None:
        """Keep the output; compare it with what a lost attempt had sent. `drift`: between the engines of the first and this
        attempt. Raises ValueError if it cannot be this item's."""
        self._check(output, vocabulary_size)
        self._tell(*self.progress.finish(output))
        self.output = output
        self.spans.over(None)
        if self.progress.lost:
            self.recovery = compare_prefix(self.progress.lost, output, self.sequence, drift)

    def _check(self, output: types_pb2.Output, vocabulary_size: int) -> None:
        given = self.input
        if output.seed != given.seed:
            raise ValueError(f"an output of seed {output.seed}, not {given.seed}")
        if len(output.token_ids) > given.parameters.max_new_tokens or max(output.token_ids, default=0) >= vocabulary_size:
            raise ValueError("an output of too many tokens, or of tokens that do not exist")
        if output.grade not in GRADES:
            raise ValueError(f"grade {output.grade} is none")

    def _tell(self, restarted: generation_pb2.Restarted | None, run: generation_pb2.TokenRun | None) -> None:
        if restarted is not None:
            self.spans.item.event("restarted", {"ostinato.attempt": restarted.attempt})
        for call in self.calls:
            if restarted is not None:
                call.restarted(restarted)
            if run is not None and call.wants_tokens:
                call.tokens(run)

    def outcome(self, error: OstinatoError | None, attempt: int, now: float, collisions: Collisions) -> Outcome:
        """What is to be made durable; without an error, the output."""
        self.spans.over(error)
        timing = self._timing(now)
        payload: sequencer_pb2.CompletedPayload | sequencer_pb2.EndedPayload
        if error is None:
            assert self.output is not None
            self.collision = collisions.check(self.input, self.output)
            payload = sequencer_pb2.CompletedPayload(
                output=self.output,
                timing=timing,
                collision=self.collision,
                company=self.company,
                sampling=sampling_label(self.input.parameters),
            )
        else:
            payload = ended_payload(error, timing)
        return Outcome(self.admitted, outcome_kind(error), attempt, payload, self.fingerprint_digest)

    def _timing(self, now: float) -> types_pb2.Timing:
        """Where the time went, until now."""

        def since_admission(moment: float | None) -> int:
            return 0 if moment is None else max(0, round((moment - self.admitted_at) * 1e6))

        return types_pb2.Timing(
            queue_micros=since_admission(self.submitted_at),
            first_token_micros=since_admission(self.first_token_at),
            total_micros=since_admission(now),
            cached_tokens=0 if self.output is None else self.output.cached_tokens,
        )


def need_of(payload: sequencer_pb2.AdmittedPayload) -> Need:
    """What the core has to know of an item."""
    return Need(kv_tokens(payload), payload.model_digest, payload.required_grade)


def kv_tokens(payload: sequencer_pb2.AdmittedPayload) -> int:
    """Prompt and answer at worst."""
    return len(payload.token_ids) + payload.parameters.max_new_tokens


def submission(
    payload: sequencer_pb2.AdmittedPayload,
    *,
    run_id: int,
    purpose: engine_pb2.Purpose.ValueType,
    sequence: int,
    attempt: int,
    stream: bool,
    timeout_seconds: float,
    traceparent: str,
) -> engine_pb2.Submit:
    """A recorded input as a run: never rendered or tokenised again."""
    return engine_pb2.Submit(
        run_id=run_id,
        purpose=purpose,
        sequence=sequence,
        attempt=attempt,
        token_ids=payload.token_ids,
        parameters=payload.parameters,
        seed=payload.seed,
        stream=stream,
        timeout_millis=max(1, round(timeout_seconds * 1000)),
        traceparent=traceparent,
    )
