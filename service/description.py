"""Who answers: the engine, its limits, its fingerprint and the grade it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ostinato.digest import fingerprint_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Engine
from service.prepare import Limits

ANSWER_RULES = "1"
"""Version of the rules by which this service ends an answer; they are part of what determines it."""


def fingerprint(engine_fields: Mapping[str, str]) -> types_pb2.Fingerprint:
    """What determines the answers, besides the requests: the engine's fields and the service's own, with their digest."""
    fields = {**engine_fields, "answer_rules": ANSWER_RULES}
    return types_pb2.Fingerprint(digest=fingerprint_digest(fields), fields=fields)


@dataclass(frozen=True, slots=True)
class Describer:
    """Describe's answer; of all that is in it, only the grade changes."""

    engine: Engine
    limits: Limits
    fingerprint: types_pb2.Fingerprint
    held: HeldGrade
    incarnation: str
    """32 hexadecimal digits, new at every start."""

    def response(self) -> engine_pb2.DescribeResponse:
        """As things are now."""
        engine = self.engine
        model = types_pb2.Model(
            name=engine.model_name,
            engine=engine.name,
            vocabulary_size=engine.vocabulary.size,
            context_tokens=engine.context_tokens,
            limits=self.limits.message(),
            fingerprint=self.fingerprint,
            grade=self.held.grade,
            grade_reason=self.held.reason,
            logprob_kind=engine.logprob_kind,
            chat=engine.chat,
        )
        return engine_pb2.DescribeResponse(model=model, capacity=engine.capacity, incarnation=self.incarnation)


_log = logging.getLogger(__name__)


class HeldGrade:
    """1. It is GRADE_UNSPECIFIED until earned.
    2. Once earned it never rises, so the grade at a run's end is the lowest that was held since its start.
    3. What fell before counts too: the self-test cannot earn back what the engine said it lost.
    """

    def __init__(self) -> None:
        self.grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED
        self.reason = "not tested yet"
        self._ceiling: types_pb2.Grade.ValueType = types_pb2.GRADE_EXACT
        self._why = ""
        self._watchers: dict[object, Callable[[], None]] = {}

    def earn(self, grade: types_pb2.Grade.ValueType, reason: str) -> None:
        """What the self-test found. Once."""
        assert not self.grade, "a grade is earned once"
        self.grade, self.reason = (grade, reason) if grade <= self._ceiling else (self._ceiling, self._why)
        self._tell()

    def fall(self, grade: types_pb2.Grade.ValueType, reason: str) -> None:
        """No better than this is held any more. Without effect where it is not."""
        if grade < self._ceiling:
            self._ceiling, self._why = grade, reason
        if grade < self.grade:
            _log.warning("grade lost", extra={"grade": types_pb2.Grade.Name(grade), "reason": reason})
            self.grade, self.reason = grade, reason
            self._tell()

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Calls `watcher` after every change, until what this returns is called (once or more)."""
        key = object()
        self._watchers[key] = watcher
        return lambda: self._watchers.pop(key, None) and None

    def _tell(self) -> None:
        for watcher in tuple(self._watchers.values()):
            watcher()
