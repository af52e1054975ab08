"""Log lines, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from serving import logs

TROUBLE = "line one\nline two\r\x1b[31mred\u2028end\udc80"


def record(message: str = "admitted", *args: object, exc_info: Any = None, **extra: object) -> logging.LogRecord:
    """A record as `_log.info(message, *args, extra=extra)` makes it."""
    return logging.getLogger("sidecar.flow").makeRecord(
        "sidecar.flow", logging.INFO, __file__, 1, message, args, exc_info, extra=extra
    )


def human(*args: Any, **kwargs: Any) -> str:
    """The record's text, less its time."""
    return logs.HumanFormatter().format(record(*args, **kwargs)).split(" ", 1)[1]


def parsed(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The record's JSON line, read again."""
    line = logs.JsonFormatter().format(record(*args, **kwargs))
    assert len(line.splitlines()) == 1
    entry: dict[str, Any] = json.loads(line)
    return entry


def raised(message: str) -> Any:
    """The exc_info of an exception with this text."""
    try:
        raise ValueError(message)
    except ValueError:
        return sys.exc_info()


def test_fields_follow_the_message() -> None:
    """Whatever is passed as extra comes out as key=value, in its order."""
    assert human("batch of %d", 3, sequence=7, request_id="nightly", epoch=2) == (
        "INFO sidecar.flow batch of 3 sequence=7 request_id=nightly epoch=2"
    )


def test_values_with_spaces_are_quoted() -> None:
    """A value cannot pretend to be another field."""
    assert human(request_id="a sequence=8") == 'INFO sidecar.flow admitted request_id="a sequence=8"'


def test_a_record_is_one_object_a_line() -> None:
    """JSON has the same fields as the human form."""
    entry = parsed("batch of %d", 3, count=3, request_id="nightly")

    assert entry.pop("time").endswith("Z")
    assert entry == {"level": "INFO", "logger": "sidecar.flow", "message": "batch of 3", "count": 3, "request_id": "nightly"}


@pytest.mark.parametrize("number", [0, 1, 2**63, 2**64 - 1])
def test_uint64_is_a_string_in_json_and_a_number_for_people(number: int) -> None:
    """Most readers take JSON numbers for doubles; so a sequence is always a string there, a small one too."""
    assert parsed(sequence=number)["sequence"] == str(number)
    assert parsed(bytes_free=2**60)["bytes_free"] == str(2**60), "no uint64, but no double either"
    assert human(sequence=number).endswith(f"sequence={number}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"\x00\xff", {"a": (1, float("nan"))}, {3}, object])
def test_every_value_makes_valid_json(value: object) -> None:
    """A log line never fails for what is in it: strict JSON, whatever the field."""
    line = logs.JsonFormatter().format(record(thing=value))

    json.loads(line, parse_constant=pytest.fail)


def test_user_text_stays_on_its_line() -> None:
    """Newlines, escapes and broken Unicode in messages and fields cannot forge a line or move a cursor."""
    text = human(TROUBLE, request_id=TROUBLE)

    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert parsed(TROUBLE, request_id=TROUBLE)["request_id"] == TROUBLE


def test_a_traceback_cannot_forge_a_line() -> None:
    """Lines of a traceback are marked, and the exception's own text stays in them; in JSON it is one field."""
    lines = human(exc_info=raised("x\n2026-11-24T00:00:00Z INFO forged")).splitlines()

    assert len(lines) > 3
    assert all(line.startswith("  | ") for line in lines[1:])
    assert "ValueError: x" in parsed(exc_info=raised("x"))["exception"]


def test_a_field_cannot_hide_the_level() -> None:
    """An extra named like one of ours gets a name of its own."""
    entry = parsed(level="DEBUG")

    assert (entry["level"], entry["level_"]) == ("INFO", "DEBUG")


@pytest.fixture(name="root")
def _root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before = root.level, root.handlers
    yield root
    root.level, root.handlers = before


@pytest.mark.parametrize("form", ["human", "json"])
def test_setup_sends_everything_to_one_place(root: logging.Logger, form: Any) -> None:
    """After setup every logger writes to the stream, from the level up, once, also after a second setup."""
    stream = io.StringIO()
    for _ in range(2):
        logs.setup(form, "info", stream)
    logging.getLogger("anything").debug("no")
    logging.getLogger("anything").info("yes", extra={"sequence": 1})

    assert root.level == logging.INFO
    assert len(stream.getvalue().splitlines()) == 1


def test_an_unknown_level_is_refused(root: logging.Logger) -> None:
    """A level that logging does not know is a ValueError and not silence."""
    with pytest.raises(ValueError, match="LOUD"):
        logs.setup("human", "loud")
    assert root.handlers
