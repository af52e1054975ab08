"""Who may speak on the Execute stream, and what breaks its rules: epochs, writers, hellos, ids and orders."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from ostinato import errors
from ostinato.v1 import engine_pb2

from tests.service.support import ENDLESS, LOG, REPLAY, SLOW, Stream, hello_of, served, submit_of
from tests.waiting import eventually


async def test_stale_epoch_is_refused() -> None:
    """An epoch lower than one seen of this log is refused, also after that one has gone."""
    async with served() as service:
        async with service.stream(epoch=5) as stream:
            await stream.read()
            await stream.done()
        async with service.stream(epoch=4) as stale:
            error = await stale.broken()

        assert isinstance(error, errors.EpochStale)
        assert error.details["highest"] == "5"
        assert service.sample("ostinato_service_streams_refused_total", reason="EPOCH_STALE") == 1


@pytest.mark.parametrize("epoch", [3, 4])
async def test_same_or_higher_epoch_takes_over(epoch: int) -> None:
    """A writer that comes back ends its earlier stream, whose runs stop before the new one's begin."""
    async with served(SLOW) as service, service.stream(epoch=3) as old:
        await old.send(*(submit_of(i, **ENDLESS) for i in range(1, 70)))
        await old.until(1, "tokens")
        async with service.stream(epoch=epoch) as new:
            await new.read()
            await new.send(submit_of(1))

            assert (await new.output(1)).token_ids
            assert isinstance(await old.broken(), errors.EpochStale)
            assert service.idle()


async def test_replaced_stream_can_submit_nothing() -> None:
    """What a replaced sidecar has under way never reaches the engine, even while its stream cannot be told yet."""
    async with served({"record": 100}) as service:
        old_says, new_says = Said(), Said()
        context: Any = None
        old_says(engine_pb2.ExecuteRequest(hello=hello_of(epoch=1)))
        async with contextlib.aclosing(service.servicer.Execute(old_says.all(), context)) as old:
            await anext(old)  # and not read on: as if a write hung
            new_says(engine_pb2.ExecuteRequest(hello=hello_of(epoch=2)))
            async with contextlib.aclosing(service.servicer.Execute(new_says.all(), context)) as new:
                await anext(new)
                old_says(engine_pb2.ExecuteRequest(submits=[submit_of(66)]))
                new_says(engine_pb2.ExecuteRequest(submits=[submit_of(1)]))
                await eventually(lambda: service.engine.submitted)
                await asyncio.sleep(0.02)

                assert list(service.engine.submitted) == [1]
                with pytest.raises(errors.EpochStale):
                    await anext(old)


class Said(asyncio.Queue[engine_pb2.ExecuteRequest]):
    """What a sidecar says, without a socket."""

    __call__ = asyncio.Queue.put_nowait

    async def all(self) -> AsyncIterator[engine_pb2.ExecuteRequest]:
        while True:
            yield await self.get()


@pytest.mark.parametrize("other", [{"writer": "x"}, {"log": "f" * 32}, {"writer": "x", "epoch": 9}])
async def test_another_writer_is_refused(other: dict[str, Any]) -> None:
    """A second log or writer is refused while one is connected, whatever its epoch, and the first goes on undisturbed."""
    async with served(SLOW) as service, service.stream() as first:
        await first.send(submit_of(1, max_new_tokens=20))
        await first.read()
        async with service.stream(**other) as second:
            assert isinstance(await second.broken(), errors.WriterBusy)

        assert len((await first.output(1)).token_ids) == 20


async def test_another_writer_may_come_later() -> None:
    """Once the first writer is gone, another log is served."""
    async with served() as service:
        async with service.stream(epoch=7) as first:
            await first.done()
        async with service.stream(log="e" * 32, writer="x") as second:
            await second.send(submit_of(1))

            assert (await second.output(1)).token_ids


async def test_refused_hello_leaves_no_trace() -> None:
    """A refused epoch does not count as seen: it is not the busy writer's rival that fences it."""
    async with served() as service, service.stream(epoch=3) as first:
        await first.read()
        async with service.stream(writer="x", epoch=9) as second:
            await second.broken()
        async with service.stream(epoch=3) as again:
            await again.send(submit_of(1))

            assert (await again.output(1)).token_ids


@pytest.mark.parametrize(
    ("submits", "kind"),
    [
        ([submit_of(0, sequence=1)], errors.ProtocolViolation),
        ([submit_of(1), submit_of(1, sequence=2)], errors.ProtocolViolation),
        ([submit_of(1, purpose=engine_pb2.PURPOSE_UNSPECIFIED)], errors.ProtocolViolation),
        ([submit_of(1, purpose=42)], errors.ProtocolViolation),
        ([submit_of(1, attempt=0)], errors.ProtocolViolation),
        ([submit_of(1, prompt=b"")], errors.ProtocolViolation),
        ([engine_pb2.Submit(run_id=1, purpose=REPLAY, sequence=1, attempt=1, token_ids=[1])], errors.ProtocolViolation),
        ([submit_of(1, sequence=5), submit_of(2, sequence=5)], errors.OutOfOrder),
        ([submit_of(1, sequence=5), submit_of(2, sequence=4)], errors.OutOfOrder),
        ([submit_of(1, sequence=0)], errors.OutOfOrder),
        ([submit_of(1, sequence=0, attempt=2)], errors.OutOfOrder),
        ([submit_of(1, sequence=5), submit_of(2, sequence=3, attempt=2), submit_of(3, sequence=4)], errors.OutOfOrder),
    ],
)
async def test_broken_rules_end_the_stream(submits: list[engine_pb2.Submit], kind: type[errors.OstinatoError]) -> None:
    """Each rule of Submit, once broken, ends the stream with its error and stops its runs."""
    async with served({"rules": [{"do": "hang"}]}) as service, service.stream() as stream:
        await stream.send(*submits)

        assert type(await stream.broken()) is kind
        await eventually(service.idle)


async def test_run_id_is_used_up_by_its_run() -> None:
    """A run_id is unique in the stream, also after its run has ended."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1))
        await stream.end(1)
        await stream.send(submit_of(1, sequence=2))

        assert isinstance(await stream.broken(), errors.ProtocolViolation)


async def test_reruns_have_no_place_in_the_order() -> None:
    """Only PRIMARY sequences must rise."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1, sequence=5), submit_of(2, sequence=3, purpose=REPLAY), submit_of(3, sequence=6))

        assert (await stream.output(2)) == (await stream.output(1))
        await stream.output(3)


async def test_later_attempts_have_no_place_in_the_order() -> None:
    """Only first attempts must rise, over whatever gaps: what was taken over from another writer comes when it comes."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1, sequence=5), submit_of(2, sequence=3, attempt=2), submit_of(3, sequence=900))
        await stream.send(submit_of(4, sequence=950, attempt=3), submit_of(5, sequence=901))

        for run_id in range(1, 6):
            await stream.output(run_id)


async def test_largest_sequences_and_ids() -> None:
    """2^63 and 2^64-1 are numbers like others."""
    async with served({"record": 9}) as service, service.stream(epoch=2**64 - 1) as stream:
        await stream.send(submit_of(2**63, seed=2**64 - 1), submit_of(2**64 - 1))

        assert (await stream.output(2**63)).seed == 2**64 - 1
        await stream.output(2**64 - 1)
        assert list(service.engine.submitted) == [2**63, 2**64 - 1]


@pytest.mark.parametrize(
    "hello", [hello_of(log=""), hello_of(writer=""), hello_of(epoch=0), None], ids=["log", "writer", "epoch", "none"]
)
async def test_stream_begins_with_a_whole_hello(hello: engine_pb2.Hello | None) -> None:
    """A first message without hello, or with half of one, ends the stream."""
    async with served() as service:
        stream = Stream(service.stub.Execute())
        await stream.send(submit_of(1), hello=hello)

        assert isinstance(await stream.broken(), errors.ProtocolViolation)


async def test_second_hello_ends_the_stream() -> None:
    """Hello stands in the first message only."""
    async with served() as service, service.stream() as stream:
        await stream.send(hello=hello_of(epoch=2))

        assert isinstance(await stream.broken(), errors.ProtocolViolation)


async def test_malformed_message_ends_the_stream() -> None:
    """Bytes that are no message end the stream with INVALID_ARGUMENT, and its runs."""
    async with served(SLOW) as service, grpc.aio.insecure_channel(service.address) as channel:
        raw: Any = channel.stream_stream(
            "/ostinato.v1.Engine/Execute", response_deserializer=engine_pb2.ExecuteResponse.FromString
        )()
        await raw.write(engine_pb2.ExecuteRequest(hello=hello_of(), submits=[submit_of(1, **ENDLESS)]).SerializeToString())
        stream = Stream(raw)
        await stream.until(1, "tokens")
        await raw.write(b"\xff\xff\xff")

        assert isinstance(await stream.broken(), errors.MalformedMessage)
        await eventually(service.idle)


async def test_stream_uses_no_more_than_one_log() -> None:
    """The fixture's log id is the contract's: 32 hexadecimal digits."""
    assert len(bytes.fromhex(LOG)) == 16
