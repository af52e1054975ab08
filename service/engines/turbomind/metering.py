"""What the overrides count, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from service.engines.turbomind.overrides import Overrides

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from service.engines.turbomind.native import Load


def samples(overrides: Overrides | None, load: Load) -> Iterator[Metric]:
    """Without overrides, of the scheduler alone."""
    yield GaugeMetricFamily("ostinato_engine_kv_usage_ratio", "Part of the KV cache's memory in use.", value=load.usage)
    yield CounterMetricFamily("ostinato_engine_steps", "Steps of the engine's scheduler.", value=load.tick)
    if overrides is None:
        return
    counters = overrides.counters
    calls = CounterMetricFamily("ostinato_engine_override_calls", "Calls that an override served.", labels=["override"])
    for name, value in counters.calls.items():
        calls.add_metric([name], value)
    yield calls
    yield CounterMetricFamily("ostinato_engine_override_plans", "Products planned, by number of tokens.", value=counters.plans)
    yield CounterMetricFamily(
        "ostinato_engine_override_uncovered", "Products that no permitted algorithm could serve.", value=counters.uncovered
    )
