"""Enums as labels of a metric, and back: GRADE_BEST_EFFORT is best_effort. A value of a newer version is its number."""

from __future__ import annotations

from typing import cast

from ostinato.v1 import types_pb2


def kind(value: types_pb2.ComparisonKind.ValueType) -> str:
    known = value in types_pb2.ComparisonKind.values()
    return types_pb2.ComparisonKind.Name(value).removeprefix("COMPARISON_KIND_").lower() if known else str(value)


def kind_of(label: str) -> types_pb2.ComparisonKind.ValueType:
    if label.isdecimal():
        return cast("types_pb2.ComparisonKind.ValueType", int(label))
    return types_pb2.ComparisonKind.Value(f"COMPARISON_KIND_{label.upper()}")


def grade(value: types_pb2.Grade.ValueType) -> str:
    known = value in types_pb2.Grade.values()
    return types_pb2.Grade.Name(value).removeprefix("GRADE_").lower() if known else str(value)


def grade_of(label: str) -> types_pb2.Grade.ValueType:
    if label.isdecimal():
        return cast("types_pb2.Grade.ValueType", int(label))
    return types_pb2.Grade.Value(f"GRADE_{label.upper()}")


def replica(other: bool) -> str:
    """Which sidecar recorded the first run: this one, or another that shares the log."""
    return "other" if other else "same"
