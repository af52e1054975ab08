"""A tenant that floods a real pair, and another that does not."""

from __future__ import annotations

import grpc
import pytest

from ostinato import errors
from ostinato.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from serving.auth import TENANT_METADATA

from tests.e2e.kit import own, rule, span
from tests.waiting import eventually

FLAGS = ("--trust-tenant-metadata", "--window-runs-max", "1", "--numbered-items-max", "1", "--tenant-queue-items-max", "20")


async def test_a_flood_waits_in_its_own_queue() -> None:
    """While an item holds the engine, 20 of one tenant wait without numbers and its next is refused with a hint; one who leaves
    burns no number; another tenant's request is numbered at once, and every number ends."""
    async with own(*FLAGS, runs=1, rules=[rule("hang", 0, sequences=[1])]) as door:
        pair, stub = door.pair, door.generation

        def ask(tenant: str) -> grpc.aio.UnaryUnaryCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]:
            item, size = types_pb2.Item(text="x"), types_pb2.Parameters(max_new_tokens=200)
            request = generation_pb2.GenerateRequest(items=[item], parameters=size)
            return stub.Generate(request, metadata=[(TENANT_METADATA, tenant)])

        async def waiting(count: int) -> None:
            await eventually(lambda: pair.metrics()["ostinato_unnumbered_items"] == count, f"{count} wait")

        first = ask("flood")
        await eventually(lambda: pair.metrics()["ostinato_inflight_items"] == 1, "an item holds the engine")
        flood = [ask("flood") for _ in range(20)]
        await waiting(19)
        leaver = ask("flood")
        await waiting(20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask("flood")
        other = ask("other")
        await eventually(lambda: pair.metrics()["ostinato_queue_items"] == 2, "it is numbered")
        leaver.cancel()
        await waiting(19)
        await stub.Cancel(span(1, 1), metadata=[(TENANT_METADATA, "flood")])
        answers = [await call for call in (first, *flood)]
        answer = await other

    error = errors.from_rpc_error(refused.value)
    assert isinstance(error, errors.QueueFull)
    assert error.retry_after is not None
    assert error.retry_after > 0
    assert answer.stamp.first_sequence == 3
    assert sorted(each.stamp.first_sequence for each in (answer, *answers)) == list(range(1, len(answers) + 2))
    assert [result.WhichOneof("outcome") for each in answers[1:] for result in each.results] == ["output"] * 20


async def test_a_tenant_that_has_filled_its_part_of_the_journal_is_refused_alone() -> None:
    """At its bound a tenant is refused with the setting's name, also after a restart, and gets a key's recorded answer; another
    tenant is served."""
    async with own("--trust-tenant-metadata", "--tenant-journal-bytes-max", "20000") as door:
        pair, channel = door.pair, door.channel
        first = await asked(channel, "flood", 1, key="first")
        await asked(channel, "flood", 64)
        told = [await refusal(channel)]
        pair.sidecar.stop()
        pair.start_sidecar().wait_for("engine connected")
        told.append(await refusal(channel))
        again = await asked(channel, "flood", 1, key="first")
        other = await asked(channel, "other", 1)

    assert [(type(error), error.details) for error in told] == [
        (errors.JournalFull, {"setting": "tenant_journal_bytes_max"})
    ] * 2
    assert again == first
    assert other.results[0].HasField("output")


async def refusal(channel: grpc.aio.Channel) -> errors.OstinatoError:
    """Of a request of the tenant that floods."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asked(channel, "flood", 1)
    return errors.from_rpc_error(refused.value)


async def asked(channel: grpc.aio.Channel, tenant: str, items: int, key: str = "") -> generation_pb2.GenerateResponse:
    """The answer to a batch of this tenant. Raises AioRpcError."""
    stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
    request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="x")] * items, idempotency_key=key)
    request.parameters.max_new_tokens = 8
    return await stub.Generate(request, metadata=[(TENANT_METADATA, tenant)], wait_for_ready=True)
