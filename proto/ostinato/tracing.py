"""Traces: what one call brought about, across client, sidecar and service.

Off, which is the default, there is next to nothing: every span is OFF, whose methods do nothing, and OpenTelemetry is not
imported. On, by `start` or `use`, spans are OpenTelemetry's; that needs the extra `ostinato[tracing]`.

    with tracing.span("admission", {"ostinato.count": 3}) as span:
        span.event("waited")

Attributes are named in full: by OpenTelemetry's conventions where there is one, else behind `ostinato.`. A prompt, an answer
and an error's message are never among them: what went wrong is said by its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from ostinato.otel import OtelRecorder

Value: TypeAlias = str | int | float | bool | Sequence[str]
Attributes: TypeAlias = Mapping[str, Value]
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

TARGET = re.compile(r"otlp:(https?://[^/?#\s]+)(/[^?#\s]*)?")
TRACES_PATH = "/v1/traces"
_ON_BY = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_MISSING = "needs OpenTelemetry: pip install 'ostinato[tracing]'"


class Kind(Enum):
    """Which side of a call a span is."""

    INTERNAL = auto()
    CLIENT = auto()
    SERVER = auto()


class Span:
    """Something that takes time. This one is of a program that is not traced: false, and empty in every respect."""

    ids: Mapping[str, str] = {}
    """`trace_id` and `span_id`, for log lines; empty where nobody records the span."""
    metadata: tuple[tuple[str, str], ...] = ()
    """What tells a peer of the span: W3C's traceparent, and tracestate."""
    traceparent = ""

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)

    def child(self, name: str, attributes: Attributes | None = None, kind: Kind = Kind.INTERNAL) -> Span:
        """A span within this one, beginning now."""
        return self

    def note(self, attributes: Attributes) -> None:
        """Sets attributes."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happens now."""

    def fail(self, reason: str, *, fault: bool = True) -> None:
        """Says why it fails; `fault`: and that this is an error, not just an answer."""

    def end(self, error: BaseException | None = None) -> None:
        """It ends now, for this reason if it failed. The first end counts."""

    def entered(self) -> AbstractContextManager[object]:
        """For as long as the context lasts, `current` is this."""
        return nullcontext()

    @property
    def exemplar(self) -> dict[str, str]:
        """What a metric's exemplar says of the trace."""
        return {"trace_id": self.ids["trace_id"]} if self.ids else {}


OFF = Span()


_recorder: OtelRecorder | None = None


def on() -> bool:
    """Whether anybody records spans."""
    return _recorder is not None


def span(name: str, attributes: Attributes | None = None, kind: Kind = Kind.INTERNAL, parent: Metadata | None = None) -> Span:
    """A span that begins now: within the current one, or with a `parent` within what a peer's metadata tells of."""
    return OFF if _recorder is None else _recorder.span(name, attributes, kind, parent)


def call(method: str, attributes: Attributes | None = None) -> Span:
    """Of a call to a peer, which is told by the span's `metadata`; "ostinato.v1.Engine/Prepare" is a method."""
    if _recorder is None:
        return OFF
    return _recorder.span(method, {"rpc.system.name": "grpc", "rpc.method": method, **(attributes or {})}, Kind.CLIENT, None)


def current() -> Span:
    """The span that this task or thread is in."""
    return OFF if _recorder is None else _recorder.current()


def start(target: str, service: str, instance: str, environ: Mapping[str, str]) -> None:
    """Begins to export spans to `target`, "otlp:http://host:port", or if that is empty where OpenTelemetry's own variables say;
    neither: spans stay off. `service` and `instance` name the program, unless those variables do. Raises ValueError that names
    the flag or the variable that cannot be followed."""
    global _recorder
    endpoint = _endpoint(target)
    if not (endpoint or _asked(environ)) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    for name in _PROTOCOLS:
        if environ.get(name, "http/protobuf") != "http/protobuf":
            raise ValueError(f"{name}: {environ[name]!r} is not http/protobuf")
    try:
        from ostinato import otel
    except ModuleNotFoundError as error:
        raise ValueError(f"{'--traces' if endpoint else 'OTEL_…'}: {_MISSING} ({error.name} is missing)") from None
    _recorder = otel.exporting(endpoint, service, instance)


def use(provider: TracerProvider | None = None) -> None:
    """Makes the spans of this provider, or of the process's own: for a program that has set OpenTelemetry up by itself."""
    global _recorder
    from ostinato import otel

    _recorder = otel.OtelRecorder(provider)


def stop(seconds: float = 1.0) -> None:
    """Spans are off again. What waits to be exported may take this long."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        recorder.close(seconds)


def _endpoint(target: str) -> str:
    """The URL that spans are posted to; empty: none is given."""
    if not target:
        return ""
    found = TARGET.fullmatch(target)
    if found is None:
        raise ValueError(f"--traces: {target!r} is not otlp:http://host:port")
    base, path = found.groups()
    return base + (path if path not in (None, "/") else TRACES_PATH)


def _asked(environ: Mapping[str, str]) -> bool:
    """Whether the standard variables turn spans on."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter not in ("", "otlp", "none"):
        raise ValueError(f"OTEL_TRACES_EXPORTER: {exporter!r} is neither otlp nor none")
    for name in _ON_BY:
        if not re.match(r"https?://[^/\s]|$", environ.get(name, "")):
            raise ValueError(f"{name}: {environ[name]!r} is no http:// or https:// URL")
    return exporter == "otlp" or (exporter == "" and any(environ.get(name) for name in _ON_BY))
