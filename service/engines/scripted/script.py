"""What the scripted engine is told to be and to do.

    {"runs": 4, "grade": "EXACT", "delay_seconds": 0.001, "rules": [
        {"do": "diverge", "at": 2, "sequences": [7], "purposes": ["REPLAY"], "attempts": [1]},
        {"do": "fail", "at": 3, "share": 0.1}]}

Every key is optional but a rule's `do`; an unknown key or a value of another kind is an error. All rules that match a run apply
to it, and none of those conditions means any run but the service's own self-test, whose purpose is called SELF_TEST here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TypeVar

from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Run

T = TypeVar("T")

DEEDS = ("diverge", "forget_seed", "fail", "hang", "crash", "delay", "lose_grade")
_PURPOSES = {name.removeprefix("PURPOSE_"): number for name, number in engine_pb2.Purpose.items() if number} | {"SELF_TEST": 0}
_GRADES = {name.removeprefix("GRADE_"): number for name, number in types_pb2.Grade.items() if number}


@dataclass(frozen=True, slots=True)
class Rule:
    """One misdeed, and the runs it happens to."""

    do: str
    """diverge: other tokens from `at` on. forget_seed: from `at` on the tokens of seed 0. fail: ends with ENGINE_FAILED.
    hang: makes no token any more, until cancelled. crash: makes no token any more, and a moment later the process ends, with
    no goodbye. delay: waits once for `seconds`. lose_grade: says that the grade fell to `to`."""
    at: int = 0
    """Token index, from 0, before which it happens."""
    sequences: frozenset[int] | None = None
    purposes: frozenset[int] | None = None
    attempts: frozenset[int] | None = None
    company: bool = False
    """Only while other runs are running too."""
    share: float = 1.0
    """Of the runs that match, chosen by hash of sequence, purpose and attempt."""
    seconds: float = 0.0
    to: types_pb2.Grade.ValueType = types_pb2.GRADE_BEST_EFFORT

    def matches(self, run: Run) -> bool:
        """Whether it happens to this run; company is not asked for here, it comes and goes."""
        return (
            (self.sequences is None or run.sequence in self.sequences)
            and (run.purpose in self.purposes if self.purposes is not None else run.purpose != 0)
            and (self.attempts is None or run.attempt in self.attempts)
            and (self.share >= 1 or _fraction(run) < self.share)
        )


@dataclass(frozen=True, slots=True)
class Script:
    """All that can be told."""

    model: str = "scripted"
    """Another name is another model: it makes other tokens."""
    grade: types_pb2.Grade.ValueType = types_pb2.GRADE_EXACT
    """The best that the self-test can find."""
    runs: int = 64
    kv_blocks: int = 4096
    block_tokens: int = 64
    context_tokens: int = 4096
    top_k_max: int = 1024
    chat: bool = True
    load_seconds: float = 0.0
    delay_seconds: float = 0.0
    """Of each step; a step makes one token of every run."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """More of the fingerprint, or other values of it."""
    cached_tokens: int = 0
    """Of each prompt, as far as it has so many, that are said to have come from a cache."""
    record: int = 0
    """How many of the last submitted sequences to remember."""
    rules: tuple[Rule, ...] = ()


def parse(text: str) -> Script:
    """The script in a JSON text. Raises ValueError that says where and what is wrong."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return _build(Script, data, "")


def _build(cls: type[T], data: object, where: str) -> T:
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in _mapping(data, where or "the script").items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise ValueError(f"{path}: unknown; known are {', '.join(sorted(known))}")
        values[key] = _READERS[key](value, path)
    if cls is Rule and "do" not in values:
        raise ValueError(f"{where}.do: is missing")
    return cls(**values)


def _mapping(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not an object")
    return value


def _list(value: object, path: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: is not a list")
    return value


def _whole(least: int) -> Callable[[object, str], int]:
    def read(value: object, path: str) -> int:
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            value = int(value)  # JSON carries large numbers as text
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**64:
            raise ValueError(f"{path}: {value!r} is not a whole number from {least}")
        return value

    return read


def _number(most: float) -> Callable[[object, str], float]:
    def read(value: object, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or math.isinf(value):
            raise ValueError(f"{path}: {value!r} is not a number of 0 to {most}")
        return float(value)

    return read


def _kind(kind: type[T]) -> Callable[[object, str], T]:
    def read(value: object, path: str) -> T:
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {value!r} is no {kind.__name__}")
        return value

    return read


def _choice(choices: Mapping[str, T]) -> Callable[[object, str], T]:
    def read(value: object, path: str) -> T:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{path}: {value!r} is not one of {', '.join(choices)}")
        return choices[value]

    return read


def _set(read: Callable[[object, str], int]) -> Callable[[object, str], frozenset[int]]:
    return lambda value, path: frozenset(read(one, f"{path}[{i}]") for i, one in enumerate(_list(value, path)))


def _texts(value: object, path: str) -> Mapping[str, str]:
    return {key: _kind(str)(one, f"{path}.{key}") for key, one in _mapping(value, path).items()}


def _rules(value: object, path: str) -> tuple[Rule, ...]:
    return tuple(_build(Rule, one, f"{path}[{i}]") for i, one in enumerate(_list(value, path)))


def _fraction(run: Run) -> float:
    name = f"{run.sequence}/{run.purpose}/{run.attempt}".encode()
    return int.from_bytes(sha256(name).digest()[:6]) / 2**48


_READERS: Mapping[str, Callable[[object, str], Any]] = {
    "model": _kind(str),
    "grade": _choice(_GRADES),
    "runs": _whole(1),
    "kv_blocks": _whole(1),
    "block_tokens": _whole(1),
    "context_tokens": _whole(2),
    "top_k_max": _whole(1),
    "chat": _kind(bool),
    "load_seconds": _number(math.inf),
    "delay_seconds": _number(math.inf),
    "fields": _texts,
    "cached_tokens": _whole(0),
    "record": _whole(0),
    "rules": _rules,
    "do": _choice({deed: deed for deed in DEEDS}),
    "at": _whole(0),
    "sequences": _set(_whole(0)),
    "purposes": _set(_choice(_PURPOSES)),
    "attempts": _set(_whole(1)),
    "company": _kind(bool),
    "share": _number(1.0),
    "seconds": _number(math.inf),
    "to": _choice(_GRADES),
}
