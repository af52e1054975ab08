"""Spans by OpenTelemetry's SDK. The only room that knows it; loaded when traces are on."""

from __future__ import annotations

import logging
import threading
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ostinato import __version__
from ostinato.errors import Cancelled, OstinatoError
from ostinato.tracing import Attributes, Kind, Metadata, Span, Value

_INT64 = range(-(2**63), 2**63)
_W3C = TraceContextTextMapPropagator()


class Recorded(Span):
    """A span that OpenTelemetry records, or has decided not to."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    def __bool__(self) -> bool:
        return self._span.is_recording()

    @cached_property
    def ids(self) -> dict[str, str]:  # type: ignore[override]
        context = self._span.get_span_context()
        if not context.trace_flags.sampled:
            return {}
        return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}

    @cached_property
    def metadata(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self._context)
        return tuple(carrier.items())

    @property
    def traceparent(self) -> str:  # type: ignore[override]
        return dict(self.metadata).get("traceparent", "")

    def child(self, name: str, attributes: Attributes | None = None, kind: Kind = Kind.INTERNAL) -> Span:
        started = self._tracer.start_span(name, self._context, trace.SpanKind[kind.name], _fitting(attributes))
        return Recorded(self._tracer, started)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(_fitting(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, _fitting(attributes))

    def fail(self, reason: str, *, fault: bool = True) -> None:
        self._span.set_attribute("error.type", reason)
        if fault:
            self._span.set_status(trace.StatusCode.ERROR, reason)

    def end(self, error: BaseException | None = None) -> None:
        if not self._span.is_recording():
            return  # it has ended
        match error:
            case None | GeneratorExit():  # whoever read had enough
                pass
            case OstinatoError():
                self.fail(error.reason)
            case CancelledError():
                self.fail(Cancelled.reason)
            case _:
                self.fail(type(error).__name__)
        self._span.end()

    def entered(self) -> AbstractContextManager[object]:
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    @property
    def _context(self) -> Context:
        return trace.set_span_in_context(self._span, Context())


class OtelRecorder:
    """Makes spans by a provider that somebody else set up (None: the process's), or by one of its own."""

    def __init__(self, provider: trace.TracerProvider | None = None, *, owned: bool = False) -> None:
        self._provider, self._owned = provider or trace.get_tracer_provider(), owned
        self._tracer = self._provider.get_tracer("ostinato", __version__)

    def span(self, name: str, attributes: Attributes | None, kind: Kind, parent: Metadata | None) -> Span:
        context = None if parent is None else _W3C.extract({key: str(value) for key, value in parent}, Context())
        return Recorded(self._tracer, self._tracer.start_span(name, context, trace.SpanKind[kind.name], _fitting(attributes)))

    def current(self) -> Span:
        return Recorded(self._tracer, trace.get_current_span())

    def close(self, seconds: float) -> None:
        """Exports what waits, unless that takes longer: nobody must wait for a collector that is not there."""
        if self._owned and isinstance(self._provider, TracerProvider):
            ending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
            ending.start()
            ending.join(seconds)


def exporting(endpoint: str, service: str, instance: str) -> OtelRecorder:
    """Exports in batches, from a thread of its own and a bounded queue, to `endpoint` or where the environment says. Raises
    ValueError for whatever in the environment OpenTelemetry cannot follow, and would only warn of."""
    ours = {"service.name": service, "service.version": __version__, "service.instance.id": instance}
    with _strict():
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint or None)))
    return OtelRecorder(provider, owned=True)


@contextmanager
def _strict() -> Iterator[None]:
    """Turns what OpenTelemetry warns of into a ValueError."""
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("opentelemetry")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    if said:
        raise ValueError(f"OTEL_…: {said[0]}")


def _fitting(attributes: Attributes | None) -> dict[str, Value]:
    """OTLP's integers are int64: a larger uint64 is written as text."""
    return {
        name: str(value) if isinstance(value, int) and value not in _INT64 else value
        for name, value in (attributes or {}).items()
    }
