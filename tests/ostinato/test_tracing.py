"""Spans: off, turned on, and their contents. tests/e2e/test_tracing.py has traces across the programs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="no OpenTelemetry: it comes with the extra tracing")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import StatusCode

from ostinato import errors, tracing
from ostinato.client import Client
from serving import logs

from tests.pair import python
from tests.serving.echo import NAME, Context, Echo, call, raw, serving, text

OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"


def recording(sampler: Sampler | None = None) -> InMemorySpanExporter:
    """Spans are kept here from now on."""
    kept, provider = InMemorySpanExporter(), TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracing.use(provider)
    return kept


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """After every test."""
    yield
    tracing.stop()


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return recording()


def named(kept: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in kept.get_finished_spans() if span.name == name]
    return span


# ---- off and on


def test_off_imports_nothing() -> None:
    """With tracing off, neither program nor the client imports OpenTelemetry."""
    script = """
import sys, service.__main__, sidecar.__main__, ostinato.client
from ostinato import tracing
tracing.start("", "program", "", {})
with tracing.span("a") as span, span.entered(), span.child("b") as inner:
    inner.event("c")
print(bool(span), inner.metadata, [name for name in sys.modules if "opentelemetry" in name])
"""
    done = python("-c", script)

    assert done.stdout == "False () []\n"


HERE = "otlp:http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("target", "environ", "expected"),
    [
        (HERE, {}, True),
        ("otlp:https://collector.example/own/path", {}, True),
        ("", {OTLP: "http://127.0.0.1:9"}, True),
        ("", {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ("", {"OTEL_TRACES_EXPORTER": "none", OTLP: "http://127.0.0.1:9"}, False),
        (HERE, {"OTEL_SDK_DISABLED": "true"}, False),
        ("", {OTLP: ""}, False),
        ("", {"OTEL_SERVICE_NAME": "x"}, False),
        ("http://127.0.0.1:4318", {}, "--traces: "),
        ("otlp:127.0.0.1:4318", {}, "--traces: "),
        ("otlp:http://", {}, "--traces: "),
        ("otlp:http://a b", {}, "--traces: "),
        ("otlp:http://a/b?c", {}, "--traces: "),
        ("", {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: "),
        ("", {OTLP: "127.0.0.1:4318"}, f"{OTLP}: "),
        ("", {OTLP: "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL: "),
        (HERE, {"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_…: .*sampler"),
        (HERE, {"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, "OTEL_…: .*QUEUE_SIZE"),
        (HERE, {"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "max_queue_size"),
    ],
)
def test_what_turns_spans_on(
    monkeypatch: pytest.MonkeyPatch, target: str, environ: dict[str, str], expected: bool | str
) -> None:
    """The flag or the standard variables turn tracing on; the variables can also keep it off. A bad one, also one of which
    OpenTelemetry would only warn, is a ValueError that names it, and tracing stays off."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, bool):
        tracing.start(target, "test", "", environ)
    else:
        with pytest.raises(ValueError, match=f"^{expected}"):
            tracing.start(target, "test", "", environ)
    assert (tracing.tracer is not None) is (expected is True)


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_a_bad_target_stops_the_program(program: str) -> None:
    """A bad --traces ends a program with exit code 2 and the flag's name."""
    done = python("-m", program, "--traces", "jaeger", "--metrics", "")

    assert done.returncode == 2
    assert "--traces: 'jaeger' is not otlp:http://host:port" in done.stderr


# ---- what they say


def test_a_uint64_fits(kept: InMemorySpanExporter) -> None:
    """An integer beyond int64 is sent as text; all others stay numbers."""
    with tracing.span("a", {"low": 2**63 - 1, "high": 2**64 - 1, "yes": True}):
        pass

    assert named(kept, "a").attributes == {"low": 2**63 - 1, "high": str(2**64 - 1), "yes": True}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(errors.QueueFull("secret"), "QUEUE_FULL"), (asyncio.CancelledError(), "CANCELLED"), (KeyError("secret"), "KeyError")],
)
def test_an_error_is_said_by_its_reason(kept: InMemorySpanExporter, error: BaseException, reason: str) -> None:
    """A failed span has the error's reason, never its message."""
    with pytest.raises(type(error)), tracing.span("a") as span, span.entered():
        raise error
    said = named(kept, "a")

    assert (said.status.status_code, said.status.description) == (StatusCode.ERROR, reason)
    assert said.attributes == {"error.type": reason}
    assert "secret" not in said.to_json()


def test_a_decision_not_to_record_travels() -> None:
    """An unsampled trace is marked so for peers, and is in no log line or exemplar."""
    kept = recording(ALWAYS_OFF)
    with tracing.span("a") as span:
        inner = span.child("b")

    assert not inner and int(inner.traceparent.rpartition("-")[2], 16) & 1 == 0
    assert (inner.ids, inner.exemplar, kept.get_finished_spans()) == ({}, {}, ())


@pytest.mark.parametrize("form", ["human", "json"])
def test_log_lines_name_the_trace(kept: InMemorySpanExporter, form: str) -> None:
    """A log line in a span has its ids, unless it names another span; one outside has none."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers, root.level
    try:
        logs.setup("json" if form == "json" else "human", stream=stream)
        log = logging.getLogger("test")
        with tracing.span("a") as span, span.entered():
            log.info("in it")
            log.info("of another", extra={"trace_id": "other"})
        log.info("outside")
    finally:
        root.handlers, root.level = handlers, level
    first, second, third = stream.getvalue().splitlines()

    trace_id = span.ids["trace_id"]
    assert trace_id in first and span.ids["span_id"] in first
    assert "other" in second and trace_id not in second
    assert "trace_id" not in third
    assert form == "human" or json.loads(first)["trace_id"] == trace_id


# ---- calls


async def test_a_retry_by_grpc_is_an_event(kept: InMemorySpanExporter) -> None:
    """The span of a failed attempt has its reason; that of the next has the event `retried`."""
    attempts = iter([errors.EngineUnavailable("not yet", retry_after=0.01)])

    def act(_content: str, _context: Context) -> None:
        for error in attempts:
            raise error

    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.1s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    async with serving(Echo(act), options=[("grpc.service_config", config)]) as channel:
        await call(channel, "UnaryUnary", text("a"))
    first, second = kept.get_finished_spans()

    assert (first.status.status_code, (first.attributes or {})["error.type"]) == (StatusCode.ERROR, "ENGINE_UNAVAILABLE")
    assert second.status.status_code is StatusCode.UNSET
    assert [(event.name, event.attributes) for event in second.events] == [("retried", {"ostinato.previous_attempts": "1"})]


async def test_a_peers_trace_goes_on(kept: InMemorySpanExporter) -> None:
    """A call with a traceparent is part of that trace; a malformed one starts its own."""
    method, trace_id = f"{NAME}/UnaryUnary", "4bf92f3577b34da6a3ce929d0e0e4736"
    async with serving(Echo()) as channel:
        for traceparent in (f"00-{trace_id}-00f067aa0ba902b7-01", "nonsense"):
            ask: Any = channel.unary_unary(f"/{method}")
            await ask(text("a"), metadata=[("traceparent", traceparent)])
        await raw(channel, "/grpc.health.v1.Health/Check")
    first, second = kept.get_finished_spans()

    assert first.context is not None and f"{first.context.trace_id:032x}" == trace_id
    assert second.parent is None
    assert (first.attributes or {})["rpc.method"] == method


async def test_a_reader_that_has_enough_did_not_fail(kept: InMemorySpanExporter) -> None:
    """The span of a call that cannot connect has failed; that of a stream that is closed early has not."""

    async def numbers() -> AsyncGenerator[int, None]:
        with tracing.span("left"):
            yield 1

    async with Client("unix:/nobody/is/here.sock") as client:
        with pytest.raises(errors.Disconnected):
            await client.cancel(1)
    async with aclosing(numbers()) as left:
        await anext(left)

    assert (named(kept, "ostinato.v1.Generation/Cancel").attributes or {})["error.type"] == "DISCONNECTED"
    assert named(kept, "left").status.status_code is StatusCode.UNSET
