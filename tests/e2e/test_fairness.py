"""A tenant that floods a real pair, and another that does not."""

from __future__ import annotations

import json

import grpc
import pytest

from ostinato import errors
from ostinato.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from serving.auth import TENANT_METADATA

from tests.e2e.kit import span
from tests.pair import Pair
from tests.waiting import eventually

FLAGS = ("--trust-tenant-metadata", "--window-runs-max", "1", "--numbered-items-max", "1", "--tenant-queue-items-max", "20")


async def test_a_flood_waits_in_its_own_queue() -> None:
    """While an item holds the engine, 20 of one tenant wait without numbers and its next is refused with a hint; one who leaves
    burns no number; another tenant's request is numbered at once, and every number ends."""
    script = json.dumps({"runs": 1, "rules": [{"do": "hang", "sequences": [1]}]})
    with Pair(service=["--script", script], sidecar=FLAGS) as pair:
        pair.start()
        async with grpc.aio.insecure_channel(pair.target) as channel:
            stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)

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
