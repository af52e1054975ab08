"""Traces across client, sidecar and service: real programs, and a collector that keeps what they export."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

pytest.importorskip("opentelemetry.sdk", reason="no OpenTelemetry: it comes with the extra tracing")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Exported
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from ostinato import errors, tracing
from ostinato.client import Client

from tests.e2e.kit import own
from tests.pair import Pair
from tests.waiting import eventually
from tests.web import receiving

FAILING = {"rules": [{"do": "fail", "at": 1, "sequences": [1]}, {"do": "hang", "at": 2, "sequences": [2], "attempts": [1]}]}
"""The first item fails; the second goes on only in its second attempt."""
SECRET = "a prompt that is not for others"
CALL = "ostinato.v1.Generation/Generate"
TREE = [
    (f"test {CALL}", ""),
    (f"ostinato.sidecar {CALL}", f"test {CALL}"),
    ("ostinato.sidecar ostinato.v1.Engine/Prepare", f"ostinato.sidecar {CALL}"),
    ("ostinato.service ostinato.v1.Engine/Prepare", "ostinato.sidecar ostinato.v1.Engine/Prepare"),
    ("ostinato.sidecar admission", f"ostinato.sidecar {CALL}"),
    ("ostinato.sidecar journal", "ostinato.sidecar admission"),
    *2 * [("ostinato.sidecar item", f"ostinato.sidecar {CALL}")],
    *2 * [("ostinato.sidecar queue", "ostinato.sidecar item")],
    *2 * [("ostinato.sidecar run", "ostinato.sidecar item")],
    *2 * [("ostinato.sidecar journal", "ostinato.sidecar item")],
    *2 * [("ostinato.service run", "ostinato.sidecar run")],
    *2 * [("ostinato.service text_completion scripted", "ostinato.service run")],
]
"""Of a call with two items: its spans, and whose children they are."""
SOON_MILLIS = "50"


@dataclass
class Spans:
    """Of everybody; by service and name, `ostinato.sidecar item`."""

    exported: list[tuple[str, Exported]] = field(default_factory=list)

    def trace(self, trace_id: bytes) -> list[tuple[str, Exported]]:
        return [(name, span) for name, span in self.exported if span.trace_id == trace_id]

    def named(self, name: str, **attributes: object) -> list[Exported]:
        """With these attributes, `sequence=3` for ostinato.sequence."""
        wanted = {f"ostinato.{key}": value for key, value in attributes.items()}
        return [span for found, span in self.exported if found == name and wanted.items() <= of(span).items()]

    async def one(self, name: str, **attributes: object) -> Exported:
        """The only one, once it was exported."""
        await eventually(lambda: bool(self.named(name, **attributes)), f"a span {name} {attributes}")
        (span,) = self.named(name, **attributes)
        return span


def of(span: Exported) -> dict[str, object]:
    """A span's attributes."""
    return {each.key: plain(each.value) for each in span.attributes}


def plain(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, Spans]]:
    """Its target, and what it was sent."""
    spans = Spans()

    def take(body: bytes) -> None:
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {each.key: each.value.string_value for each in group.resource.attributes}["service.name"]
            spans.exported += [(f"{service} {span.name}", span) for scope in group.scope_spans for span in scope.spans]

    with receiving(take) as url:
        yield f"otlp:{url}", spans


@contextlib.contextmanager
def traced_pair(target: str, script: object) -> Iterator[Pair]:
    """A pair whose programs export soon, and whose service does not test itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", SOON_MILLIS)
        service = ["--self-test", "off", "--script", json.dumps(script), "--traces", target]
        with Pair(service=service, sidecar=["--traces", target, "--log-level", "debug"]) as pair:
            yield pair.start()


@contextlib.asynccontextmanager
async def traced_client(target: str, pair: Pair) -> AsyncIterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", SOON_MILLIS)
        tracing.start(target, "test", "", {})
    try:
        async with Client(pair.target) as client:
            yield client
    finally:
        tracing.stop(30)


@pytest.fixture(scope="module")
def pair(collector: tuple[str, Spans]) -> Iterator[Pair]:
    with traced_pair(collector[0], {}) as pair:
        yield pair


@pytest.fixture
async def client(pair: Pair, collector: tuple[str, Spans]) -> AsyncIterator[Client]:
    async with traced_client(collector[0], pair) as client:
        yield client


async def test_one_trace_from_client_to_engine(pair: Pair, client: Client, collector: tuple[str, Spans]) -> None:
    """A call's span is the root; sidecar's and service's spans hang below it, each in its place and with what identifies it;
    log lines and exemplars name the trace; and the prompt is in none of it."""
    _, spans = collector
    answer = await client.generate([SECRET, "b"], request_id="night-7", seed=2**64 - 1, max_new_tokens=5, ignore_eos=True)
    root = await spans.one(f"test {CALL}", request_id="night-7")
    await eventually(lambda: len(spans.trace(root.trace_id)) >= len(TREE), "the whole trace")

    found = spans.trace(root.trace_id)
    names = {span.span_id: name for name, span in found}
    assert sorted((name, names.get(span.parent_span_id, "")) for name, span in found) == sorted(TREE)
    assert all(span.status.code != Status.STATUS_CODE_ERROR for _, span in found)
    header = answer.results[0].receipt.header
    item = await spans.one("ostinato.sidecar item", request_id="night-7", sequence=answer.stamp.first_sequence)
    assert of(item) | {"ostinato.log_id": ""} == {
        "ostinato.sequence": answer.stamp.first_sequence,
        "ostinato.log_id": "",
        "ostinato.writer": "ostinato-0",
        "ostinato.epoch": 1,
        "ostinato.request_id": "night-7",
        "ostinato.seed": str(2**64 - 1),
        "ostinato.attempt": 1,
        "ostinato.outcome": "COMPLETED",
        "ostinato.grade": "BEST_EFFORT",
        "ostinato.fingerprint": header.fingerprint_digest.hex(),
    }
    generated = of(next(span for name, span in found if "text_completion" in name))
    assert generated["gen_ai.request.seed"] == str(2**64 - 1)
    assert (generated["gen_ai.usage.output_tokens"], generated["gen_ai.response.finish_reasons"]) == (5, ["length"])
    assert SECRET not in str(found) and "a prompt" not in str(found)
    ended = [record for record in pair.sidecar.records() if record.get("request_id") == "night-7"]
    assert {record.get("trace_id") for record in ended} == {root.trace_id.hex()}
    exemplar = f'ostinato_item_seconds_bucket.* # {{sequence="\\d+",trace_id="{root.trace_id.hex()}"}}'
    assert re.search(exemplar, pair.sidecar.page(Accept="application/openmetrics-text; version=1.0.0"))


async def test_a_refusal_is_marked(client: Client, collector: tuple[str, Spans]) -> None:
    """With its reason on both sides; it is the client's error, and the server's answer."""
    with pytest.raises(errors.InvalidRequest):
        await client.generate("a", request_id="refused", top_p=2)
    _, spans = collector
    asked = await spans.one(f"test {CALL}", request_id="refused")
    server = await spans.one(f"ostinato.sidecar {CALL}", request_id="refused")

    assert asked.span_id == server.parent_span_id
    assert of(server)["error.type"] == of(asked)["error.type"] == "INVALID_REQUEST"
    assert of(server)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert (server.status.code, asked.status.code) == (Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR)
    assert "top_p" not in str(server) + str(asked)


async def test_a_second_run_is_within_what_asked_for_it(client: Client, collector: tuple[str, Spans]) -> None:
    """The run that verifies an answer is part of its item; the one of a replay, part of the replay's call."""
    _, spans = collector
    answer = await client.generate("a", request_id="verified", verify=True, max_new_tokens=3, ignore_eos=True)
    sequence = answer.stamp.first_sequence
    assert [response.seen async for response in client.replay(sequence)]
    item = await spans.one("ostinato.sidecar item", request_id="verified")
    verify = await spans.one("ostinato.sidecar verify", sequence=sequence)
    replay = await spans.one("ostinato.sidecar replay", sequence=sequence)
    called = await spans.one("ostinato.sidecar ostinato.v1.Sequencer/Replay")

    assert (verify.parent_span_id, replay.parent_span_id) == (item.span_id, called.span_id)
    for purpose, second in (("VERIFY", verify), ("REPLAY", replay)):
        run = await spans.one("ostinato.service run", sequence=sequence, purpose=purpose)
        assert (run.trace_id, run.parent_span_id) == (second.trace_id, second.span_id)


async def test_failures_and_second_attempts_show(collector: tuple[str, Spans]) -> None:
    """An item that fails names the reason from the engine up; one whose service dies has a run that was lost, an event, and a
    second run."""
    target, spans = collector
    with traced_pair(target, FAILING) as pair:
        async with traced_client(target, pair) as client:
            seen = set()
            async for event in client.stream(["a", "b"], request_id="failing", max_new_tokens=5, ignore_eos=True):
                seen |= {run.sequence for run in event.tokens.runs if run.sequence == 2} | {event.failed.sequence}
                if seen >= {1, 2} and len(pair.programs) == 2:
                    await asyncio.to_thread(pair.service.kill)
                    pair.start_service()
        call = await spans.one(f"ostinato.sidecar {CALL}Stream", request_id="failing")
        await spans.one("ostinato.service run", sequence=2, attempt=2)
        await eventually(lambda: len(spans.named("ostinato.sidecar item", request_id="failing")) == 2, "both items")

    assert call.status.code == Status.STATUS_CODE_UNSET
    failed, again = sorted(spans.named("ostinato.sidecar item", request_id="failing"), key=lambda span: str(of(span)))
    assert (of(failed)["error.type"], failed.status.code) == ("ENGINE_FAILED", Status.STATUS_CODE_ERROR)
    assert (of(again).get("error.type"), [event.name for event in again.events]) == (None, ["submitted again"])
    runs = [span for name, span in spans.trace(call.trace_id) if name == "ostinato.sidecar run"]
    assert sorted((of(span)["ostinato.sequence"], of(span).get("error.type", "")) for span in runs) == [
        (1, "ENGINE_FAILED"),
        (2, ""),
        (2, "DISCONNECTED"),
    ]


async def test_an_absent_collector_delays_nothing() -> None:
    """Without a collector at the address, the sidecar answers and drains."""
    async with own("--traces", "otlp:http://127.0.0.1:9") as door:
        answer = await door.client.generate("a", max_new_tokens=2)

        assert answer.results[0].HasField("output")
        assert door.pair.sidecar.stop() == 0
