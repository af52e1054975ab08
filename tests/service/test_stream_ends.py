"""How the Execute stream ends: by the sidecar's leave, by its loss, or by the service's stop."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from ostinato.v1 import engine_pb2

from tests.service.support import ENDLESS, SLOW, Service, served, submit_of
from tests.waiting import eventually

NEVER = 1000.0
"""Seconds that no test lasts."""


async def refusing(service: Service) -> None:
    """Until a new call is turned away."""
    async with asyncio.timeout(30):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await service.stub.Describe(engine_pb2.DescribeRequest())
                await asyncio.sleep(0.005)


async def test_disconnect_frees_the_engine() -> None:
    """When the sidecar vanishes, all its runs stop at once."""
    async with served(SLOW) as service:
        async with service.stream() as stream:
            await stream.send(*(submit_of(i, **ENDLESS) for i in range(1, 100)))
            await stream.until(1, "tokens")
            assert not service.idle()
        await eventually(service.idle)

        assert service.sample("ostinato_service_streams") == 0
        assert service.sample("ostinato_engine_runs_in_flight") == 0
        assert service.sample("ostinato_engine_runs_queued") == 0


async def test_half_close_drains() -> None:
    """After half-close runs go on to their end, and then the stream ends well."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(*(submit_of(i, max_new_tokens=20) for i in range(1, 5)))
        await stream.done()

        assert sorted(event.run_id for event in stream.events if event.HasField("finished")) == [1, 2, 3, 4]


async def test_half_close_without_runs_ends() -> None:
    """A stream with nothing to do ends as soon as it is half-closed, welcome included."""
    async with served() as service, service.stream() as stream:
        await stream.done()

        assert len(stream.welcomes) == 1


async def test_stop_waits_for_the_stream() -> None:
    """A service told to stop keeps the stream until the sidecar half-closes, and takes no other call."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, max_new_tokens=30))
        await stream.until(1, "tokens")
        service.streams.drain(NEVER)
        stopping = asyncio.create_task(service.server.stop(NEVER))
        await refusing(service)
        await stream.send(submit_of(2))
        await stream.end(1)
        await stream.end(2)
        await stream.send(submit_of(3))
        await stream.done()
        await stopping

        assert len((await stream.output(1)).token_ids) == 30
        assert (await stream.output(2)).token_ids
        assert (await stream.output(3)).token_ids


async def test_stop_lets_an_idle_sidecar_go() -> None:
    """A service told to stop ends a stream well that nobody half-closes, but not while it has runs."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, max_new_tokens=30), submit_of(2, max_new_tokens=60))
        await stream.until(1, "tokens")
        service.streams.drain(0.02)
        stopping = asyncio.create_task(service.server.stop(NEVER))
        while await stream.read() is not None:
            pass
        await stopping

        assert [len((await stream.output(run_id)).token_ids) for run_id in (1, 2)] == [30, 60]


async def test_a_stream_that_comes_during_a_drain_ends_too() -> None:
    """A stream that was let in at the last moment does not keep a stopping service."""
    async with served() as service:
        service.streams.drain(0.02)
        async with service.stream() as stream:
            while await stream.read() is not None:
                pass

        assert service.sample("ostinato_service_streams") == 0


async def test_stop_ends_when_grace_does() -> None:
    """A sidecar that never half-closes is cut off when the grace is over, and its runs stop."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, **ENDLESS))
        await stream.until(1, "tokens")
        await service.server.stop(0.1)

        await eventually(service.idle)
        await stream.broken()
