"""What the tests at the public door share: a pair seen from outside, and what a refusal says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import generation_pb2, generation_pb2_grpc, sequencer_pb2_grpc, types_pb2

from tests.pair import Pair, Program, running_pair

GENERATE = "/ostinato.v1.Generation/Generate"
STREAM = "/ostinato.v1.Generation/GenerateStream"
GET = "/ostinato.v1.Sequencer/Get"

SLOWLY = {"delay_seconds": 0.005, "rules": [{"do": "diverge", "at": 3, "purposes": ["REPLAY"]}]}
"""The script of an engine that takes its time, and makes other tokens where it is asked again."""


@dataclass(frozen=True)
class Refusal:
    """An error as it came over the wire: nothing of it is filled in here."""

    code: grpc.StatusCode
    reason: str
    """ErrorInfo's; empty: there is none."""
    fields: tuple[str, ...]
    retry_after: float | None
    message: str

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refusal:
        """What a failed call's status and details say."""
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        status: Any = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            for message in (info, bad, retry):
                detail.Unpack(message)
        assert info.domain in ("", errors.DOMAIN), info
        return cls(
            error.code(),
            info.reason,
            tuple(violation.field for violation in bad.field_violations),
            retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
            error.details() or "",
        )

    def says(self, kind: type[errors.OstinatoError], *fields: str) -> None:
        """Assert that it is this error, about these fields."""
        assert (self.code, self.reason, self.fields) == (kind.code, kind.reason, fields), self


async def refusal(call: Awaitable[object]) -> Refusal:
    """How a call that must fail failed."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return Refusal.of(error)
    raise AssertionError(f"this should have been refused, and was answered:\n{answer}")


async def eventually(condition: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = 30.0) -> None:
    """Wait for something that another process does soon."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


class Door:
    """A running pair, from a caller's side. The client retries some calls by itself; the stubs never do."""

    def __init__(self, pair: Pair, client: Client, channel: grpc.aio.Channel) -> None:
        self.pair, self.client, self.channel = pair, client, channel
        self.generation: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
        self.sequencer: sequencer_pb2_grpc.SequencerAsyncStub = sequencer_pb2_grpc.SequencerStub(channel)

    async def raw(self, method: str, data: bytes) -> bytes:
        """Bytes in, bytes out; of a stream, all its messages one behind the other."""
        if method == STREAM:
            stream = self.channel.unary_stream(method, request_serializer=_as_is, response_deserializer=_as_is)(data)
            return b"".join([part async for part in stream])
        answer: bytes = await self.channel.unary_unary(method, request_serializer=_as_is, response_deserializer=_as_is)(data)
        return answer

    async def streamed(self, request: generation_pb2.GenerateRequest) -> list[generation_pb2.GenerateEvent]:
        """GenerateStream, to its end."""
        return [event async for event in self.generation.GenerateStream(request)]

    async def last_sequence(self) -> int:
        return (await self.client.head()).last_sequence

    @contextlib.asynccontextmanager
    async def nothing_numbered(self) -> AsyncIterator[None]:
        """What is done in here burns no number, and a good request right behind it works."""
        before = await self.last_sequence()
        yield
        assert await self.last_sequence() == before, "a number was burned"
        good = await self.client.generate("good", max_new_tokens=1)
        assert good.stamp.first_sequence == before + 1, good
        assert good.results[0].HasField("output"), good

    async def outcome(self, sequence: int) -> tuple[str, str]:
        """How an item ended, once it has: the kind of its entry, and the reason or "" if it completed."""
        found: list[types_pb2.Result] = []

        async def over() -> bool:
            (record,) = await self.client.get(sequence)
            found[:] = [record.result] if record.HasField("result") else []
            return bool(found)

        await eventually(over, f"sequence {sequence} has an outcome")
        kinds = await self.kinds(sequence)
        assert len(kinds) == 1, f"sequence {sequence} ended {len(kinds)} times: {kinds}"
        reason = "" if found[0].HasField("output") else errors.from_status(found[0].status).reason
        return kinds[0], reason

    async def kinds(self, sequence: int) -> list[str]:
        """Of the outcome entries of a sequence in the whole journal; more than one must never be."""
        outcomes = {"COMPLETED", "FAILED", "CANCELLED", "ABANDONED"}
        named = [
            types_pb2.EntryKind.Name(entry.header.kind).removeprefix("ENTRY_KIND_")
            async for entry in self.client.tail()
            if entry.header.sequence == sequence
        ]
        return [name for name in named if name in outcomes]

    async def freed(self) -> None:
        """Wait until the engine works on nothing."""
        service = self.pair.service
        await eventually(
            lambda: self.pair.metrics(service)["ostinato_engine_runs_in_flight"] == 0, "the engine works on nothing"
        )


@contextlib.asynccontextmanager
async def opened(pair: Pair) -> AsyncIterator[Door]:
    """The door of a pair whose sidecar listens."""
    async with Client(pair.target) as client, grpc.aio.insecure_channel(pair.target) as channel:
        yield Door(pair, client, channel)


def ended(program: Program, seconds: float = 40.0) -> tuple[int, str]:
    """Exit code and log of a program that ends by itself."""
    deadline = time.monotonic() + seconds
    while program.running:
        if time.monotonic() > deadline:
            program.kill()
            raise AssertionError(f"{program.name} still runs:\n" + "\n".join(program.lines[-20:]))
        time.sleep(0.01)
    return program.stop(), "\n".join(program.lines)


@pytest.fixture(scope="session", name="pair")
def _pair() -> Iterator[Pair]:
    """One for all that leave it as it was; its engine takes its time."""
    with running_pair(service=["--script", json.dumps(SLOWLY), "--self-test", "off"]) as shared:
        yield shared


@pytest.fixture(name="door")
async def _door(pair: Pair) -> AsyncIterator[Door]:
    async with opened(pair) as door:
        yield door


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Behind a failure, what the programs logged."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        pairs = {
            each.pair if isinstance(each, Door) else each for each in item.funcargs.values() if isinstance(each, Door | Pair)
        }
        for program in (program for pair in pairs for program in pair.programs):
            report.sections.append(
                (f"log of {program.name} {program.pid}", "\n".join(line[:400] for line in program.lines[-20:]))
            )
    return report


def _as_is(data: bytes) -> bytes:
    return data
