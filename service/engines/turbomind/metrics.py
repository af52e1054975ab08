"""Prometheus metrics of the engine: the overrides' counters, our own, and LMDeploy's (`lmdeploy_x` for its `lmdeploy:x`).

LMDeploy's PrometheusStatLogger is not used. It lives in prometheus_client's default registry, removes every collector
whose name begins with lmdeploy from it, and needs a record of every token of every run. So the metrics that TurboMind
itself knows are made here with LMDeploy's buckets: the scheduler's at each scrape, a run's once, when it has left.
docs/operations.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from service.engines.turbomind.overrides import Overrides

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from service.engines.turbomind.native import Account, Handle, Load


SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""LMDeploy's bounds for the durations of a run."""


class Preemptions:
    """Counts runs that TurboMind took out of its batch, to compute them again later with other kernels. Pure.

    TurboMind does not report this. It reports how many runs wait, and for each run when it was first in a step.

    1. If more runs wait than have never been in a step, one was preempted. There are no false alarms. 2. A preemption that
    begins and ends between two observations is missed. An observation is made at every report of TurboMind (each step while a
    run streams, else each run's end) and every few seconds. 3. A run that left without ever having been in a step may be
    counted as waiting until the next step.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        self.count = 0
        self._load = load
        self._new: dict[int, Handle] = {}
        """Runs that had not been in a step at the last observation, and those that came since."""
        self._left: list[int] = []
        """Of the runs that left from among them, the tick at that time."""
        self._as_of = -1
        """Numbers of a later tick are newer than the last observation."""
        self._out = 0

    def enter(self, run_id: int, run: Handle) -> None:
        """To be called before TurboMind can count the run as waiting."""
        self._new[run_id] = run

    def leave(self, run_id: int) -> None:
        if self._new.pop(run_id, None) is not None:
            self._left.append(self._load().tick)

    def observe(self) -> None:
        """TurboMind marks runs first and publishes its numbers a moment later. So only numbers newer than the last
        observation are compared with the runs that were new then: a run that waits in them without a step is one of these."""
        now = self._load()
        self._left = [tick for tick in self._left if tick >= now.tick]
        if now.tick > self._as_of:
            out = max(0, now.waiting - len(self._new) - len(self._left))
            self.count += max(0, out - self._out)
            self._out = out
        self._new = {run_id: run for run_id, run in self._new.items() if not run.scheduled}
        self._as_of = self._load().tick


class Meter:
    """Of one engine. Everything but `collect` runs on the event loop, and nothing for each token."""

    def __init__(self, context_tokens: int, load: Callable[[], Load]) -> None:
        self._load = load
        own = self._own = CollectorRegistry()
        tokens = [value for power in range(8) for value in (10**power, 2 * 10**power, 5 * 10**power) if value <= context_tokens]
        self._prompt = Counter("lmdeploy_prompt_tokens", "Prompt tokens of runs that have left.", registry=own)
        self._generated = Counter("lmdeploy_generation_tokens", "Tokens made for runs that have left.", registry=own)

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"lmdeploy_request_{name}", what, registry=own, buckets=buckets)

        self._prompt_of_run = histogram("prompt_tokens", "Prompt tokens of a run that succeeded.", tokens)
        self._generated_of_run = histogram("generation_tokens", "Tokens made for a run that succeeded.", tokens)
        self._queue = histogram("queue_time_seconds", "From TurboMind's queue to its first step.", SECONDS)
        self._inference = histogram("inference_time_seconds", "From a run's first step to its end.", SECONDS)
        self.preemptions = Preemptions(load)
        """Must stay 0."""
        self._ends = {"succeeded": 0, "failed": 0}
        self.cached_tokens = 0
        """Prompt tokens that came from the prefix cache."""
        self.rests_of_one = 0
        """Prompts of which all but one token came from the cache. Must stay 0."""

    def left(self, run_id: int, account: Account, prompt: int, made: int, *, succeeded: bool, now: float) -> None:
        """With `prompt` prompt tokens and `made` new ones. `now` is Unix time in seconds, as TurboMind's times are."""
        self.preemptions.leave(run_id)
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

    def collect(self, overrides: Overrides | None) -> Iterator[Metric]:
        """Any thread."""
        load = self._load()
        yield from self._own.collect()
        counted: list[tuple[str, str, int]] = []
        if overrides is not None:
            counters = overrides.counters
            calls = CounterMetricFamily("ostinato_engine_override_calls", "Calls that an override served.", labels=["override"])
            for override, count in counters.calls.items():
                calls.add_metric([override], count)
            yield calls
            counted = [
                ("override_plans", "Products planned, by number of tokens.", counters.plans),
                ("override_corrected", "Prompts of which two tokens were computed, not one.", counters.corrected),
                ("override_uncovered", "Products that no permitted algorithm could serve.", counters.uncovered),
            ]
        counted += [
            ("steps", "Steps of the engine's scheduler.", load.tick),
            ("preemptions", "Runs that TurboMind took out of its batch, as far as observed.", self.preemptions.count),
        ]
        for name, text, count in counted:
            yield CounterMetricFamily(f"ostinato_engine_{name}", text, value=count)
        cached = "Prompt tokens that came from the prefix cache."
        yield CounterMetricFamily("lmdeploy_cached_tokens", cached, value=self.cached_tokens)
        for name, text, value in (
            ("ostinato_engine_kv_usage_ratio", "Part of the KV cache's memory in use.", load.usage),
            ("lmdeploy_num_requests_succeeded", "Runs that came to their end.", self._ends["succeeded"]),
            ("lmdeploy_num_requests_failed", "Runs that were cancelled or failed.", self._ends["failed"]),
            ("lmdeploy_num_requests_running", "Runs in TurboMind's batch.", load.active),
            ("lmdeploy_num_requests_waiting", "Runs that wait inside TurboMind.", load.waiting),
            ("lmdeploy_gpu_cache_usage_perc", "Part of the KV cache in use; 1 is all.", load.usage),
            ("lmdeploy_prefix_cache_hit_rate", "Part of prompts found in the cache.", load.prefix_hits),
        ):
            yield GaugeMetricFamily(name, text, value=value)
