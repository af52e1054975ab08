"""What the tests of bad requests, bad callers and bad luck share: requests, and a listener."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato.requests import batch
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.conftest import Door, opened
from tests.pair import running_pair

Request = generation_pb2.GenerateRequest
Item, Parameters, TokenIds = types_pb2.Item, types_pb2.Parameters, types_pb2.TokenIds

ENDLESS: dict[str, Any] = {"max_new_tokens": 4000, "ignore_eos": True}
"""Of an engine that works slowly: 20 seconds at least."""


def scripted(script: Mapping[str, object], *more: str) -> Sequence[str]:
    """Arguments of a service that earns no grade, and so starts quickly."""
    return ["--script", json.dumps(script), "--self-test", "off", *more]


@contextlib.asynccontextmanager
async def own(service: Mapping[str, object] | None = None, *sidecar: str) -> AsyncIterator[Door]:
    """A pair for one test alone."""
    with running_pair(service=scripted(service or {}), sidecar=sidecar) as pair:
        async with opened(pair) as door:
            yield door


def items(*given: types_pb2.Item, **parameters: Any) -> Request:
    return Request(items=given, parameters=Parameters(**parameters))


def one(**parameters: Any) -> Request:
    """A good prompt, and these parameters."""
    return items(Item(text="hello"), **parameters)


def asked(prompts: Any, key: str = "", **parameters: Any) -> Request:
    """What a client would send."""
    return batch(prompts, key, sampling=parameters)  # type: ignore[arg-type]


def ids(count: int) -> types_pb2.Item:
    return Item(token_ids=TokenIds(ids=[65] * count))


def bytes_of(response: generation_pb2.GenerateResponse) -> bytes:
    return response.SerializeToString(deterministic=True)


class Heard:
    """What a listener has who obeys Restarted; asserts that nothing is missing, repeated or out of place."""

    def __init__(self) -> None:
        self.stamp = types_pb2.Stamp()
        self.repeated = False
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.restarts: list[int] = []
        self.results: list[types_pb2.Result] = []

    def hear(self, event: generation_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        assert (kind == "admitted") == (not self.stamp.count), f"Admitted comes first, and once:\n{event}"
        match kind:
            case "admitted":
                self.stamp, self.repeated = event.admitted.stamp, event.admitted.repeated_key
                first = self.stamp.first_sequence
                self.tokens = {first + i: [] for i in range(self.stamp.count)}
                self.texts = dict.fromkeys(self.tokens, "")
            case "tokens":
                for run in event.tokens.runs:
                    known = self.tokens[run.sequence]
                    assert run.first_token == len(known), f"token {len(known)} was due:\n{run}"
                    known.extend(run.token_ids)
                    self.texts[run.sequence] += run.text
            case "restarted":
                self.restarts.append(event.restarted.sequence)
                self.tokens[event.restarted.sequence], self.texts[event.restarted.sequence] = [], ""
            case _:
                self.results.append(event.finished if kind == "finished" else event.failed)
                self.results.sort(key=lambda result: result.sequence)

    def whole(self) -> None:
        """Assert that what was streamed is what was answered."""
        for result in self.results:
            assert result.HasField("output"), result
            assert self.tokens[result.sequence] == list(result.output.token_ids)
            assert self.texts[result.sequence] == result.output.text


def heard(events: Sequence[generation_pb2.GenerateEvent]) -> Heard:
    listener = Heard()
    for event in events:
        listener.hear(event)
    return listener


async def begun(door: Door, request: Request) -> tuple[Any, Heard]:
    """A stream that has got its first tokens."""
    stream: Any = door.generation.GenerateStream(request)
    return stream, heard([await stream.read(), await stream.read()])


async def rest(stream: Any, listener: Heard) -> Heard:
    """Read a stream to its end."""
    while (event := await stream.read()) is not grpc.aio.EOF:
        listener.hear(event)
    return listener


async def newest_is(door: Door, sequence: int) -> bool:
    return await door.last_sequence() == sequence


def span(first: int, last: int) -> generation_pb2.CancelRequest:
    return generation_pb2.CancelRequest(range=generation_pb2.SequenceRange(first=first, last=last))


async def entries(door: Door, from_index: int, *, payloads: bool = False) -> list[int]:
    """Indexes that a Tail without follow sends."""
    stream = door.sequencer.Tail(sequencer_pb2.TailRequest(from_index=from_index, payloads=payloads))
    return [entry.header.index async for response in stream for entry in response.entries]


async def replayed(door: Door, first: int, last: int, **options: Any) -> list[sequencer_pb2.ReplayResponse]:
    span = generation_pb2.SequenceRange(first=first, last=last)
    return [each async for each in door.sequencer.Replay(sequencer_pb2.ReplayRequest(range=span, **options))]


async def health(door: Door, service: str = "ostinato.v1.Generation") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(door.channel).Check(request)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def healthy(door: Door) -> bool:
    return await health(door) == "SERVING"


async def not_serving(door: Door) -> bool:
    return await health(door) == "NOT_SERVING"
