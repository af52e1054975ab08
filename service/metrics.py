"""What the service counts and times. Base units; no label ever holds a sequence or a run."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.registry import Collector

from ostinato import enums
from ostinato.v1 import engine_pb2

# Upper bounds: seconds between tokens, seconds of a whole run, events of a frame.
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FRAME = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """All of them, in one registry."""

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
        self.ended = counter("engine_runs", "Runs that ended, by purpose and how.", "purpose", "end")
        self.prompt_tokens = counter("engine_prompt_tokens", "Tokens of the prompts of runs that started.")
        self.cached_tokens = counter(
            "engine_cached_prompt_tokens", "Prompt tokens of runs that finished which came from the prefix cache."
        )
        self.new_tokens = counter("engine_generated_tokens", "Tokens generated, as far as they were reported.")
        self.queue_seconds = histogram("engine_queue_seconds", "From submission to start.", SLOW)
        self.run_seconds = histogram("engine_run_seconds", "From submission to the end, of runs that finished.", SLOW)
        self.first_token_seconds = histogram(
            "engine_first_token_seconds", "From submission to the first token, of streamed runs.", SLOW
        )
        self.between_tokens_seconds = histogram(
            "engine_between_tokens_seconds", "From one token to the next, of streamed runs.", FAST
        )
        self.capacity = gauge("engine_capacity", "What the engine holds at once.", "of")
        self.grade = gauge("service_grade", "The grade held: 1 best effort, 2 serial, 3 exact.")
        self.fingerprint = Info("ostinato_service_fingerprint", "What determines the answers.", registry=registry)
        self.self_test_seconds = gauge("service_self_test_seconds", "How long the self-test of this grade took.")
        self.streams = gauge("service_streams", "Execute streams that are open.")
        self.refused = counter("service_streams_refused", "Execute streams refused or broken off.", "reason")
        self.frame_events = histogram("service_frame_events", "Events in one message to the sidecar.", FRAME)

    def include(self, collector: Collector) -> None:
        """Serve what somebody else counts."""
        self._registry.register(collector)

    def describe(self, capacity: engine_pb2.Capacity, digest: bytes, fields: Mapping[str, str]) -> None:
        """What does not change while the process lives."""
        for field in capacity.DESCRIPTOR.fields:
            self.capacity.labels(field.name).set(getattr(capacity, field.name))
        chosen = {name: fields[name] for name in ("engine", "engine_version", "model", "device") if name in fields}
        self.fingerprint.info({"digest": digest.hex(), **chosen})

    def end(self, purpose: engine_pb2.Purpose.ValueType, end: str) -> None:
        """A run ended: finished, failed, cancelled or expired."""
        name = enums.word(engine_pb2.Purpose, purpose).lower() if purpose else "self_test"
        self.ended.labels(name, end).inc()
