"""A sequential test that may be watched all the time: evidence that more than one comparison in a thousand diverges.

A likelihood ratio of FAULTY against TOLERABLE, mixed over the moment at which the fault began, so that a long clean past does
not hide a new fault. With L_t the ratio of the t-th comparison:

    S_t = L_t (S_{t-1} + 1 / (t (t + 1)))        E_t = S_t + 1 / (t + 1)

The weights of the start times sum to 1, so E is an e-process: while divergence is tolerable, it ever reaches ALARM with
probability 1 / ALARM at most, however often one looks. Pure, and in logarithms, so that nothing overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TOLERABLE, FAULTY = 0.001, 0.01
"""Probabilities that a comparison diverges."""
ALARM = 100.0
"""Evidence from which on the alarm is up."""

_LOG_RATIO = {True: math.log(FAULTY / TOLERABLE), False: math.log((1 - FAULTY) / (1 - TOLERABLE))}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a series of comparisons says."""

    trials: int = 0
    log_sum: float | None = None
    """Natural logarithm of S; None: of 0."""

    def after(self, *, diverged: bool) -> Evidence:
        """With one comparison more."""
        trials = self.trials + 1
        return Evidence(trials, _LOG_RATIO[diverged] + _log_add(self.log_sum, -math.log(trials * (trials + 1))))

    @property
    def log(self) -> float:
        """Natural logarithm of E."""
        return _log_add(self.log_sum, -math.log(self.trials + 1))

    @property
    def log10(self) -> float:
        return self.log / math.log(10)

    @property
    def alarm(self) -> bool:
        """Up while E is at ALARM or above. It falls by itself, once enough comparisons were clean."""
        return self.log >= math.log(ALARM)


def _log_add(a: float | None, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a is None:
        return b
    low, high = min(a, b), max(a, b)
    return high + math.log1p(math.exp(low - high))
