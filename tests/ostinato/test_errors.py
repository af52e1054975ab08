"""The table of errors: in the code, in the documentation, and over the wire."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato import errors
from ostinato.errors import TABLE, InvalidRequest, OstinatoError, QueueFull, Violation, from_code, from_status, to_status

ROOT = Path(__file__).parents[2]

plain = st.text(max_size=20)
violations = st.lists(st.builds(Violation, plain, plain), max_size=3)


@st.composite
def any_error(draw: st.DrawFn) -> OstinatoError:
    """Any error of the table, with all fields."""
    kind = TABLE[draw(st.sampled_from(sorted(TABLE)))]
    if issubclass(kind, InvalidRequest):
        return kind(draw(plain.filter(bool)), violations=draw(violations))
    wait = draw(st.none() | st.integers(0, 10**9).map(lambda millis: millis / 1000))
    return kind(draw(plain), retry_after=wait, details=draw(st.dictionaries(plain, plain, max_size=3)))


def told(error: OstinatoError) -> tuple[object, ...]:
    """All fields of an error."""
    return type(error), error.code, error.reason, vars(error)


@settings(deadline=None)
@given(any_error())
def test_there_and_back(error: OstinatoError) -> None:
    """from_status is the inverse of to_status."""
    received = status_pb2.Status.FromString(to_status(error).SerializeToString())
    assert told(from_status(received)) == told(error)


def test_on_the_wire() -> None:
    """Every status has the error's code and an ErrorInfo of our domain with a reason of its own, and a RetryInfo only with
    retry_after."""
    assert len(set(TABLE.values())) == len(TABLE)
    for reason, kind in TABLE.items():
        status, info = to_status(kind("because")), error_details_pb2.ErrorInfo()
        assert (status.code, status.message) == (kind.code.value[0], "because")
        assert [detail.Unpack(info) for detail in status.details] == [True]
        assert (info.domain, info.reason) == ("ostinato", reason) and re.fullmatch(r"[A-Z]+(_[A-Z]+)*", reason)


def test_bad_fields() -> None:
    """Each bad field is a violation, and the message has all of them."""
    error = InvalidRequest(violations=[Violation("items[3].parameters.top_p", "above 1"), Violation("items", "too many")])
    assert error.message == "items[3].parameters.top_p: above 1; items: too many"
    assert told(errors.invalid("items", "none")) == told(InvalidRequest(violations=[Violation("items", "none")]))


def test_the_documented_table() -> None:
    """docs/protocol.md lists exactly these reasons with their codes, in the same order."""
    text = (ROOT / "docs/protocol.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| \S.*\. \| \S.*\. \|$", text, re.MULTILINE)

    assert rows == [(reason, kind.code.name) for reason, kind in TABLE.items()]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_foreign(code: grpc.StatusCode) -> None:
    """A status without our details keeps its code and has a message; CANCELLED becomes Disconnected."""
    error = from_status(status_pb2.Status(code=code.value[0]))

    assert error.code is (grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.CANCELLED else code)
    assert error.reason in {"UNKNOWN", "DISCONNECTED", "DEADLINE_EXCEEDED"}
    assert told(error) == told(from_code(code, ""))
    assert OstinatoError.code is grpc.StatusCode.UNKNOWN


def test_what_is_not_ours() -> None:
    """A reason of another domain, an unknown one, or a malformed detail gives a plain OstinatoError."""
    for domain, reason in (("elsewhere", "QUEUE_FULL"), ("ostinato", "FROM_THE_FUTURE")):
        status = status_pb2.Status(code=8, message="no")
        status.details.add().Pack(error_details_pb2.ErrorInfo(domain=domain, reason=reason))
        error = from_status(status)
        assert (error.code, error.reason, error.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "UNKNOWN", "no")
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    assert from_status(status_pb2.Status(code=8, details=[broken])).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for code in (0, 99):  # OK is no error
        assert from_status(status_pb2.Status(code=code)).code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(("seconds", "read"), [(10**15, 1e6), (-(10**9), 0), (5, 5)])
def test_a_pause_is_bounded(seconds: int, read: float) -> None:
    """However long a peer asks to wait, the pause is one that timers can take."""
    status = to_status(QueueFull("full", retry_after=1.0))
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.seconds = seconds
            detail.Pack(retry)
    assert from_status(status).retry_after == read
