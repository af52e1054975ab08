"""What every engine asks of a grammar's source before its compiler sees it."""

from __future__ import annotations

import json
from typing import Any

SOURCE_BYTES_MAX = 65_536


def bounded(source: str) -> str:
    """The source. Raises ValueError for more than SOURCE_BYTES_MAX."""
    if (size := len(source.encode())) > SOURCE_BYTES_MAX:
        raise ValueError(f"must be at most {SOURCE_BYTES_MAX} bytes, is {size}")
    return source


def schema_of(text: str) -> dict[str, Any]:
    """The schema; `true` is the empty one. Raises ValueError for what is no JSON or no schema."""
    try:
        schema = json.loads(bounded(text), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object or true")
    return schema


def _no_constant(name: str) -> None:
    raise ValueError(f"is not JSON: {name} is no JSON value")
