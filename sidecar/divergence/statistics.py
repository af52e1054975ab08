"""Confidence intervals, the sequential test, and shares over time. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

CONFIDENCE = 0.95
"""Default confidence of an interval."""

TOLERABLE, FAULTY = 0.001, 0.01
"""The two hypotheses of the sequential test: probabilities that a comparison diverges."""
ALARM = 100.0
"""Evidence at which the alarm is raised."""
_LOG_RATIO = {True: math.log(FAULTY / TOLERABLE), False: math.log((1 - FAULTY) / (1 - TOLERABLE))}

BUCKET_MILLIS = 60_000
"""Initial width of a time bucket."""
BUCKETS_MAX = 96
"""Time buckets of a series. If there would be more, the width is doubled."""


@dataclass(frozen=True, slots=True)
class Share:
    """Comparisons, and how many of them diverged, with Wilson's score interval for the probability."""

    compared: int = 0
    diverged: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.compared + other.compared, self.diverged + other.diverged)

    @property
    def value(self) -> float:
        """0 without comparisons. The interval is then 0 to 1."""
        return self.diverged / self.compared if self.compared else 0.0

    def lower(self, confidence: float = CONFIDENCE) -> float:
        return self._bound(confidence, -1) if self.diverged else 0.0

    def upper(self, confidence: float = CONFIDENCE) -> float:
        return self._bound(confidence, 1) if self.diverged < self.compared else 1.0

    def _bound(self, confidence: float, side: int) -> float:
        assert 0 < confidence < 1
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        n, p = self.compared, self.value
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(1.0, max(0.0, (p + z * z / (2 * n) + side * spread) / (1 + z * z / n)))


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence that comparisons diverge more often than TOLERABLE: a sequential test that may be read at any time.

    The likelihood ratio of FAULTY against TOLERABLE, mixed over the comparison at which the fault began, so that a long clean
    past does not hide a new fault. With L_t the ratio of the t-th comparison:

        S_t = L_t (S_{t-1} + 1 / (t (t + 1)))        E_t = S_t + 1 / (t + 1)

    The weights of the starts sum to 1, so E is an e-process: while divergence is tolerable, the probability that E ever reaches
    ALARM is at most 1 / ALARM, however often it is read. Computed in logarithms, so that nothing overflows.
    """

    trials: int = 0
    log_sum: float | None = None
    """Natural logarithm of S. None stands for S = 0."""

    def after(self, *, diverged: bool) -> Evidence:
        """The evidence after one more comparison."""
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
        """Whether E is at least ALARM. The alarm ends after enough clean comparisons."""
        return self.log >= math.log(ALARM)


def _log_add(a: float | None, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a is None:
        return b
    low, high = min(a, b), max(a, b)
    return high + math.log1p(math.exp(low - high))


@dataclass(frozen=True, slots=True)
class Series:
    """Shares over time, in at most BUCKETS_MAX buckets of equal width."""

    bucket_millis: int = BUCKET_MILLIS
    buckets: Mapping[int, Share] = field(default_factory=dict)
    """By Unix time divided by the width."""

    def after(self, unix_millis: int, share: Share) -> Series:
        """The series with this share added. Times need not ascend."""
        number = unix_millis // self.bucket_millis
        series = Series(self.bucket_millis, {**self.buckets, number: self.buckets.get(number, Share()) + share})
        while len(series.buckets) > BUCKETS_MAX:
            buckets: dict[int, Share] = {}
            for number, each in series.buckets.items():
                buckets[number // 2] = buckets.get(number // 2, Share()) + each
            series = Series(2 * series.bucket_millis, buckets)
        return series


def bin_bounds(number: int) -> tuple[int, int]:
    """The first and the last number with this bit length. Token indexes and batch occupancies are counted by bit length."""
    return 1 << number >> 1, (1 << number) - 1
