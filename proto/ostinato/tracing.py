"""Trace spans across client, sidecar and service.

By default tracing is off: every span is OFF, whose methods do nothing, and OpenTelemetry is not imported. A span that is OFF
costs 0.5 us, where one of opentelemetry-api without an SDK costs 11 us. `start` and `use` turn tracing on; they need the extra
`tracing`.

    with tracing.span("admission", {"ostinato.count": 3}) as span:
        span.event("waited")

Attributes have the full names of OpenTelemetry's conventions, or the prefix `ostinato.`. Prompts, outputs and error messages
are never attributes; of an error, only its reason is.
"""

from __future__ import annotations

import logging
import re
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from ostinato import __version__, install_hint
from ostinato.errors import Cancelled, OstinatoError

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context

Value: TypeAlias = str | int | float | bool | Sequence[str]
Attributes: TypeAlias = Mapping[str, Value]
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

TARGET = re.compile(r"otlp:(https?://[^/?#\s]+)(/[^?#\s]*)?")
TRACES_PATH = "/v1/traces"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_INT64 = range(-(2**63), 2**63)


Kind: TypeAlias = Literal["INTERNAL", "CLIENT", "SERVER"]
"""Which side of a call a span is."""


class Span:
    """A span that is not recorded. It is false, and its methods do nothing."""

    ids: Mapping[str, str] = {}
    """`trace_id` and `span_id`, for log lines; empty if the span is not sampled."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Metadata for a call to a peer: W3C's traceparent and tracestate."""
    traceparent = ""

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def child(self, name: str, attributes: Attributes | None = None, kind: Kind = "INTERNAL") -> Span:
        """Starts a span within this one."""
        return self

    def note(self, attributes: Attributes) -> None:
        """Sets attributes."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Adds an event with the current time."""

    def fail(self, reason: str, *, fault: bool = True) -> None:
        """Sets the reason of a failure. `fault`: it is an error of the program too, not only an answer to the caller."""

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span, with the reason of `error`. Only the first call has an effect."""

    def entered(self) -> AbstractContextManager[object]:
        """A context in which this span is `current`."""
        return nullcontext()

    @property
    def exemplar(self) -> dict[str, str]:
        """Labels for a metric's exemplar."""
        return {"trace_id": self.ids["trace_id"]} if self.ids else {}


OFF = Span()

tracer: trace.Tracer | None = None
"""None: tracing is off."""
_shutdown: Callable[[], None] | None = None
"""Ends a provider that is ours."""


def span(name: str, attributes: Attributes | None = None, kind: Kind = "INTERNAL", parent: Metadata | None = None) -> Span:
    """Starts a span: within the current one, or within the span of a peer whose metadata is `parent`."""
    return OFF if tracer is None else _started(tracer, name, attributes, kind, None if parent is None else _peer(parent))


def call(method: str, attributes: Attributes | None = None) -> Span:
    """Starts the span of a call to a peer, such as "ostinato.v1.Engine/Prepare". Send the span's `metadata` with the call."""
    return span(method, {"rpc.system.name": "grpc", "rpc.method": method, **(attributes or {})}, "CLIENT")


def current() -> Span:
    """The span that this task or thread has entered."""
    if tracer is None:
        return OFF
    from opentelemetry.trace import get_current_span

    return _OtelSpan(tracer, get_current_span())


def start(target: str, service: str, instance: str, environ: Mapping[str, str]) -> None:
    """Exports spans to `target`, such as "otlp:http://host:port", or if that is empty, to the endpoint in OpenTelemetry's
    standard variables. Tracing stays off if neither is set. `service` and `instance` name the program, unless those variables
    do. Raises ValueError that names the bad flag or variable."""
    endpoint = _endpoint(target)
    if not (endpoint or _enabled_by(environ)) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    for name in _PROTOCOLS:
        if environ.get(name, "http/protobuf") != "http/protobuf":
            raise ValueError(f"{name}: {environ[name]!r} is not http/protobuf")
    try:
        _export(endpoint, service, instance)
    except ModuleNotFoundError as error:
        flag = "--traces" if endpoint else "OTEL_…"
        raise ValueError(f"{flag}: needs OpenTelemetry, but {error.name} is missing: {install_hint('tracing')}") from None


def use(provider: trace.TracerProvider | None = None) -> None:
    """Turns tracing on with this provider, or the process's own: for a program that has set up OpenTelemetry itself."""
    global tracer
    from opentelemetry import trace

    tracer = (provider or trace.get_tracer_provider()).get_tracer("ostinato", __version__)


def stop(seconds: float = 1.0) -> None:
    """Turns tracing off. Waits at most this long for spans to be exported: a collector may not answer."""
    global tracer, _shutdown
    shutdown, tracer, _shutdown = _shutdown, None, None
    if shutdown is not None:
        ending = threading.Thread(target=shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(seconds)


def _endpoint(target: str) -> str:
    """The URL to which spans are posted; empty if none is given."""
    if not target:
        return ""
    found = TARGET.fullmatch(target)
    if found is None:
        raise ValueError(f"--traces: {target!r} is not otlp:http://host:port")
    base, path = found.groups()
    return base + (path if path not in (None, "/") else TRACES_PATH)


def _enabled_by(environ: Mapping[str, str]) -> bool:
    """Whether the standard variables turn tracing on."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter not in ("", "otlp", "none"):
        raise ValueError(f"OTEL_TRACES_EXPORTER: {exporter!r} is neither otlp nor none")
    for name in _ENDPOINTS:
        if not re.match(r"https?://[^/\s]|$", environ.get(name, "")):
            raise ValueError(f"{name}: {environ[name]!r} is not an http:// or https:// URL")
    return exporter == "otlp" or (exporter == "" and any(environ.get(name) for name in _ENDPOINTS))


# From here on tracing is on, and OpenTelemetry is installed.
class _OtelSpan(Span):
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    def __bool__(self) -> bool:
        return self._span.is_recording()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)

    @cached_property
    def ids(self) -> dict[str, str]:  # type: ignore[override]
        context = self._span.get_span_context()
        if not context.trace_flags.sampled:
            return {}
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    @cached_property
    def metadata(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, self._context())
        return tuple(carrier.items())

    @property
    def traceparent(self) -> str:  # type: ignore[override]
        return dict(self.metadata).get("traceparent", "")

    def child(self, name: str, attributes: Attributes | None = None, kind: Kind = "INTERNAL") -> Span:
        return _started(self._tracer, name, attributes, kind, self._context())

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(_int64(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, _int64(attributes))

    def fail(self, reason: str, *, fault: bool = True) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", reason)
        if fault:
            self._span.set_status(StatusCode.ERROR, reason)

    def end(self, error: BaseException | None = None) -> None:
        if not self._span.is_recording():
            return  # it has ended
        match error:
            case None | GeneratorExit():  # the reader of a stream stopped
                pass
            case OstinatoError():
                self.fail(error.reason)
            case CancelledError():
                self.fail(Cancelled.reason)
            case _:
                self.fail(type(error).__name__)
        self._span.end()

    def entered(self) -> AbstractContextManager[object]:
        from opentelemetry.trace import use_span

        return use_span(self._span, record_exception=False, set_status_on_exception=False)

    def _context(self) -> Context:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self._span, Context())


def _started(tracer: trace.Tracer, name: str, attributes: Attributes | None, kind: Kind, context: Context | None) -> Span:
    from opentelemetry.trace import SpanKind

    return _OtelSpan(tracer, tracer.start_span(name, context, SpanKind[kind], _int64(attributes)))


def _peer(metadata: Metadata) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({key: str(value) for key, value in metadata}, Context())


def _export(endpoint: str, service: str, instance: str) -> None:
    """Exports batches from a thread with a bounded queue, to `endpoint` or as the environment says. Raises ValueError for
    variables that OpenTelemetry would only warn about."""
    global _shutdown
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = {"service.name": service, "service.version": __version__, "service.instance.id": instance}
    with _warnings_as_errors():
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint or None)))
    use(provider)
    _shutdown = provider.shutdown


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    """Raises OpenTelemetry's first warning as a ValueError."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("opentelemetry")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if warnings:
        raise ValueError(f"OTEL_…: {warnings[0]}")


def _int64(attributes: Attributes | None) -> dict[str, Value]:
    """OTLP's integers are int64: a larger uint64 is written as text."""
    return {
        name: str(value) if isinstance(value, int) and value not in _INT64 else value
        for name, value in (attributes or {}).items()
    }
