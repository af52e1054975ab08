"""Spans: off, what turns them on, and what they say. Across the programs: tests/e2e/test_tracing.py."""

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

from tests.ostinato.echo import NAME, Context, Echo, call, raw, serving, text
from tests.pair import python

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
    """Both programs and the client are loaded, and spans asked for, without a module of OpenTelemetry."""
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


@pytest.mark.parametrize(
    ("target", "environ", "on"),
    [
        ("otlp:http://127.0.0.1:9", {}, True),
        ("otlp:https://collector.example/own/path", {}, True),
        ("", {OTLP: "http://127.0.0.1:9"}, True),
        ("", {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ("", {"OTEL_TRACES_EXPORTER": "none", OTLP: "http://127.0.0.1:9"}, False),
        ("otlp:http://127.0.0.1:9", {"OTEL_SDK_DISABLED": "true"}, False),
        ("", {OTLP: ""}, False),
        ("", {"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_what_turns_spans_on(target: str, environ: dict[str, str], on: bool) -> None:
    """The flag, or the standard variables, which can also keep them off."""
    tracing.start(target, "test", "", environ)

    assert tracing.on() is on


@pytest.mark.parametrize(
    ("target", "environ", "named"),
    [
        ("http://127.0.0.1:4318", {}, "--traces"),
        ("otlp:127.0.0.1:4318", {}, "--traces"),
        ("otlp:http://", {}, "--traces"),
        ("otlp:http://a b", {}, "--traces"),
        ("otlp:http://a/b?c", {}, "--traces"),
        ("", {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ("", {OTLP: "127.0.0.1:4318"}, OTLP),
        ("", {OTLP: "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
    ],
)
def test_what_cannot_be_followed_is_named(target: str, environ: dict[str, str], named: str) -> None:
    """A flag or variable that makes no sense is refused by its name, and spans stay off."""
    with pytest.raises(ValueError, match=f"^{named}: "):
        tracing.start(target, "test", "", environ)
    assert not tracing.on()


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_SAMPLER", "sometimes"), ("OTEL_BSP_MAX_QUEUE_SIZE", "many"), ("OTEL_BSP_MAX_QUEUE_SIZE", "-1")],
)
def test_what_the_sdk_would_only_warn_of_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A setting of OpenTelemetry's own that it cannot read is no default in silence."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"(?i)sampler|max_queue_size"):
        tracing.start("otlp:http://127.0.0.1:9", "test", "", {})


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_a_bad_target_stops_the_program(program: str) -> None:
    """Exit code 2 and the flag's name."""
    done = python("-m", program, "--traces", "jaeger", "--metrics", "")

    assert done.returncode == 2
    assert "--traces: 'jaeger' is not otlp:http://host:port" in done.stderr


# ---- what they say


def test_a_uint64_fits(kept: InMemorySpanExporter) -> None:
    """A value that OTLP's int64 has no room for is text; all others stay numbers."""
    with tracing.span("a", {"low": 2**63 - 1, "high": 2**64 - 1, "yes": True}):
        pass

    assert named(kept, "a").attributes == {"low": 2**63 - 1, "high": str(2**64 - 1), "yes": True}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(errors.QueueFull("secret"), "QUEUE_FULL"), (asyncio.CancelledError(), "CANCELLED"), (KeyError("secret"), "KeyError")],
)
def test_an_error_is_said_by_its_reason(kept: InMemorySpanExporter, error: BaseException, reason: str) -> None:
    """Never by its message, which may hold what a user sent."""
    with pytest.raises(type(error)), tracing.span("a") as span, span.entered():
        raise error
    said = named(kept, "a")

    assert (said.status.status_code, said.status.description) == (StatusCode.ERROR, reason)
    assert said.attributes == {"error.type": reason}
    assert "secret" not in said.to_json()


def test_a_decision_not_to_record_travels() -> None:
    """Where a trace is not sampled, peers are told so, and neither log lines nor exemplars name it."""
    kept = recording(ALWAYS_OFF)
    with tracing.span("a") as span:
        inner = span.child("b")

    assert not inner and int(inner.traceparent.rpartition("-")[2], 16) & 1 == 0
    assert (inner.ids, inner.exemplar, kept.get_finished_spans()) == ({}, {}, ())


@pytest.mark.parametrize("form", ["human", "json"])
def test_log_lines_name_the_trace(kept: InMemorySpanExporter, form: str) -> None:
    """A line that is written in a span has its ids; one that names another keeps it; one outside has none."""
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
    """The first attempt's span failed for its reason; the second says that it is a retry."""
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
    """A call with a traceparent is part of that trace; one with nonsense begins its own."""
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
    """A call to nobody fails; a stream that is left early does not."""

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
