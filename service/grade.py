"""The grade that the service holds: earned once, and from then on it only falls."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ostinato.v1 import types_pb2

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
