"""What Prometheus is shown: what the overrides and we count, and LMDeploy's own metrics, `lmdeploy_x` for its `lmdeploy:x`.

Its PrometheusStatLogger is not fed. It lives in prometheus_client's default registry, throws whatever is called lmdeploy out of
it, and wants a record of every token of every run: the cost for which its AsyncEngine was left out. So those that TurboMind
itself knows are made here, with LMDeploy's buckets: the scheduler's when Prometheus asks, a run's once, when it has left. The
others would be times of the service, not of TurboMind, and have names of ours; docs/operations.md says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from service.engines.turbomind.overrides import Overrides
from service.engines.turbomind.preemptions import Preemptions

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from service.engines.turbomind.native import Account, Handle, Load

SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""LMDeploy's bounds for what a run takes."""


class Meter:
    """Of one engine. Everything but `collect` on the event loop; nothing here is done for each token."""

    def __init__(self, context_tokens: int, load: Callable[[], Load]) -> None:
        self._load = load
        own = self._own = CollectorRegistry()
        tokens = [value for power in range(8) for value in (10**power, 2 * 10**power, 5 * 10**power) if value <= context_tokens]
        self._prompt = Counter("lmdeploy_prompt_tokens", "Prompt tokens of runs that have left.", registry=own)
        self._generated = Counter("lmdeploy_generation_tokens", "Tokens made for runs that have left.", registry=own)
        self._prompt_of_run = Histogram(
            "lmdeploy_request_prompt_tokens", "Prompt tokens of a run that succeeded.", registry=own, buckets=tokens
        )
        self._generated_of_run = Histogram(
            "lmdeploy_request_generation_tokens", "Tokens made for a run that succeeded.", registry=own, buckets=tokens
        )
        self._queue = Histogram(
            "lmdeploy_request_queue_time_seconds", "From TurboMind's queue to its first step.", registry=own, buckets=SECONDS
        )
        self._inference = Histogram(
            "lmdeploy_request_inference_time_seconds", "From a run's first step to its end.", registry=own, buckets=SECONDS
        )
        self._preemptions = Preemptions(load)
        self._ends = {"succeeded": 0, "failed": 0}
        self.cached_tokens = 0
        """Prompt tokens that came from the prefix cache."""
        self.rests_of_one = 0
        """Prompts that came from the cache but for one token: there are none."""

    @property
    def preemptions(self) -> int:
        """Runs taken out of the batch, as far as was seen: there are none."""
        return self._preemptions.count

    def entered(self, run_id: int, handle: Handle) -> None:
        self._preemptions.enter(run_id, handle)

    def left(self, run_id: int, account: Account, prompt: int, made: int, *, succeeded: bool, now: float) -> None:
        """With so many tokens of its prompt and made for it; `now` is Unix time in seconds, as TurboMind's times are."""
        self._preemptions.leave(run_id)
        self._ends["succeeded" if succeeded else "failed"] += 1
        if not account.scheduled:
            return
        self.cached_tokens += account.cached
        self.rests_of_one += account.cached > 0 and prompt - account.cached == 1
        self._prompt.inc(prompt)
        self._generated.inc(made)
        if succeeded:
            self._prompt_of_run.observe(prompt)
            self._generated_of_run.observe(made)
            self._queue.observe(account.scheduled - account.queued)
            self._inference.observe(now - account.scheduled)

    def look(self) -> None:
        """Whether a run was taken out."""
        self._preemptions.look()

    def collect(self, overrides: Overrides | None) -> Iterator[Metric]:
        """Any thread. Without overrides, nothing of them."""
        load = self._load()
        yield GaugeMetricFamily("ostinato_engine_kv_usage_ratio", "Part of the KV cache's memory in use.", value=load.usage)
        yield CounterMetricFamily("ostinato_engine_steps", "Steps of the engine's scheduler.", value=load.tick)
        yield CounterMetricFamily(
            "ostinato_engine_preemptions",
            "Runs that TurboMind took out of its batch, as far as was seen.",
            value=self.preemptions,
        )
        if overrides is not None:
            yield from _of_overrides(overrides)
        yield from self._own.collect()
        yield CounterMetricFamily(
            "lmdeploy_cached_tokens", "Prompt tokens that came from the prefix cache.", value=self.cached_tokens
        )
        for name, text, value in (
            ("requests_succeeded", "Runs that came to their end.", self._ends["succeeded"]),
            ("requests_failed", "Runs that were cancelled or failed.", self._ends["failed"]),
            ("requests_running", "Runs in TurboMind's batch.", load.active),
            ("requests_waiting", "Runs that wait inside TurboMind.", load.waiting),
        ):
            yield GaugeMetricFamily(f"lmdeploy_num_{name}", text, value=value)
        yield GaugeMetricFamily("lmdeploy_gpu_cache_usage_perc", "Part of the KV cache in use; 1 is all.", value=load.usage)
        yield GaugeMetricFamily("lmdeploy_prefix_cache_hit_rate", "Part of prompts found in the cache.", value=load.prefix_hits)


def _of_overrides(overrides: Overrides) -> Iterator[Metric]:
    counters = overrides.counters
    calls = CounterMetricFamily("ostinato_engine_override_calls", "Calls that an override served.", labels=["override"])
    for name, value in counters.calls.items():
        calls.add_metric([name], value)
    yield calls
    yield CounterMetricFamily("ostinato_engine_override_plans", "Products planned, by number of tokens.", value=counters.plans)
    yield CounterMetricFamily(
        "ostinato_engine_override_corrected", "Prompts of which two tokens were computed, not one.", value=counters.corrected
    )
    yield CounterMetricFamily(
        "ostinato_engine_override_uncovered", "Products that no permitted algorithm could serve.", value=counters.uncovered
    )
