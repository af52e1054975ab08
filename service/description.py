"""Who answers: the engine, its limits, its fingerprint and the grade it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ostinato.digest import fingerprint_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Engine
from service.grade import HeldGrade
from service.limits import Limits

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
