"""A real sidecar whose service breaks the protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from ostinato import errors
from ostinato.chain import OUTCOMES
from ostinato.digest import fingerprint_digest, model_digest
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from ostinato.v1.engine_pb2 import RunEvent, Submit
from serving.hop import PEER_SUFFIX, SHORT_BYTES, ServiceEnd
from serving.server import Unix

from tests.e2e.kit import Door, opened, refused
from tests.pair import Pair
from tests.waiting import eventually

Wire = Any
"""A message of the service, or bytes that are none."""

FIELDS = {"engine": "fake", "model": "fake"}
NEW_TOKENS, VOCABULARY = 4, 256


# ---- a service that behaves


def description(**changes: Any) -> engine_pb2.DescribeResponse:
    fingerprint = types_pb2.Fingerprint(fields=FIELDS, digest=fingerprint_digest(FIELDS))
    given: dict[str, Any] = {
        "name": "fake",
        "engine": "fake",
        "vocabulary_size": VOCABULARY,
        "grade": types_pb2.GRADE_EXACT,
    } | changes
    capacity = given.pop("capacity", engine_pb2.Capacity(runs=4, kv_blocks=64, block_tokens=16))
    return engine_pb2.DescribeResponse(model=types_pb2.Model(fingerprint=fingerprint, **given), capacity=capacity)


def welcome(**changes: Any) -> engine_pb2.ExecuteResponse:
    return engine_pb2.ExecuteResponse(welcome=engine_pb2.Welcome(description=description(**changes)))


def prepared(item: types_pb2.Item) -> engine_pb2.PreparedItem:
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    return engine_pb2.PreparedItem(token_ids=item.text.encode(), parameters=parameters, kv_tokens=16, result_bytes=1024)


def prepare(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    return engine_pb2.PrepareResponse(items=map(prepared, request.items), model_digest=model_digest(FIELDS))


def answer(submit: Submit) -> list[int]:
    """Equal inputs have equal answers."""
    return [(sum(submit.token_ids) + index) % VOCABULARY for index in range(NEW_TOKENS)]


def started(submit: Submit) -> RunEvent:
    return RunEvent(run_id=submit.run_id, started=engine_pb2.Started())


def tokens(submit: Submit, first_token: int, *ids: int) -> RunEvent:
    return RunEvent(run_id=submit.run_id, tokens=engine_pb2.RunTokens(first_token=first_token, token_ids=ids))


def finished(submit: Submit, **changes: Any) -> RunEvent:
    made: dict[str, Any] = {
        "token_ids": answer(submit),
        "finish_reason": types_pb2.FINISH_REASON_LENGTH,
        "seed": submit.seed,
        "engine_seed": submit.seed,
        "grade": types_pb2.GRADE_EXACT,
    }
    return RunEvent(run_id=submit.run_id, finished=engine_pb2.Finished(output=types_pb2.Output(**(made | changes))))


def failed(submit: Submit, *details: any_pb2.Any, code: int = 13) -> RunEvent:
    return RunEvent(run_id=submit.run_id, failed=status_pb2.Status(code=code, message="no", details=details))


def behave(submit: Submit) -> Sequence[Wire]:
    """What a good service says of a run."""
    said = [started(submit), *([tokens(submit, 0, *answer(submit))] if submit.stream else []), finished(submit)]
    return [frame(*said)]


def frame(*events: RunEvent) -> engine_pb2.ExecuteResponse:
    return engine_pb2.ExecuteResponse(events=events)


CLOSE = object()
"""In place of a message: the stream ends here."""


@dataclass
class Fake:
    """Behaves, except for the faults that a test queues."""

    welcomes: list[Wire] = field(default_factory=list)
    """Said once each, in place of Welcome."""
    runs: list[Callable[[Submit], Sequence[Wire]]] = field(default_factory=list)
    """Done once each, to the runs that are submitted next."""
    prepares: list[Callable[[engine_pb2.PrepareRequest], Wire]] = field(default_factory=list)
    hellos: list[engine_pb2.Hello] = field(default_factory=list)
    """Of all streams, in order."""
    submits: list[Submit] = field(default_factory=list)

    async def execute(self, requests: AsyncIterator[engine_pb2.ExecuteRequest], context: Any) -> AsyncIterator[Wire]:
        self.hellos.append((await anext(requests)).hello)
        yield self.welcomes.pop(0) if self.welcomes else welcome()
        async for request in requests:
            for asked in request.prepares:
                response = self._prepared(asked)
                response.prepare_id = asked.prepare_id
                yield engine_pb2.ExecuteResponse(prepared=[response])
            for submit in request.submits:
                self.submits.append(submit)
                for message in (self.runs.pop(0) if self.runs else behave)(submit):
                    if message is CLOSE:
                        return
                    yield message

    async def prepare(self, request: engine_pb2.PrepareRequest, context: Any) -> Wire:
        return self._prepared(request)

    def _prepared(self, request: engine_pb2.PrepareRequest) -> Wire:
        return (self.prepares.pop(0) if self.prepares else prepare)(request)

    async def tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> Wire:
        return b"\xff"


@contextlib.asynccontextmanager
async def served(fake: Fake, address: str) -> AsyncIterator[None]:
    """The fake, on a socket, until the end."""

    def serialised(message: Wire) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    server = grpc.aio.server()
    hop = ServiceEnd()
    engine_pb2_grpc.add_HopServicer_to_server(hop, server)
    handlers: dict[str, Any] = {
        "Execute": grpc.stream_stream_rpc_method_handler(
            fake.execute, request_deserializer=engine_pb2.ExecuteRequest.FromString, response_serializer=serialised
        ),
        "Prepare": grpc.unary_unary_rpc_method_handler(
            fake.prepare, request_deserializer=engine_pb2.PrepareRequest.FromString, response_serializer=serialised
        ),
        "Tokenize": grpc.unary_unary_rpc_method_handler(
            fake.tokenize, request_deserializer=generation_pb2.TokenizeRequest.FromString, response_serializer=serialised
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ostinato.v1.Engine", handlers),))
    server.add_insecure_port(address)
    await hop.hand_out(Unix("--listen", Path(address.removeprefix("unix:") + PEER_SUFFIX)).listening())
    await server.start()
    try:
        yield
    finally:
        hop.close()
        await server.stop(0)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A sidecar without a service; the fakes come and go."""
    with Pair(sidecar=["--reconnect-seconds", "0.02"]) as alone:
        alone.start_sidecar()
        yield alone


@dataclass
class Stage:
    """A sidecar, the fake that it is connected to, and what must hold whatever the fake does."""

    door: Door
    fake: Fake
    faults_before: float

    def faults(self) -> float:
        """Counted since the test began."""
        return self._total() - self.faults_before

    def _total(self) -> float:
        return self.door.pair.metrics().get('ostinato_engine_faults_total{reason="PROTOCOL_VIOLATION"}', 0)

    async def connected(self) -> None:
        metrics = self.door.pair.metrics
        await eventually(lambda: metrics()["ostinato_engine_connected"] == 1, "the sidecar is connected")

    async def sound(self) -> None:
        """Assert that the sidecar lives and works, and that every number has one outcome."""
        assert self.door.pair.sidecar.running
        await self.connected()
        good = await self.door.client.generate("good", timeout=40)
        assert list(good.results[0].output.token_ids) == answer(self.fake.submits[-1]), good
        outcomes: dict[int, list[str]] = {number: [] for number in range(1, good.stamp.first_sequence + 1)}
        async for entry in self.door.client.tail():
            if entry.header.kind in OUTCOMES:
                outcomes[entry.header.sequence].append(types_pb2.EntryKind.Name(entry.header.kind))
        assert {number: said for number, said in outcomes.items() if len(said) != 1} == {}
        assert (await self.door.client.head()).unfinished == 0


@pytest.fixture
async def stage(pair: Pair) -> AsyncIterator[Stage]:
    if not pair.sidecar.running:  # an earlier test says so
        pair.start_sidecar()
    fake = Fake()
    async with served(fake, pair.engine_address), opened(pair) as door:
        stage = Stage(door, fake, 0)
        await eventually(lambda: bool(fake.hellos), "the sidecar comes")
        await stage.connected()
        stage.faults_before = stage.faults()
        yield stage


# ---- on the stream


def broken_details(submit: Submit) -> RunEvent:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo())
    info.value = b"\xff"
    return failed(submit, info)


FAULTS: Mapping[str, Callable[[Submit], Sequence[Wire]]] = {
    "finished, of no run": lambda s: [frame(finished(Submit(run_id=s.run_id + 1000)))],
    "failed, of no run": lambda s: [frame(failed(Submit(run_id=s.run_id + 1000)))],
    "started, of run 0": lambda s: [frame(started(Submit()))],
    "finished before started": lambda s: [frame(finished(s))],
    "started twice": lambda s: [frame(started(s), started(s))],
    "tokens that leave a gap": lambda s: [frame(started(s), tokens(s, 0, 1), tokens(s, 2, 3))],
    "tokens that come again": lambda s: [frame(started(s), tokens(s, 0, 1), tokens(s, 0, 1))],
    "an event that says nothing": lambda s: [frame(started(s), RunEvent(run_id=s.run_id))],
    "an output of other tokens than those streamed": lambda s: [frame(started(s), tokens(s, 0, 1), finished(s))],
    "an output with a token that does not exist": lambda s: [frame(started(s), finished(s, token_ids=[VOCABULARY]))],
    "an output with too many tokens": lambda s: [frame(started(s), finished(s, token_ids=[1] * (NEW_TOKENS + 1)))],
    "an output of another seed": lambda s: [frame(started(s), finished(s, seed=s.seed ^ 1))],
    "an output of an unknown grade": lambda s: [frame(started(s), finished(s, grade=17))],
    "an output of a negative grade": lambda s: [frame(started(s), finished(s, grade=-1))],
    "malformed bytes": lambda s: [b"\xff\xff"],
    "a second welcome without capacity": lambda s: [welcome(capacity=engine_pb2.Capacity())],
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_fault_costs_the_stream_and_no_number(stage: Stage, fault: Callable[[Submit], Sequence[Wire]]) -> None:
    """The fault is counted and logged, the stream is opened again, and the item is run again and completes."""
    stage.fake.runs = [fault]

    events = [event async for event in stage.door.client.stream(["abc", "def"], timeout=40)]

    results = sorted((event.finished for event in events if event.HasField("finished")), key=lambda each: each.sequence)
    assert [list(result.output.token_ids) for result in results] == [answer(Submit(token_ids=t)) for t in (b"abc", b"def")]
    assert stage.faults() >= 1
    assert len(stage.fake.hellos) == 2
    assert [hello.last_sequence for hello in stage.fake.hellos][1] == results[-1].sequence
    assert stage.door.pair.sidecar.said("engine fault")
    await stage.sound()


ENDS: Mapping[str, tuple[Callable[[Submit], Sequence[Wire]], str]] = {
    "failed twice": (lambda s: [frame(started(s), failed(s), failed(s))], "UNKNOWN"),
    "failed, then finished": (lambda s: [frame(started(s), failed(s)), frame(finished(s))], "UNKNOWN"),
    "finished twice": (lambda s: [frame(started(s), finished(s), finished(s))], ""),
    "finished, then failed": (lambda s: [frame(started(s), finished(s)), frame(failed(s))], ""),
    "failed with OK": (lambda s: [frame(started(s), failed(s, code=0))], "UNKNOWN"),
    "failed with an unknown code": (lambda s: [frame(started(s), failed(s, code=99))], "UNKNOWN"),
    "failed with broken details": (lambda s: [frame(started(s), broken_details(s))], "UNKNOWN"),
    "failed without having started": (lambda s: [frame(failed(s))], "UNKNOWN"),
    "cancelled by the service": (lambda s: [frame(failed(s, code=1))], "CANCELLED"),
}


@pytest.mark.parametrize(("fault", "reason"), ENDS.values(), ids=ENDS)
async def test_the_first_end_counts(stage: Stage, fault: Callable[[Submit], Sequence[Wire]], reason: str) -> None:
    """Events after a run's end change nothing, and an invalid failure is still a failure."""
    stage.fake.runs = [fault]

    (result,) = (await stage.door.client.generate("abc", timeout=40)).results

    if reason:
        assert result.status.code != 0, result
        assert errors.from_status(result.status).reason in (reason, "ENGINE_FAILED"), result
    else:
        assert result.HasField("output"), result
    await stage.sound()


WELCOMES: Mapping[str, Wire] = {
    "an empty message": engine_pb2.ExecuteResponse(),
    "events": frame(RunEvent(run_id=1, started=engine_pb2.Started())),
    "malformed bytes": b"\xff\xff",
    "no description": engine_pb2.ExecuteResponse(welcome=engine_pb2.Welcome()),
    "an unknown grade": welcome(grade=17),
}


@pytest.mark.parametrize("first", WELCOMES.values(), ids=WELCOMES)
async def test_no_welcome(stage: Stage, first: Wire) -> None:
    """A stream that does not begin with a valid Welcome is closed and counted, and the sidecar tries again."""
    stage.fake.welcomes = [first, first]
    stage.fake.runs = [lambda s: [CLOSE]]

    await stage.door.client.generate("abc", timeout=40)

    assert len(stage.fake.hellos) == 4
    assert stage.faults() == 2
    await stage.sound()


# ---- beside it


def fewer(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    return prepare(engine_pb2.PrepareRequest(items=request.items[:1]))


SHORT, LONG = "abc", "a" * SHORT_BYTES
"""Prepared over the stream, and by a call."""
USELESS: Mapping[str, tuple[str, Callable[[engine_pb2.PrepareRequest], Wire]]] = {
    "fewer items": (SHORT, fewer),
    "by a call, fewer items": (LONG, fewer),
    "by a call, malformed bytes": (LONG, lambda request: b"\xff\xff"),
}
"""What else is invalid: tests/sidecar/test_link.py."""


@pytest.mark.parametrize(("text", "fault"), USELESS.values(), ids=USELESS)
async def test_a_useless_preparation(stage: Stage, text: str, fault: Callable[[engine_pb2.PrepareRequest], Wire]) -> None:
    """An invalid preparation is never numbered: the caller gets an error at once, and the fault is counted."""
    stage.fake.prepares = [fault, fault]

    async with asyncio.timeout(40), stage.door.nothing_numbered():
        request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text=text)] * 2)
        await refused(stage.door.generation.Generate(request), errors.ProtocolViolation)
        await refused(stage.door.streamed(request), errors.ProtocolViolation)

    assert stage.faults() == 2
    await stage.sound()


async def test_a_useless_tokenisation(stage: Stage) -> None:
    """A malformed answer to Tokenize is an error, not an empty answer."""
    request = generation_pb2.TokenizeRequest(items=[types_pb2.Item(text="abc")])

    await refused(stage.door.generation.Tokenize(request), errors.ProtocolViolation)
    await stage.sound()
