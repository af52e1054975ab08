"""What a stream may submit. Pure.

Two kinds of wrong: a sidecar that breaks the protocol loses its stream; a run that this engine cannot take (another model's
tokens, a smaller context than when it was recorded) fails by itself, and its neighbours go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ostinato.errors import InvalidRequest, OutOfOrder, ProtocolViolation, Violation
from ostinato.v1 import engine_pb2

from service.limits import Limits

PURPOSES = frozenset(engine_pb2.Purpose.values()) - {engine_pb2.PURPOSE_UNSPECIFIED}
_FLOATS = (("temperature", 100.0, True), ("min_p", 1.0, True), ("top_p", 1.0, False), ("repetition_penalty", 10.0, False))
"""The most that each may be, and whether it may be nothing."""
REMEMBERED = 65_536
"""How many run ids a stream remembers, to find one that is used again."""


@dataclass(slots=True)
class Protocol:
    """What one stream has submitted so far."""

    last_sequence: int = 0
    _seen: set[int] = field(default_factory=set)
    _order: deque[int] = field(default_factory=deque)

    def check(self, submit: engine_pb2.Submit) -> None:
        """Take note of it. Raises ProtocolViolation, or OutOfOrder for a primary sequence that does not rise: of first
        attempts only, because a later one may be of an item that another writer has left behind."""
        run_id, primary = submit.run_id, submit.purpose == engine_pb2.PURPOSE_PRIMARY
        if not run_id or run_id in self._seen:
            raise ProtocolViolation(f"run_id {run_id} is {'used twice' if run_id else 'no run_id'}")
        if submit.purpose not in PURPOSES:
            raise ProtocolViolation(f"run {run_id}: purpose {submit.purpose} is none")
        if not submit.attempt:
            raise ProtocolViolation(f"run {run_id}: attempts count from 1")
        if not submit.token_ids or not submit.parameters.max_new_tokens:
            raise ProtocolViolation(f"run {run_id}: lacks token_ids or parameters")
        if primary and (not submit.sequence or (submit.attempt == 1 and submit.sequence <= self.last_sequence)):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} comes after {self.last_sequence}")
        if primary and submit.attempt == 1:
            self.last_sequence = submit.sequence
        self._remember(run_id)

    def _remember(self, run_id: int) -> None:
        self._seen.add(run_id)
        self._order.append(run_id)
        if len(self._order) > REMEMBERED:
            self._seen.discard(self._order.popleft())


def unfit(submit: engine_pb2.Submit, limits: Limits, vocabulary_size: int) -> InvalidRequest | None:
    """Why this engine cannot take the run. Checked although Prepare has: it may have been prepared by an earlier service, and
    some of these would take the whole process down."""
    found = [Violation(name, text) for name, text in _unfit(submit, limits, vocabulary_size)]
    return InvalidRequest(violations=found) if found else None


def _unfit(submit: engine_pb2.Submit, limits: Limits, vocabulary_size: int) -> Iterator[tuple[str, str]]:
    given = submit.parameters
    if max(submit.token_ids) >= vocabulary_size:
        yield "token_ids", f"{max(submit.token_ids)} is not below the vocabulary's {vocabulary_size}"
    if len(submit.token_ids) + given.max_new_tokens > limits.context_tokens:
        yield "parameters.max_new_tokens", f"prompt and answer are more than the context's {limits.context_tokens} tokens"
    if given.min_new_tokens > given.max_new_tokens:
        yield "parameters.min_new_tokens", "is more than max_new_tokens"
    if given.top_k > limits.top_k_max:
        yield "parameters.top_k", f"is above {limits.top_k_max}"
    if given.logprobs > limits.logprobs_max:
        yield "parameters.logprobs", f"is above {limits.logprobs_max}"
    for name, most, zero in _FLOATS:
        value: float = getattr(given, name)
        if not 0 <= value <= most or not (value or zero):  # so NaN is neither
            yield f"parameters.{name}", f"{value} is out of bounds"
    for name in ("stop_token_ids", "bad_token_ids"):
        if any(token_id >= vocabulary_size for token_id in getattr(given, name)):
            yield f"parameters.{name}", "holds a token outside the vocabulary"
