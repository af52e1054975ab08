"""What the service says of itself: the engine, its limits, its fingerprint and the grade it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ostinato.digest import fingerprint_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.bounds import Limits
from service.engines.base import Engine

ANSWER_RULES = "1"
"""Version of the rules by which this service ends an answer. Part of the fingerprint, because they determine the answer."""

_log = logging.getLogger(__name__)


def fingerprint(engine_fields: Mapping[str, str]) -> types_pb2.Fingerprint:
    """What determines the answers besides the requests: the engine's fields and the service's own, with their digest."""
    fields = {**engine_fields, "answer_rules": ANSWER_RULES}
    return types_pb2.Fingerprint(digest=fingerprint_digest(fields), fields=fields)


class HeldGrade:
    """The grade that the service holds.

    1. It is GRADE_UNSPECIFIED until earned, which is once.
    2. Once earned it never rises, so the grade at a run's end is the lowest that was held since its start.
    3. A fall before it is earned counts too: the self-test cannot earn what the engine has lost.
    """

    def __init__(self) -> None:
        self.grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED
        self.reason = "not tested yet"
        self._ceiling: types_pb2.Grade.ValueType = types_pb2.GRADE_EXACT
        self._ceiling_reason = ""
        self._watchers: dict[object, Callable[[], None]] = {}

    def earn(self, grade: types_pb2.Grade.ValueType, reason: str) -> None:
        """The result of the self-test. Once."""
        assert not self.grade, "a grade is earned once"
        self._set(*((grade, reason) if grade <= self._ceiling else (self._ceiling, self._ceiling_reason)))

    def fall(self, grade: types_pb2.Grade.ValueType, reason: str) -> None:
        """From now on no better grade is held. Without effect where none is."""
        if grade < self._ceiling:
            self._ceiling, self._ceiling_reason = grade, reason
        if grade < self.grade:
            _log.warning("grade lost", extra={"grade": types_pb2.Grade.Name(grade), "reason": reason})
            self._set(grade, reason)

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Calls `watcher` after every change, until the returned function is called (once or more)."""
        key = object()
        self._watchers[key] = watcher
        return lambda: self._watchers.pop(key, None) and None

    def _set(self, grade: types_pb2.Grade.ValueType, reason: str) -> None:
        assert grade <= (self.grade or self._ceiling), "a grade never rises"
        self.grade, self.reason = grade, reason
        for watcher in tuple(self._watchers.values()):
            watcher()


def describe(
    engine: Engine, limits: Limits, fingerprint: types_pb2.Fingerprint, held: HeldGrade, incarnation: str
) -> engine_pb2.DescribeResponse:
    """The response of Describe."""
    model = types_pb2.Model(
        name=engine.model_name,
        engine=engine.name,
        vocabulary_size=engine.vocabulary.size,
        context_tokens=engine.context_tokens,
        limits=limits.message(),
        fingerprint=fingerprint,
        grade=held.grade,
        grade_reason=held.reason,
        logprob_kind=engine.logprob_kind,
        chat=engine.chat,
    )
    return engine_pb2.DescribeResponse(model=model, capacity=engine.capacity, incarnation=incarnation)
