"""Intervals, the sequential test, and counts by token index and by time. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
"""Of an interval, where none is asked for."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many events in so many trials, and where the probability behind them lies: Wilson's score interval."""

    events: int
    trials: int
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        assert 0 <= self.events <= self.trials
        assert 0 < self.confidence < 1

    @property
    def value(self) -> float:
        """0 where there were no trials; the bounds then say that nothing is known."""
        return self.events / self.trials if self.trials else 0.0

    @property
    def lower(self) -> float:
        return self._bound(-1) if self.events else 0.0

    @property
    def upper(self) -> float:
        return self._bound(1) if self.events < self.trials else 1.0

    def _bound(self, side: int) -> float:
        z = NormalDist().inv_cdf((1 + self.confidence) / 2)
        n, p = self.trials, self.value
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(1.0, max(0.0, (p + z * z / (2 * n) + side * spread) / (1 + z * z / n)))


@dataclass(frozen=True, slots=True)
class Ended:
    """Comparisons whose equal part ended within one span of token indexes, diverging there or clean (censored)."""

    diverged: int = 0
    clean: int = 0
    diverged_tokens: int = 0
    """Tokens before the difference, over all that diverged."""
    clean_tokens: int = 0
    """Tokens of those that did not."""

    def __add__(self, other: Ended) -> Ended:
        return Ended(
            self.diverged + other.diverged,
            self.clean + other.clean,
            self.diverged_tokens + other.diverged_tokens,
            self.clean_tokens + other.clean_tokens,
        )

    def after(self, tokens: int, *, diverged: bool) -> Ended:
        """And one more, equal over so many tokens."""
        if diverged:
            return Ended(self.diverged + 1, self.clean, self.diverged_tokens + tokens, self.clean_tokens)
        return Ended(self.diverged, self.clean + 1, self.diverged_tokens, self.clean_tokens + tokens)


def span_of(tokens: int) -> int:
    """Number of the span that a token index lies in: 0 is index 0; n is 2^(n-1) to 2^n - 1."""
    return tokens.bit_length()


def span_first(number: int) -> int:
    """The first index of a span; the next span begins behind its last."""
    return 1 << (number - 1) if number else 0


@dataclass(frozen=True, slots=True)
class Life:
    """One row of a life table."""

    first: int
    last: int
    """Token indexes, both included."""
    at_risk: int
    """Comparisons that were equal over all tokens before the first index."""
    ended: Ended
    hazard: Rate
    """Differences per token position compared within the span."""
    equal_before: float
    """Estimated share of answers that are equal over all tokens before the first index, were they long enough."""


def life_table(spans: Sequence[Ended], confidence: float = CONFIDENCE) -> list[Life]:
    """By span, as far as anything was compared. A clean run is censored at its end: it says nothing of what comes behind.

    The hazard is constant within a span (occurrences by exposure), which Kaplan and Meier's estimate is where a span is one
    index wide. A run that diverged at index i was tried at i + 1 positions, a clean one of n tokens at n.
    """
    table, equal = [], 1.0
    beyond = [sum(each.diverged + each.clean for each in spans[number:]) for number in range(len(spans) + 1)]
    for number, ended in enumerate(spans):
        first, next_first = span_first(number), span_first(number + 1)
        tried = ended.diverged_tokens + ended.clean_tokens - first * (ended.diverged + ended.clean) + ended.diverged
        tried += (next_first - first) * beyond[number + 1]
        hazard = Rate(ended.diverged, tried, confidence)
        table.append(Life(first, next_first - 1, beyond[number], ended, hazard, equal))
        equal *= (1 - hazard.value) ** (next_first - first)
    return table


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
