"""VllmEngine of a real sidecar, called as a gateway calls it: receipts, deadlines, tenants, cancellation."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from ostinato import install_hint
from ostinato.chain import check_receipt
from ostinato.v1 import types_pb2

from tests.e2e.kit import Tenants, ended, own, refusal, rule, scripted, tenants
from tests.pair import ROOT, Pair, Program, running_pair
from tests.waiting import eventually

SCRIPT = {"rules": [rule("hang", 100)]}
HANGS = 200
"""More tokens than any run reaches."""
NAME = "vllm.grpc.engine.VllmEngine"


@pytest.fixture(scope="module", name="face")
def _face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with tenants(tmp_path_factory.mktemp("face"), "acme", "zeta", sidecar=["--vllm-face"], **SCRIPT) as face:
        yield face


@pytest.fixture(name="stub")
async def _stub(face: Tenants) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(face.pair.target) as channel:
        yield VllmEngineStub(channel)


def asked(request_id: str = "r", *, stream: bool = False, **parameters: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(input_ids=[97, 98]),
        sampling_params=vllm.SamplingParams(**({"max_tokens": 5} | parameters)),
        stream=stream,
    )


async def code_of(call: Any) -> grpc.StatusCode:
    """The status of a stream, read to its end."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("stream", [True, False])
async def test_receipts_come_in_the_trailers(face: Tenants, stub: Any, stream: bool) -> None:
    """The trailers have the stamp, and receipts that verify offline and equal the journal's."""
    call = stub.Generate(asked(stream=stream, n=2, seed=5), metadata=face.metadata("acme"))
    messages = [message async for message in call]
    trailers = await call.trailing_metadata()
    stamp = types_pb2.Stamp.FromString(dict(trailers)["ostinato-stamp-bin"])
    receipts = [types_pb2.Receipt.FromString(value) for key, value in trailers if key == "ostinato-receipt-bin"]

    assert [message.complete.index for message in messages if message.HasField("complete")] == [0, 1]
    assert any(message.HasField("chunk") for message in messages) == stream
    assert [check_receipt(receipt) for receipt in receipts] == [[], []]
    async with face.client("acme") as client:
        for number, receipt in zip(range(stamp.first_sequence, stamp.first_sequence + stamp.count), receipts, strict=True):
            (record,) = await client.get(number)
            assert record.result.receipt == receipt
            assert record.input.seed == 5 + number - stamp.first_sequence


async def test_credentials_are_required(face: Tenants, stub: Any) -> None:
    """Without a token every call is refused, health included; with one, the item belongs to its tenant."""
    for call in (stub.Generate(asked()).read(), stub.HealthCheck(vllm.HealthCheckRequest())):
        assert (await refusal(call)).code == grpc.StatusCode.UNAUTHENTICATED

    call = stub.Generate(asked("mine"), metadata=face.metadata("zeta"))
    _ = [message async for message in call]
    sequence = types_pb2.Stamp.FromString(dict(await call.trailing_metadata())["ostinato-stamp-bin"]).first_sequence
    async with face.client("ops") as ops:
        (record,) = await ops.get(sequence)
    assert (record.input.tenant, record.input.request_id) == ("zeta", "mine")


async def test_abort(face: Tenants, stub: Any) -> None:
    """Abort ends all calls of this tenant with this request id, as CANCELLED. Unknown ids are ignored."""
    calls = {
        name: stub.Generate(asked("same", stream=True, max_tokens=HANGS, ignore_eos=True), metadata=face.metadata(tenant))
        for name, tenant in (("one", "acme"), ("two", "acme"), ("other", "zeta"))
    }
    for call in calls.values():
        assert (await call.read()).HasField("chunk")
    await stub.Abort(vllm.AbortRequest(request_ids=["same", "unknown"]), metadata=face.metadata("acme"))

    for name in ("one", "two"):
        assert await code_of(calls[name]) == grpc.StatusCode.CANCELLED
    assert not calls["other"].done()
    calls["other"].cancel()
    await eventually(
        lambda: face.pair.metrics(face.pair.service)["ostinato_engine_runs_in_flight"] == 0, "the engine works on nothing"
    )


async def test_a_call_without_a_deadline_has_one() -> None:
    """After --vllm-timeout-seconds the item and its call fail with DEADLINE_EXCEEDED, streamed or not."""
    async with own("--vllm-face", "--vllm-timeout-seconds", "0.5", **SCRIPT) as door:
        stub: Any = VllmEngineStub(door.channel)
        for stream in (True, False):
            call = stub.Generate(asked(stream=stream, max_tokens=HANGS, ignore_eos=True))
            assert await code_of(call) == grpc.StatusCode.DEADLINE_EXCEEDED
            stamp = types_pb2.Stamp.FromString(dict(await call.trailing_metadata())["ostinato-stamp-bin"])
            (record,) = await door.client.get(stamp.first_sequence)
            assert record.result.status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_the_calls_of_a_gateway_s_start(face: Tenants, stub: Any) -> None:
    """Model, load, health and the whole tokenizer with its digest are returned."""
    seen = {"metadata": face.metadata("acme")}
    model = await stub.GetModelInfo(vllm.GetModelInfoRequest(), **seen)
    loads = await stub.GetLoads(vllm.GetLoadsRequest(), **seen)
    chunks = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest(), **seen)]

    assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("scripted", 4096, 262)
    assert len(loads.loads) == loads.dp_rank_count == 1
    assert (await stub.GetServerInfo(vllm.GetServerInfoRequest(), **seen)).server_type == "vllm-grpc"
    assert (await stub.HealthCheck(vllm.HealthCheckRequest(), **seen)).healthy
    assert [len(chunk.sha256) for chunk in chunks] == [0] * (len(chunks) - 1) + [64]
    async with grpc.aio.insecure_channel(face.pair.target) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=NAME))
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_unsupported_calls_are_unimplemented(face: Tenants, stub: Any) -> None:
    """Embeddings, profiles, cache events and the health of other kinds of workers are UNIMPLEMENTED."""
    async with grpc.aio.insecure_channel(face.pair.target) as channel:
        other: Any = sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel)
        metadata = face.metadata("acme")
        for call in (
            stub.Embed(vllm.EmbedRequest(), metadata=metadata),
            stub.FlushCache(common_pb2.FlushCacheRequest(), metadata=metadata),
            stub.StartProfile(common_pb2.StartProfileRequest(), metadata=metadata),
            stub.StopProfile(common_pb2.StopProfileRequest(), metadata=metadata),
            stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), metadata=metadata).read(),
            other.HealthCheck(sglang_scheduler_pb2.HealthCheckRequest(), metadata=metadata),
        ):
            assert (await refusal(call)).code == grpc.StatusCode.UNIMPLEMENTED


async def test_health_without_an_engine() -> None:
    """HealthCheck gives the reason, and the model is UNAVAILABLE."""
    with Pair(sidecar=["--vllm-face"]) as pair:
        pair.start_sidecar()
        async with grpc.aio.insecure_channel(pair.target) as channel:
            stub: Any = VllmEngineStub(channel)
            health = await stub.HealthCheck(vllm.HealthCheckRequest())
            for call in (
                stub.GetModelInfo(vllm.GetModelInfoRequest()),
                stub.Generate(asked()).read(),
                stub.GetTokenizer(common_pb2.GetTokenizerRequest()).read(),
            ):
                assert (await refusal(call)).code == grpc.StatusCode.UNAVAILABLE
        assert (health.healthy, health.message) == (False, "no engine is connected")


async def test_each_gateway_has_the_tokenizer_that_it_was_given() -> None:
    """After a change of the model, a gateway is served only after it has requested the new tokenizer. A connection that has
    requested none is refused, as it may belong to a gateway with the old one."""
    local = [("grpc.use_local_subchannel_pool", 1)]  # else channels of one process share a connection
    with running_pair(service=scripted(), sidecar=["--vllm-face"]) as pair:
        async with (
            grpc.aio.insecure_channel(pair.target, local) as one,
            grpc.aio.insecure_channel(pair.target, local) as two,
            grpc.aio.insecure_channel(pair.target, local) as three,
        ):
            old, new, unknown = (VllmEngineStub(channel) for channel in (one, two, three))
            await given(old)
            assert [await served(stub) for stub in (old, unknown)] == [True, True]
            await asyncio.to_thread(pair.replace_service, "--script", '{"fields": {"tokenizer": "another"}}')

            await given(new)

            assert [await served(stub) for stub in (old, new, unknown)] == [False, True, False]
            assert [await healthy(stub) for stub in (old, new, unknown)] == [False, True, True]
            await given(old)
            assert [await served(stub) for stub in (old, new)] == [True, True]


async def given(stub: Any) -> None:
    """Request the tokenizer, as a gateway does."""
    assert [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]


async def served(stub: Any) -> bool:
    """Whether requests are served, and not refused because of the tokenizer."""
    code = await code_of(stub.Generate(asked()))
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION)
    return code is grpc.StatusCode.OK


async def healthy(stub: Any) -> bool:
    return bool((await stub.HealthCheck(vllm.HealthCheckRequest())).healthy)


def test_its_package_is_needed_only_where_it_is_wanted(tmp_path: Path) -> None:
    """Without smg-grpc-proto the sidecar starts; with --vllm-face it ends at once and names the extra."""
    (tmp_path / "smg_grpc_proto.py").write_text("raise ModuleNotFoundError('it is not installed here')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "proto")])
    flags = ["--listen", "127.0.0.1:0", "--metrics", "", "--journal", str(tmp_path / "journal"), "--log-format", "json"]

    wants = Program("sidecar", [*flags, "--vllm-face"], env={"PYTHONPATH": paths})
    code, log = ended(wants)
    said = json.loads(log.splitlines()[-1])["message"]
    assert (code, said) == (1, f"--vllm-face: it is not installed here; {install_hint('gateway')}")
    assert not (tmp_path / "journal").exists()
    without = Program("sidecar", flags, env={"PYTHONPATH": paths})
    try:
        without.wait_for("listening")
    finally:
        assert without.stop() == 0
