"""What can be refused without an engine, and what is made durable of the rest."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.digest import request_digest
from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

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
from sidecar.turns import TurnQueue

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
        assert (item.idempotency_key, item.request_id, item.request_digest) == ("key", "label", digest)
        assert (item.required_grade, item.model_digest) == (types_pb2.GRADE_SERIAL, b"model")
    assert [(item.seed, item.seed_derived) for item in admission.items] == [(0, False), (0, True)]


# ---- the queue of long requests to prepare


@dataclass
class Preparing:
    """A queue, and the calls in it. A call that has its place waits until it is told to end."""

    queue: TurnQueue
    begun: list[int] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    calls: list[tuple[str, asyncio.Task[None], asyncio.Event]] = field(default_factory=list)

    def ask(self, tenant: str, cost: int = 10_000) -> None:
        number, gate = len(self.calls), asyncio.Event()

        async def call() -> None:
            async with self.queue.place(tenant, cost):
                self.begun.append(number)
                await gate.wait()
            self.ended.add(number)

        self.calls.append((tenant, asyncio.create_task(call()), gate))

    def held(self) -> list[int]:
        return [number for number in self.begun if not self.calls[number][1].done()]

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "end", "leave"]), st.sampled_from("abc"), st.integers(0, 9)), max_size=40),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
)
def test_the_places_are_shared(script: list[tuple[str, str, int]], bounds: tuple[int, int]) -> None:
    """Whatever callers do, no more are prepared than there are places, none of a tenant above its own; no place stays free for
    which a request waits; a tenant's requests begin in their order, unless their callers leave; and none is forgotten."""
    places, own = bounds

    async def run() -> None:
        made = Preparing(TurnQueue(places, own, 100))
        for what, tenant, which in script:
            if what == "ask":
                made.ask(tenant)
            elif made.calls:
                _, task, gate = made.calls[which % len(made.calls)]
                task.cancel() if what == "leave" else gate.set()
            await made.settle()
            held = Counter(made.calls[number][0] for number in made.held())
            waits = {each for number, (each, task, _) in enumerate(made.calls) if number not in made.begun and not task.done()}
            assert held.total() <= places
            assert all(count <= own for count in held.values())
            assert held.total() == places or all(held[each] == own for each in waits)
        for _, _, gate in made.calls:
            gate.set()
        await asyncio.gather(*(task for _, task, _ in made.calls), return_exceptions=True)
        for tenant in "abc":
            mine = [number for number in made.begun if made.calls[number][0] == tenant]
            assert mine == sorted(mine)
        assert made.ended == {number for number, (_, task, _) in enumerate(made.calls) if not task.cancelled()}
        assert not (made.queue._held or made.queue._turns or made.queue._waiting.items)

    asyncio.run(run())


async def test_a_flood_of_long_requests_waits_for_itself() -> None:
    """While a tenant floods, another's long request begins at once; of two floods that wait, each gets the same bytes; above
    its bound a tenant is refused with a hint, and another is not."""
    made = Preparing(TurnQueue(2, 1, 20))
    for _ in range(21):
        made.ask("flood", 400_000)
    await made.settle()
    made.ask("other", 5_000)
    await made.settle()
    begun = list(made.begun)
    with pytest.raises(errors.QueueFull, match="of this tenant") as refused:
        async with made.queue.place("flood", 1):
            pass
    for _, task, _ in made.calls:
        task.cancel()
    await asyncio.gather(*(task for _, task, _ in made.calls), return_exceptions=True)

    assert begun == [0, 21]
    assert refused.value.retry_after


def test_a_grammar_counts_as_much_text() -> None:
    """A grammar of a few bytes takes as long as a long text."""
    short = engine_pb2.PrepareRequest(items=[types_pb2.Item(text="x")])
    format_ = types_pb2.ResponseFormat(regex="a")
    grammar = engine_pb2.PrepareRequest(
        items=[types_pb2.Item(text="x", parameters=types_pb2.Parameters(response_format=format_))]
    )

    assert prepare_cost(short) == short.ByteSize()
    assert prepare_cost(grammar) == grammar.ByteSize() + FORMAT_BYTES
