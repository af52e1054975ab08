"""The service's RPCs other than Execute, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ostinato.digest import fingerprint_digest
from ostinato.errors import EngineUnavailable, InvalidRequest, NotBuilt, QueueFull
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from service import stream as module
from service.engines.huggingface import zipped
from service.engines.scripted import ByteVocabulary
from service.prepare import Wanted, Workers
from service.stream import EngineServicer
from tests.service.support import refused, served
from tests.waiting import eventually


async def test_describe() -> None:
    """Describe has the model, its limits, its capacity, its fingerprint and its grade."""
    async with served({"runs": 3, "kv_blocks": 7, "model": "m", "fields": {"device": "d"}}, batch_items_max=9) as service:
        found = await service.stub.Describe(engine_pb2.DescribeRequest())

        assert (found.model.name, found.model.engine, found.model.vocabulary_size) == ("m", "scripted", 262)
        assert (found.model.context_tokens, found.model.limits.new_tokens_max) == (4096, 4095)
        limits = found.model.limits
        assert (limits.batch_items_max, limits.top_k_max, limits.logprobs_max) == (9, 1024, 20)
        assert all(getattr(limits, field.name) for field in limits.DESCRIPTOR.fields)
        assert (found.capacity.runs, found.capacity.kv_blocks, found.capacity.block_tokens) == (3, 7, 64)
        assert dict(found.model.fingerprint.fields).items() >= {"engine": "scripted", "model": "m", "device": "d"}.items()
        assert found.model.fingerprint.digest == fingerprint_digest(found.model.fingerprint.fields)
        assert found.incarnation == "0" * 32
        assert found.model.chat
        assert service.sample("ostinato_engine_capacity", of="runs") == 3


async def test_not_ready_is_unavailable() -> None:
    """Until the engine is tested every RPC is UNAVAILABLE, with a retry delay."""
    async with served() as service:
        service.servicer.streams = None
        for call in (
            service.stub.Describe(engine_pb2.DescribeRequest()),
            service.stub.Prepare(engine_pb2.PrepareRequest()),
            service.stub.Tokenize(generation_pb2.TokenizeRequest()),
            service.stub.Execute(iter([engine_pb2.ExecuteRequest()])).read(),
        ):
            with refused(EngineUnavailable) as errors:
                await call
            assert errors[0].retry_after == 1.0


async def test_hello_is_heard_before_a_stream_is_refused() -> None:
    """A service that is not ready reads hello before it refuses: gRPC would report a failed write and not the refusal."""
    asked, says = asyncio.Event(), asyncio.Event()

    async def requests() -> AsyncIterator[engine_pb2.ExecuteRequest]:
        asked.set()
        await says.wait()
        yield engine_pb2.ExecuteRequest()

    servicer = EngineServicer(Workers(threads=1, queue_max=1))
    context: Any = None
    async with contextlib.aclosing(servicer.Execute(requests(), context)) as frames:
        answer = asyncio.ensure_future(anext(frames))
        await asyncio.wait({answer, asyncio.ensure_future(asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert not answer.done()
        says.set()
        with pytest.raises(EngineUnavailable):
            await answer


async def test_get_tokenizer_is_a_zip_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """GetTokenizer's chunks make a zip of tokenizer.json and tokenizer_config.json."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    async with served() as service:
        chunks = [part.chunk async for part in service.stub.GetTokenizer(engine_pb2.GetTokenizerRequest())]

        with zipfile.ZipFile(io.BytesIO(b"".join(chunks))) as packed:
            assert packed.testzip() is None
            assert packed.namelist() == ["tokenizer.json", "tokenizer_config.json"]
            assert "<|begin|>" in json.loads(packed.read("tokenizer.json"))["model"]["vocab"]
        assert {len(chunk) for chunk in chunks[:-1]} == {1000}


async def test_a_tokenizer_that_cannot_be_told_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """GetTokenizer answers UNIMPLEMENTED, with the reason, for a vocabulary that has no such form."""

    def files(_: ByteVocabulary) -> dict[str, bytes]:
        raise ValueError("it is of no known kind")

    monkeypatch.setattr(ByteVocabulary, "files", files)
    async with served() as service:
        with refused(NotBuilt) as errors:
            await service.stub.GetTokenizer(engine_pb2.GetTokenizerRequest()).read()
        assert "it is of no known kind" in errors[0].message


@pytest.mark.parametrize("text", ["hi", "x" * 4000, "x" * 9000], ids=["small", "large", "over the context"])
async def test_prepare_small_and_large(text: str) -> None:
    """A request has the same response on the event loop and in a thread."""
    async with served({"context_tokens": 8192}) as service:
        call = service.stub.Prepare(engine_pb2.PrepareRequest(items=[types_pb2.Item(text=text)] * 2))
        if len(text) > 8191:
            with refused(InvalidRequest):
                await call
        else:
            response = await call
            assert [len(item.token_ids) for item in response.items] == [len(text) + 1] * 2
            assert len(response.model_digest) == 32


async def test_model_digest_is_of_the_model_alone() -> None:
    """The model digest depends on the tokenizer and not on the device."""

    async def digest(**fields: str) -> bytes:
        async with served({"fields": fields}) as service:
            request = engine_pb2.PrepareRequest(items=[types_pb2.Item(text="x")])
            return (await service.stub.Prepare(request)).model_digest

    assert await digest() == await digest(device="other")
    assert await digest() != await digest(tokenizer="other")


async def test_workers_are_bounded() -> None:
    """Beyond threads and queue, work is refused with a retry delay; a cancelled caller does not free its thread."""
    workers, gate = Workers(threads=1, queue_max=1), threading.Event()
    busy = [asyncio.create_task(workers.run(lambda _: gate.wait())) for _ in range(2)]
    await asyncio.sleep(0)  # each has taken its place
    busy[0].cancel()
    with pytest.raises(QueueFull) as caught:
        await workers.run(lambda _: gate.wait())
    gate.set()
    await asyncio.gather(*busy, return_exceptions=True)

    assert caught.value.retry_after == 1.0
    assert await workers.run(lambda _: 5) == 5
    workers.close()


async def test_work_of_callers_who_left_is_dropped() -> None:
    """When its caller is cancelled, work that waits never begins and its place is free; work that has begun is told."""
    workers, begun, gate = Workers(threads=1, queue_max=1), list[int](), threading.Event()
    told = list[bool]()

    def first(wanted: Wanted) -> None:
        begun.append(1)
        gate.wait()
        told.append(wanted())

    busy = [asyncio.create_task(workers.run(work)) for work in (first, lambda _: begun.append(2))]
    await eventually(lambda: begun == [1], "the first has begun")
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    await eventually(lambda: workers._now == 1, "one place is free")
    third = asyncio.create_task(workers.run(lambda _: begun.append(3)))
    gate.set()
    await third

    assert (begun, told) == ([1, 3], [False])
    workers.close()


def test_the_archive_is_the_same_for_the_same_files() -> None:
    """The archive has the same bytes whatever the order of the files and the day, and unpacks to them."""
    files = {"b": b"2" * 5000, "a": b"1"}
    packed = zipped(files)

    assert packed == zipped(dict(reversed(files.items())))
    with zipfile.ZipFile(io.BytesIO(packed)) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == files
