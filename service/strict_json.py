"""JSON that callers and models write: every reader takes it for the same, or it is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn

DEPTH_MAX = 64
"""Levels of arrays and objects in what a caller or a model writes about tools."""

Json = Any
"""A value of JSON."""


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Unlike `json.loads` it refuses NaN and the infinities."""


def loads(text: str) -> Json:
    """Raises ValueError with the reason."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error


def object_of(text: str) -> dict[str, Json]:
    """Raises ValueError."""
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def schema_of(text: str) -> dict[str, Json]:
    """A JSON schema; `true` is the empty one. Raises ValueError."""
    schema = loads(text)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object or true")
    return schema


def check_depth(value: Json, name: str = "") -> None:
    """Raises ValueError that begins with `name` for more than DEPTH_MAX levels of arrays and objects."""
    level, levels = [value], 0
    while outer := [each for each in level if isinstance(each, dict | list)]:
        levels += 1
        if levels > DEPTH_MAX:
            raise ValueError(f"{name}is nested deeper than {DEPTH_MAX} levels")
        level = [inner for each in outer for inner in (each.values() if isinstance(each, dict) else each)]
