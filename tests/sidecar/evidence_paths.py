"""A vectorised simulation of the sequential test: when the alarm is first raised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from sidecar.divergence.statistics import ALARM, FAULTY, TOLERABLE

NEVER = 0


def log_evidence(comparisons: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Natural logarithm of E after each comparison, of many paths. Each comparison says which of them diverge."""
    log_sum: np.ndarray | float = -math.inf
    for t, diverged in enumerate(comparisons, start=1):
        ratio = np.where(diverged, math.log(FAULTY / TOLERABLE), math.log((1 - FAULTY) / (1 - TOLERABLE)))
        log_sum = ratio + np.logaddexp(log_sum, -math.log(t * (t + 1)))
        yield np.logaddexp(log_sum, -math.log(t + 1))


def alarms(paths: int, clean: int, trials: int, probability: float, seed: int) -> np.ndarray:
    """For each path, the number of the comparison at which the alarm is first raised, or NEVER.

    After `clean` clean comparisons, `trials` comparisons diverge with this probability. Only those are numbered.
    """
    random, first = np.random.default_rng(seed), np.full(paths, NEVER)
    comparisons = (random.random(paths) < (probability if t >= clean else 0.0) for t in range(clean + trials))
    for t, evidence in enumerate(log_evidence(comparisons), start=1):
        first = np.where((evidence >= math.log(ALARM)) & (first == NEVER), max(t - clean, 1), first)
    return first
