"""A real sidecar whose service breaks the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from ostinato import errors
from ostinato.chain import OUTCOMES
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2
from ostinato.v1.engine_pb2 import RunEvent, Submit
from serving.hop import SHORT_BYTES

from tests.e2e.kit import Door, opened, refused
from tests.engine import (
    CLOSE,
    NEW_TOKENS,
    VOCABULARY,
    Fake,
    Wire,
    answer,
    failed,
    finished,
    frame,
    prepare,
    served,
    started,
    tokens,
    welcome,
)
from tests.pair import Pair
from tests.waiting import eventually


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


UNASKED = engine_pb2.PrepareResponse(prepare_id=2**63)
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
    "an answer to what was not asked": lambda s: [engine_pb2.ExecuteResponse(prepared=[UNASKED])],
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
