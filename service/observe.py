"""Metrics and spans of the service. Base units; no label has an unbounded number of values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.registry import Collector

from ostinato import enums, errors, tracing
from ostinato.tracing import OFF
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Engine

BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RUN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FRAME_EVENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """All metrics, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ostinato_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"ostinato_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ostinato_{name}", text, buckets=buckets, registry=registry)

        self.running = gauge("engine_runs_in_flight", "Runs that the engine works on.")
        self.queued = gauge("engine_runs_queued", "Runs that wait for the engine.")
        self.ended = cache(counter("engine_runs", "Runs that ended, by purpose and how.", "purpose", "end").labels)
        self.prompt_tokens = counter("engine_prompt_tokens", "Tokens of the prompts of runs that started.")
        self.cached_tokens = counter(
            "engine_cached_prompt_tokens", "Prompt tokens of runs that finished which came from the prefix cache."
        )
        self.new_tokens = counter("engine_generated_tokens", "Tokens generated, as far as they were reported.")
        self.queue_seconds = histogram("engine_queue_seconds", "From submission to start.", RUN_SECONDS)
        self.run_seconds = histogram("engine_run_seconds", "From submission to the end, of runs that finished.", RUN_SECONDS)
        self.first_token_seconds = histogram(
            "engine_first_token_seconds", "From submission to the first token, of streamed runs.", RUN_SECONDS
        )
        self.between_tokens_seconds = histogram(
            "engine_between_tokens_seconds", "From one token to the next, of streamed runs.", BETWEEN_TOKENS_SECONDS
        )
        self.capacity = gauge("engine_capacity", "What the engine holds at once.", "of")
        self.grade = gauge("service_grade", "The grade held: 1 best effort, 2 serial, 3 exact.")
        self.fingerprint = Info("ostinato_service_fingerprint", "What determines the answers.", registry=registry)
        self.self_test_seconds = gauge("service_self_test_seconds", "How long the self-test of this grade took.")
        self.streams = gauge("service_streams", "Execute streams that are open.")
        self.refused = counter("service_streams_refused", "Execute streams refused or broken off.", "reason")
        self.frame_events = histogram("service_frame_events", "Events in one message to the sidecar.", FRAME_EVENTS)

    def include(self, collector: Collector) -> None:
        """Serves the engine's own metrics too."""
        self._registry.register(collector)

    def describe(self, capacity: engine_pb2.Capacity, digest: bytes, fields: Mapping[str, str]) -> None:
        """Sets what is constant while the process lives."""
        for field in capacity.DESCRIPTOR.fields:
            self.capacity.labels(field.name).set(getattr(capacity, field.name))
        chosen = {name: fields[name] for name in ("engine", "engine_version", "model", "device") if name in fields}
        self.fingerprint.info({"digest": digest.hex(), **chosen})


OPERATION, PREPARE = "text_completion", "ostinato.v1.Engine/Prepare"


def prepare_span(traceparent: str) -> tracing.Span:
    """The span of a preparation over the stream, as if it were a call."""
    if tracing.tracer is None:
        return OFF
    attributes = {"rpc.system.name": "grpc", "rpc.method": PREPARE}
    return tracing.span(PREPARE, attributes, "SERVER", _parent(traceparent))


def _parent(traceparent: str) -> tracing.Metadata:
    return [("traceparent", traceparent)] if traceparent else []


class RunStatistics:
    """The metrics and spans of a run, from its submission to its one end. Runs of the self-test have no spans."""

    def __init__(self, metrics: Metrics, submit: engine_pb2.Submit, engine: Engine, now: float) -> None:
        """`now`: of the event loop's clock, here and below."""
        self._metrics, self._submit, self._engine = metrics, submit, engine
        self._submitted_at, self._reported_tokens = now, 0
        self._last_token_at: float | None = None
        self._waiting = metrics.queued
        """The gauge that counts it now."""
        self._waiting.inc()
        self._run = self._engine_span = OFF
        if tracing.tracer is not None and submit.purpose:
            attributes: dict[str, tracing.Value] = {
                "ostinato.purpose": enums.word(engine_pb2.Purpose, submit.purpose),
                "ostinato.sequence": submit.sequence,
                "ostinato.attempt": submit.attempt,
                "ostinato.seed": str(submit.seed),
            }
            self._run = tracing.span("run", attributes, "SERVER", _parent(submit.traceparent))

    def started(self, now: float) -> None:
        metrics = self._metrics
        metrics.queued.dec()
        self._waiting = metrics.running
        metrics.running.inc()
        metrics.queue_seconds.observe(now - self._submitted_at)
        metrics.prompt_tokens.inc(len(self._submit.token_ids))
        if self._run is not OFF:
            self._engine_span = self._run.child(f"{OPERATION} {self._engine.model_name}", self._request())

    def tokens(self, count: int, now: float) -> None:
        """So many were reported together."""
        if not count:
            return
        if self._last_token_at is None:
            self._engine_span.event("first token")
            self._metrics.first_token_seconds.observe(now - self._submitted_at)
        else:
            self._metrics.between_tokens_seconds.observe((now - self._last_token_at) / count)
        self._last_token_at = now
        self._reported_tokens += count
        self._metrics.new_tokens.inc(count)

    def finished(self, output: types_pb2.Output, now: float) -> None:
        self._metrics.new_tokens.inc(len(output.token_ids) - self._reported_tokens)
        self._metrics.cached_tokens.inc(output.cached_tokens)
        self._metrics.run_seconds.observe(now - self._submitted_at)
        if self._run is not OFF:
            reason = enums.word(types_pb2.FinishReason, output.finish_reason).lower()
            self._engine_span.note(
                {"gen_ai.response.finish_reasons": [reason], "gen_ai.usage.output_tokens": len(output.token_ids)}
            )
            self._run.note({"ostinato.grade": enums.word(types_pb2.Grade, output.grade)})
        self.end("finished")

    def end(self, how: str, error: errors.OstinatoError | None = None) -> None:
        """`how`: finished, failed, cancelled or expired."""
        self._waiting.dec()
        purpose = self._submit.purpose
        name = enums.word(engine_pb2.Purpose, purpose).lower() if purpose else "self_test"
        self._metrics.ended(name, how).inc()
        if self._run is not OFF:
            self._engine_span.end(error)
            self._run.end(error)

    def _request(self) -> dict[str, tracing.Value]:
        """OpenTelemetry's attributes of the request."""
        submit, given = self._submit, self._submit.parameters
        return {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": self._engine.name,
            "gen_ai.request.model": self._engine.model_name,
            "gen_ai.request.max_tokens": given.max_new_tokens,
            "gen_ai.request.temperature": given.temperature,
            "gen_ai.request.top_k": float(given.top_k),
            "gen_ai.request.top_p": given.top_p,
            "gen_ai.request.seed": submit.seed,
            "gen_ai.request.stream": submit.stream,
            "gen_ai.usage.input_tokens": len(submit.token_ids),
        }
