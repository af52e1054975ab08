"""Idempotency keys, cancellation, deadlines, callers that disconnect, and a sidecar that drains."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable

import grpc
import pytest

from ostinato import errors
from ostinato.v1 import generation_pb2

from tests.e2e.kit import (
    ENDLESS,
    SLOWLY,
    Door,
    Heard,
    asked,
    ended,
    heard,
    numbered,
    one,
    own,
    refusal,
    refused,
    rest,
    rule,
    span,
)
from tests.waiting import eventually


@pytest.mark.parametrize(
    ("key", "shown"),
    [("night-7/batch-3", '"night-7/batch-3"'), ('a\n"b\u00e9', r'"a\n\"b\u00e9"'), ("k" * 100, f'"{"k" * 64}"...')],
)
async def test_a_reused_key_is_named(door: Door, key: str, shown: str) -> None:
    """The error has the key as one line of ASCII, shortened, and says what to do."""
    await door.client.generate("a", key=key, max_new_tokens=1)

    with pytest.raises(errors.KeyReused) as refused:
        await door.client.generate("b", key=key, max_new_tokens=1)
    assert refused.value.message == (
        f"the idempotency key {shown} was used for another request: use another key, or send the same request"
    )


async def test_a_retry_joins_what_is_in_flight(door: Door) -> None:
    """Two callers with one key share one run; a stream that joins late gets every token from the first."""
    before = door.pair.metrics()["ostinato_admitted_items_total"]
    request = asked(["a", "b"], key="joined", max_new_tokens=200, ignore_eos=True)
    early, first = await door.begun(request)

    late, unary = await asyncio.gather(door.streamed(request), door.generation.Generate(request))
    first, second = await rest(early, first), heard(late)

    assert (first.repeated, second.repeated) == (False, True)
    assert first.results == second.results == list(unary.results)
    for result in unary.results:
        assert first.tokens[result.sequence] == second.tokens[result.sequence] == list(result.output.token_ids)
    assert door.pair.metrics()["ostinato_admitted_items_total"] == before + 2


async def test_an_unkeyed_deadline_ends_the_work(door: Door) -> None:
    """The items become FAILED with DEADLINE_EXCEEDED, whichever side notices first, and the engine is free."""
    first = await door.last_sequence() + 1

    generation = door.generation
    for seconds in (0.002, 0.005, 0.05, 0.5):
        calls: list[Awaitable[object]] = [generation.Generate(one(**ENDLESS), timeout=seconds) for _ in range(5)]
        calls += [rest(generation.GenerateStream(one(**ENDLESS), timeout=seconds), Heard()) for _ in range(5)]
        codes = {error.code for error in await asyncio.gather(*map(refusal, calls))}
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}

    last = await door.last_sequence()
    assert last >= first, "those that took longer than an admission have numbers"
    assert {await door.outcome(number) for number in range(first, last + 1)} == {("FAILED", "DEADLINE_EXCEEDED")}
    await door.freed()


async def test_an_unkeyed_caller_that_disconnects_ends_the_work(door: Door) -> None:
    """All its items become CANCELLED, and the engine is free."""
    call, listener = await door.begun(asked(["a", "b"], **ENDLESS))
    unary = asyncio.ensure_future(door.client.generate("c", **ENDLESS))
    first = listener.first
    await numbered(door.client, first + 2)

    call.cancel()
    unary.cancel()

    for sequence in range(first, first + 3):
        assert await door.outcome(sequence) == ("CANCELLED", "CANCELLED")
    await door.freed()


@pytest.mark.parametrize("key", ["", "cancelled"])
async def test_cancel_while_it_runs(door: Door, key: str) -> None:
    """Cancel answers once the outcomes are durable; the stream gets them, and the engine is free. By key it ends the whole
    batch, also when its caller has disconnected; a retry gets the same sequences, with those outcomes."""
    request = asked(["a", "b"], key, **ENDLESS)
    stream, listener = await door.begun(request)
    first = listener.first
    if key:
        stream.cancel()

    answer = await door.generation.Cancel(generation_pb2.CancelRequest(idempotency_key=key) if key else span(first, first + 1))

    assert (answer.cancelled, answer.ended) == (2, 0)
    results = (await door.generation.Generate(request)).results if key else (await rest(stream, listener)).results
    assert [result.sequence for result in results] == [first, first + 1]
    assert {errors.from_status(result.status).reason for result in results} == {"CANCELLED"}
    assert await door.kinds(first) == ["CANCELLED"]
    await door.freed()


async def test_cancel_after_the_end(door: Door) -> None:
    """An item that has ended keeps its outcome and is counted as ended."""
    stamp = (await door.client.generate(["a", "b"], max_new_tokens=2)).stamp

    for _ in range(2):
        answer = await door.generation.Cancel(span(stamp.first_sequence, stamp.first_sequence + 1))
        assert (answer.cancelled, answer.ended) == (0, 2)
    assert await door.outcome(stamp.first_sequence) == ("COMPLETED", "")


async def test_draining() -> None:
    """On SIGTERM it refuses new work with a retry delay, finishes what it has, and exits with 0."""
    async with own(**SLOWLY, rules=[rule("hang", 1, sequences=[1])]) as door:
        held, holder = await door.begun(one())
        stream, listener = await door.begun(one(max_new_tokens=200, ignore_eos=True))
        os.kill(door.pair.sidecar.pid, signal.SIGTERM)
        door.pair.sidecar.wait_for("draining")

        said = await refused(door.generation.Generate(one()), errors.Draining)
        assert said.retry_after is not None, said
        assert await door.health() == "NOT_SERVING"
        assert await door.last_sequence() == listener.first
        (result,) = (await rest(stream, listener)).results

        listener.whole()
        assert len(result.output.token_ids) == 200
        assert door.pair.sidecar.running, "the first one is not finished yet"
        await door.client.cancel(1)
        await rest(held, holder)
        code, log = await asyncio.to_thread(ended, door.pair.sidecar)
        assert code == 0, log


async def test_a_drain_that_runs_out_of_time() -> None:
    """Callers with a key get DRAINING and a retry delay, and the next sidecar has their answers; items without a key are
    ABANDONED."""
    async with own("--drain-seconds", "0", **SLOWLY, rules=[rule("hang", 1, attempts=[1])]) as door:
        request = asked("a", key="left", max_new_tokens=4)
        stream, listener = await door.begun(request)
        waiting = asyncio.ensure_future(refused(door.generation.Generate(request), errors.Draining))
        unkeyed, other = await door.begun(one())
        await eventually(lambda: door.pair.metrics()["ostinato_repeated_requests_total"] == 1, "it waits for the same answer")
        os.kill(door.pair.sidecar.pid, signal.SIGTERM)

        for said in (await refused(rest(stream, listener), errors.Draining), await waiting):
            assert said.retry_after is not None, said
        (result,) = (await rest(unkeyed, other)).results
        assert errors.from_status(result.status).reason == "ABANDONED"
        code, log = await asyncio.to_thread(ended, door.pair.sidecar)
        assert code == 0, log

        door.pair.start_sidecar().wait_for("engine connected")
        (result,) = (await door.client.generate(request)).results
        assert (result.WhichOneof("outcome"), result.attempt) == ("output", 2)
