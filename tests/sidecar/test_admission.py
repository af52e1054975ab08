"""What can be refused without an engine, and what is made durable of the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from ostinato import errors
from ostinato.digest import request_digest
from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2
from serving.hop import ITEM_BYTES

from sidecar.admission import (
    FORMAT_BYTES,
    SIGNED_BYTES,
    STAMP_BYTES,
    VERDICT_BYTES,
    check,
    check_size,
    draft,
    prepare_cost,
    response_bytes_max,
)
from sidecar.config import Settings
from sidecar.journal.ledger import SIGNED_ENTRIES_MAX

SETTINGS = Settings(max_response_bytes=4096, response_bytes_ceiling=8192, batch_items_max=2)
Request = generation_pb2.GenerateRequest
ITEM = types_pb2.Item(text="hello")


# ---- metadata


def asked(*values: str | bytes) -> int:
    """What a client with this metadata reads."""
    other: list[tuple[str, str | bytes]] = [("user-agent", "a test"), ("other-bin", b"\xff")]
    return response_bytes_max([*other, *((RESPONSE_BYTES_METADATA, value) for value in values)], SETTINGS)


@pytest.mark.parametrize(
    ("values", "most"),
    [
        ([], 4096),
        (["1"], 1),
        (["5000"], 5000),
        ([b"5000"], 5000),
        (["0005000"], 5000),
        (["8193"], 8192),
        (["9" * 20], 8192),
        (["5000", "6000"], 5000),
    ],
    ids=["not said", "little", "more", "as bytes", "leading zeros", "over the ceiling", "huge", "twice: the first"],
)
def test_what_a_client_reads(values: Sequence[str | bytes], most: int) -> None:
    """What it says, in decimal, up to the ceiling; if it says nothing, the setting."""
    assert asked(*values) == most


@pytest.mark.parametrize("value", ["", "0", "00", "-1", "+1", "1.0", "1e3", " 1", "1 ", "0x10", "１", "٣", "9" * 21, b"\xff1"])
def test_what_is_no_number(value: str | bytes) -> None:
    """Anything but ASCII digits is refused, by the name of the metadata."""
    with pytest.raises(errors.InvalidRequest) as caught:
        asked(value)
    assert [violation.field for violation in caught.value.violations] == ["metadata.ostinato-max-response-bytes"]


# ---- the request by itself


def fields(request: Request) -> list[str]:
    """What is wrong with it."""
    try:
        check(request, SETTINGS)
    except errors.InvalidRequest as error:
        return [violation.field for violation in error.violations]
    return []


def test_bounds_are_inclusive() -> None:
    """Each limit itself is allowed, one more is not; lengths are bytes, not characters."""
    good = {"items": [ITEM] * 2, "idempotency_key": "é" * 128, "request_id": "x" * 256, "required_grade": types_pb2.GRADE_EXACT}
    assert fields(Request(**good)) == []  # type: ignore[arg-type]
    for name, value in {
        "items": [ITEM] * 3,
        "idempotency_key": "é" * 129,
        "request_id": "x" * 257,
        "required_grade": 4,
    }.items():
        assert fields(Request(**(good | {name: value}))) == [name]  # type: ignore[arg-type]


def test_everything_wrong_is_named() -> None:
    """All of it, not the first."""
    assert fields(Request(request_id="x" * 257, required_grade=-1)) == ["items", "request_id", "required_grade"]  # type: ignore[arg-type]


# ---- once it is prepared

PREPARED = engine_pb2.PrepareResponse(
    model_digest=b"model",
    items=[
        engine_pb2.PreparedItem(
            token_ids=[1, 2], parameters=types_pb2.ResolvedParameters(max_new_tokens=4), seed=0, kv_tokens=6, result_bytes=1000
        ),
        engine_pb2.PreparedItem(
            token_ids=[3], parameters=types_pb2.ResolvedParameters(max_new_tokens=5), kv_tokens=6, result_bytes=2000
        ),
    ],
)


def test_an_answer_that_may_be_too_large() -> None:
    """The sum of the worst cases and a stamp may reach the limit, and not pass it."""
    check_size(PREPARED, STAMP_BYTES + 3000)
    with pytest.raises(errors.InvalidRequest, match="3512 bytes, the client reads 3511") as caught:
        check_size(PREPARED, STAMP_BYTES + 2999)
    assert [violation.field for violation in caught.value.violations] == ["items"]
    check_size(PREPARED, STAMP_BYTES + 3000 + 2 * VERDICT_BYTES, verify=True)
    with pytest.raises(errors.InvalidRequest):
        check_size(PREPARED, STAMP_BYTES + 2999 + 2 * VERDICT_BYTES, verify=True)
    check_size(PREPARED, STAMP_BYTES + 3000 + 2 * SIGNED_BYTES, signed=True)
    with pytest.raises(errors.InvalidRequest):
        check_size(PREPARED, STAMP_BYTES + 2999 + 2 * SIGNED_BYTES, signed=True)


def test_a_signed_receipt_is_no_larger_than_is_reckoned() -> None:
    """The head and the path of an entry in the largest transaction take no more than SIGNED_BYTES."""
    head = types_pb2.SignedHead(log_id="a" * 32, first_index=2**63 - 1, last_index=2**63 - 1, key_id="a" * 16)
    head.entry_hash = head.root = bytes(32)
    head.signature = bytes(64)

    signed = types_pb2.Receipt(head=head, path=[bytes(32)] * SIGNED_ENTRIES_MAX.bit_length())
    assert signed.ByteSize() <= SIGNED_BYTES


def test_a_draft_has_all_that_a_rerun_needs() -> None:
    """Token ids, parameters, seeds (0 is one that was given), labels, grade and model, item by item."""
    request = Request(items=[ITEM] * 2, idempotency_key="key", request_id="label", required_grade=types_pb2.GRADE_SERIAL)

    admission = draft(request, PREPARED, "", os.urandom)

    digest = request_digest(request)
    assert (admission.key, admission.request_digest, admission.tenant) == ("key", digest, "")
    for item, made in zip(admission.items, PREPARED.items, strict=True):
        assert (item.token_ids, item.parameters) == (made.token_ids, made.parameters)
        assert (item.request_id, item.required_grade, item.model_digest) == ("label", types_pb2.GRADE_SERIAL, b"model")
    assert [(item.seed, item.seed_derived) for item in admission.items] == [(0, False), (0, True)]


def test_a_grammar_counts_as_much_text() -> None:
    """A grammar of a few bytes takes as long as a long text."""
    short = engine_pb2.PrepareRequest(items=[types_pb2.Item(text="x")])
    format_ = types_pb2.ResponseFormat(regex="a")
    grammar = engine_pb2.PrepareRequest(
        items=[types_pb2.Item(text="x", parameters=types_pb2.Parameters(response_format=format_))]
    )

    assert prepare_cost(short) == short.ByteSize() + ITEM_BYTES
    assert prepare_cost(grammar) == grammar.ByteSize() + ITEM_BYTES + FORMAT_BYTES
