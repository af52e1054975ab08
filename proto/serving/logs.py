"""Logs: one line an event, as text or as JSON.

    2026-11-24T11:15:05.123Z INFO sidecar.admission admitted sequence=7 count=3 request_id="nightly"
    {"time": "2026-11-24T11:15:05.123Z", "level": "INFO", "logger": "sidecar.flow", "message": "admitted", "sequence": "7"}

Fields are passed by `extra`: `_log.info("admitted", extra={"sequence": 7, "count": 3})`. In a trace a line also has `trace_id`
and `span_id`. Text from users cannot break a line.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from ostinato import tracing

UINT64 = frozenset({"sequence", "first_sequence", "last_sequence", "epoch", "index", "run_id", "seed", "engine_seed"})
"""Fields that are uint64 in the contract. JSON numbers are doubles to most readers, so in JSON these are strings, always."""

_EXACT_IN_A_DOUBLE = 2**53
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BARE = re.compile(r"[\w.:/@+-]+", re.ASCII)


def setup(form: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all logging to `stream` (stderr), from `level` up, as "human" or "json". Replaces what was set up before.

    Raises ValueError for a level that logging does not know.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_traced)
    handler.setFormatter(JsonFormatter() if form == "json" else HumanFormatter())
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers = [handler]


def report_failure(program: str, why: str, exit_code: int, *, form: str = "") -> None:
    """Prints on stderr why `program` ends: one line of text, or a JSON record of level CRITICAL. `form`: "human" or "json";
    empty: that of `setup`."""
    why = " ".join(why.split())
    if form == "json" or (not form and any(type(each.formatter) is JsonFormatter for each in logging.getLogger().handlers)):
        extra = {"exit_code": exit_code}
        record = logging.getLogger(program).makeRecord(program, logging.CRITICAL, "", 0, why, (), None, extra=extra)
        line = JsonFormatter().format(record)
    else:
        line = f"{program}: {one_line(why)}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201  # logging may not be set up, or be set to say less


class HumanFormatter(logging.Formatter):
    """Time, level, logger, message, then key=value. Tracebacks follow on lines that begin with a bar."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname} {record.name} {one_line(record.getMessage())}"
        line = " ".join([head, *(f"{key}={_human(value)}" for key, value in fields(record).items())])
        return "\n".join([line, *(f"  | {one_line(row)}" for row in self.traceback(record).splitlines())])

    def traceback(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        return "\n".join([*parts, record.stack_info] if record.stack_info else parts)


class JsonFormatter(HumanFormatter):
    """One JSON object a line, ASCII only; the traceback is the field `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {"time": _time(record), "level": record.levelname, "logger": record.name}
        entry["message"] = record.getMessage()
        for key, value in fields(record).items():
            entry[f"{key}_" if key in entry else key] = _plain(key, value)
        if trace := self.traceback(record):
            entry["exception"] = trace
        return json.dumps(entry)


def _traced(record: logging.LogRecord) -> bool:
    """Adds the current span, unless the line names one."""
    if not hasattr(record, "trace_id"):
        vars(record).update(tracing.current().ids)
    return True


def fields(record: logging.LogRecord) -> Mapping[str, object]:
    """Those passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _human(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    text = str(value)
    return text if _BARE.fullmatch(text) else one_line(json.dumps(text, ensure_ascii=False))


def _plain(key: str, value: object) -> object:
    """The value as JSON can say it."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return str(value) if key in UINT64 or abs(value) > _EXACT_IN_A_DOUBLE else value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return value.hex()
        case Mapping():
            return {str(name): _plain(str(name), inner) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(key, inner) for inner in value]
        case _:
            return str(value)


def one_line(text: str) -> str:
    r"""The text, with everything escaped that could end a line, move a cursor or fail to encode, as in \n."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
