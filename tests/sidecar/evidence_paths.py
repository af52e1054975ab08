"""A vectorised simulation of the sequential test: when the alarm is first raised."""

from __future__ import annotations

import math

import numpy as np

from sidecar.divergence.statistics import ALARM, FAULTY, TOLERABLE

NEVER = 0


def log_evidence(diverged: np.ndarray) -> np.ndarray:
    """Natural logarithm of E after each comparison. Both arrays have one row per path."""
    paths, trials = diverged.shape
    ratio = np.where(diverged, math.log(FAULTY / TOLERABLE), math.log((1 - FAULTY) / (1 - TOLERABLE)))
    log_sum, evidence = np.full(paths, -np.inf), np.empty((paths, trials))
    for column in range(trials):
        t = column + 1
        log_sum = ratio[:, column] + np.logaddexp(log_sum, -math.log(t * (t + 1)))
        evidence[:, column] = np.logaddexp(log_sum, -math.log(t + 1))
    return evidence


def alarms(paths: int, clean: int, trials: int, probability: float, seed: int) -> np.ndarray:
    """For each path, the number of the comparison at which the alarm is first raised, or NEVER.

    After `clean` clean comparisons, `trials` comparisons diverge with this probability. Only those are numbered.
    """
    random = np.random.default_rng(seed)
    faulty, tolerable = math.log(FAULTY / TOLERABLE), math.log((1 - FAULTY) / (1 - TOLERABLE))
    log_sum, first = np.full(paths, -np.inf), np.full(paths, NEVER)
    for t in range(1, clean + trials + 1):
        diverged = random.random(paths) < (probability if t > clean else 0.0)
        log_sum = np.where(diverged, faulty, tolerable) + np.logaddexp(log_sum, -math.log(t * (t + 1)))
        up = np.logaddexp(log_sum, -math.log(t + 1)) >= math.log(ALARM)
        first = np.where(up & (first == NEVER), max(t - clean, 1), first)
    return first
