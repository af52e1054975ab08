"""An admitted item at the edge: its input, those who wait for it, its tokens and its output."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ostinato.compare import compare_prefix
from ostinato.digest import input_digest
from ostinato.errors import Draining, OstinatoError
from ostinato.resume import Progress
from ostinato.tracing import OFF, Span
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2
from serving.intake import Charge

from sidecar.answers import Waiter, ended_payload, outcome_kind
from sidecar.collisions import Collisions, sampling_label
from sidecar.core.events import Need
from sidecar.journal.ledger import twins_of
from sidecar.journal.model import Outcome

GRADES = frozenset(types_pb2.Grade.values())
DEFERRED_SECONDS = 1.0
"""When callers may ask again for what a drain left unfinished."""


@dataclass(frozen=True, slots=True)
class RerunResult:
    """The output of a run without a sequence, and the engine's fingerprint."""

    output: types_pb2.Output
    fingerprint_digest: bytes


@dataclass(slots=True, eq=False)
class ActiveItem:
    """From its sequence to its durable outcome. Times are seconds on the pipeline's clock.

    The core's `Item` has its place in the order, and this object all else. Both are found by sequence.
    """

    admitted: types_pb2.EntryHeader
    """Of the ADMITTED entry."""
    input: sequencer_pb2.AdmittedPayload
    admitted_at: float
    waiters: list[Waiter]
    charge: Charge | None = None
    """The memory of its request."""
    input_digest: bytes = b""
    """Bare; empty: not computed yet."""
    sequence: int = field(init=False)
    progress: Progress = field(init=False)
    """What was streamed."""
    span: Span = OFF
    stage: Span = OFF
    """Within `span`: its present wait, or its run."""
    submitted_at: float | None = None
    first_token_at: float | None = None
    last_tokens_at: float | None = None
    first_fingerprint_digest: bytes = b""
    fingerprint_digest: bytes = b""
    """Of the engine of the first and of the newest submission."""
    company: int = 0
    company_at_end: int = 0
    """Runs that the engine held at the newest submission and at its end, this one included."""
    output: types_pb2.Output | None = None
    recovery: types_pb2.Comparison | None = None
    """The output against what a lost attempt had streamed."""
    verification: asyncio.Future[RerunResult] | None = None
    """The second run, if the request asks for one. It begins when the first ends."""
    collision: sequencer_pb2.Collision.ValueType = sequencer_pb2.COLLISION_UNSPECIFIED
    deferred: Draining | None = None
    """Why this process will not finish it."""

    def __post_init__(self) -> None:
        self.sequence = self.admitted.sequence
        self.progress = Progress(self.sequence)

    # ---- those who wait

    def join(self, waiter: Waiter) -> None:
        """One more. It gets the tokens that were streamed so far."""
        if self.deferred is not None:
            waiter.lost(self.deferred)
            return
        self.waiters.append(waiter)
        run = self.progress.so_far()
        if waiter.wants_tokens and run is not None:
            waiter.tokens(run)

    def remove(self, waiter: Waiter, error: OstinatoError) -> None:
        """Its call has ended. Without a key the answer cannot be asked for again, so it need not be verified."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
            if not self.waiters and not self.input.idempotency_key:
                self.cancel_verification(error)

    def cancel_verification(self, error: OstinatoError) -> None:
        if self.verification is not None and not self.verification.done():
            self.verification.set_exception(error)

    def defer(self) -> None:
        """Leave it to the next epoch."""
        self.deferred = Draining("the sidecar stops and finishes this when it is started again", retry_after=DEFERRED_SECONDS)
        for waiter in self.waiters:
            waiter.lost(self.deferred)

    # ---- its run

    def begin(self, attempt: int, now: float) -> None:
        """An attempt is submitted."""
        if self.submitted_at is None:
            self.submitted_at = now
        elif attempt != self.progress.attempt or self.progress.sent:
            self.progress.restart(attempt)
        self.progress.attempt = attempt

    def tokens(self, tokens: engine_pb2.RunTokens, now: float) -> None:
        """Stream them. Raises ValueError if they do not follow those before."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_tokens_at = now
        self._stream(*self.progress.accept(tokens))

    def finished(self, output: types_pb2.Output, vocabulary_size: int, drift: Sequence[str]) -> None:
        """Keep the output. `drift`: between the engines of the first and of this attempt.

        Raises ValueError if it cannot be this item's.
        """
        if output.seed != self.input.seed:
            raise ValueError(f"an output of seed {output.seed}, not {self.input.seed}")
        too_many = len(output.token_ids) > self.input.parameters.max_new_tokens
        if too_many or max(output.token_ids, default=0) >= vocabulary_size:
            raise ValueError("an output of too many tokens, or of tokens that do not exist")
        if output.grade not in GRADES:
            raise ValueError(f"unknown grade {output.grade}")
        self._stream(*self.progress.finish(output))
        self.output = output
        if self.progress.lost:
            self.recovery = compare_prefix(self.progress.lost, output, self.sequence, drift)

    def _stream(self, restarted: generation_pb2.Restarted | None, run: generation_pb2.TokenRun | None) -> None:
        if restarted is not None:
            self.span.event("restarted", {"ostinato.attempt": restarted.attempt})
        for waiter in self.waiters:
            if restarted is not None:
                waiter.restarted(restarted)
            if run is not None and waiter.wants_tokens:
                waiter.tokens(run)

    # ---- its end

    def outcome(self, error: OstinatoError | None, attempt: int, now: float, collisions: Collisions, group: str) -> Outcome:
        """What is to be recorded: the output, or the error. `group`: of tenants that the output may be compared with."""
        given, kind = self.input, outcome_kind(error)
        if error is not None:
            self._put_timing(timing := types_pb2.Timing(), now)
            ended = ended_payload(error, timing, given.nonce)
            return Outcome(self.admitted, kind, attempt, ended, self.fingerprint_digest)
        assert self.output is not None
        self.collision = collisions.check(group, given, self.output)
        payload = sequencer_pb2.CompletedPayload(nonce=given.nonce, company=self.company, collision=self.collision)
        payload.output.CopyFrom(self.output)
        payload.sampling = sampling_label(given.parameters)
        self._put_timing(payload.timing, now)
        digest = self.input_digest or input_digest(given.token_ids, given.parameters, given.seed)
        return Outcome(self.admitted, kind, attempt, payload, self.fingerprint_digest, twins_of(group, digest))

    def _put_timing(self, timing: types_pb2.Timing, now: float) -> None:
        if self.submitted_at is not None:
            timing.queue_micros = round(1e6 * (self.submitted_at - self.admitted_at))
        if self.first_token_at is not None:
            timing.first_token_micros = round(1e6 * (self.first_token_at - self.admitted_at))
        timing.total_micros = round(1e6 * (now - self.admitted_at))
        if self.output is not None:
            timing.cached_tokens = self.output.cached_tokens


def kv_tokens(payload: sequencer_pb2.AdmittedPayload) -> int:
    """Tokens of the prompt, and of the answer at worst."""
    return len(payload.token_ids) + payload.parameters.max_new_tokens


def need_of(payload: sequencer_pb2.AdmittedPayload) -> Need:
    return Need(kv_tokens(payload), payload.model_digest, payload.required_grade)


def submission(payload: sequencer_pb2.AdmittedPayload, timeout_seconds: float, **about: Any) -> engine_pb2.Submit:
    """A recorded input as a run, with these other fields. It is not rendered or tokenised again."""
    millis = max(1, round(timeout_seconds * 1000))
    return engine_pb2.Submit(
        token_ids=payload.token_ids, parameters=payload.parameters, seed=payload.seed, timeout_millis=millis, **about
    )
