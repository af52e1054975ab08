"""What determines the answers, besides the requests."""

from __future__ import annotations

from collections.abc import Mapping

from ostinato.digest import fingerprint_digest
from ostinato.v1 import types_pb2

ANSWER_RULES = "1"
"""Version of the rules by which this service ends an answer; they are part of what determines it."""


def fingerprint(engine_fields: Mapping[str, str]) -> types_pb2.Fingerprint:
    """The engine's fields and the service's own, with their digest."""
    fields = {**engine_fields, "answer_rules": ANSWER_RULES}
    return types_pb2.Fingerprint(digest=fingerprint_digest(fields), fields=fields)
