"""How a product's permit comes about, with trials that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from service.engines.turbomind.calibrate import _measured
from service.engines.turbomind.plans import PERIOD, Candidate, Trial, grid, timed
from service.engines.turbomind.trials import Trials

SLOW, FAST = Candidate(66, (66, 1), b"\x01"), Candidate(66, (66, 2), b"\x02")
GEMV = Candidate(16, (16, 1), b"\x03")


@dataclass
class FakeTrials:
    """cublasLt offers the slow tile everywhere but for 100 tokens, where it offers the fast one, and a kernel that rounds
    otherwise for one token."""

    rows: int
    rounds: Callable[[Candidate, int], str] = lambda candidate, n: str(candidate.algorithm)

    def _offers(self, n: int) -> list[Candidate]:
        return [*([GEMV] if n == 1 else []), FAST if n == 100 else SLOW]

    def offered(self, n: int) -> Iterator[Trial]:
        for rank, candidate in enumerate(self._offers(n)):
            yield self._trial(n, rank, candidate)

    def race(self, n: int, others: Iterable[Candidate]) -> Iterator[Trial]:
        offers = self._offers(n)
        for rank, candidate in enumerate(dict.fromkeys([*offers, *others])):
            if candidate != GEMV or n == 1:
                seconds = 1.0 if candidate == FAST and n > 8 else 2.0
                yield replace(self._trial(n, rank, candidate), seconds=seconds, offered=candidate in offers)

    def _trial(self, n: int, rank: int, candidate: Candidate) -> Trial:
        rows = tuple(f"{self.rounds(candidate, n)} {row}" for row in range(min(n, PERIOD)))
        return Trial(n, rank, candidate, True, rows)


def test_an_offer_for_one_number_of_tokens_serves_others_if_it_is_faster() -> None:
    """Each number that was timed has its fastest, of those that round alike everywhere; one that was not offered there is tried
    at all numbers it is to serve."""
    choice, permit, trials = _measured(cast(Trials, FakeTrials(100)))

    assert (choice.permitted, choice.missing) == ((66,), ())
    assert permit is not None
    assert permit.fastest == tuple((n, "02" if 8 < n < 100 else "") for n in timed(100))
    assert permit.rows == 100
    assert {trial.n for trial in trials if trial.seconds} == {*timed(100), *(n for n in grid(100) if 8 < n < 97)}


def test_a_winner_that_rounds_otherwise_in_between_takes_its_class_with_it() -> None:
    """It would have served there: 33 tokens were never timed, and are served like 48."""
    choice, permit, _ = _measured(
        cast(Trials, FakeTrials(100, lambda candidate, n: "odd" if candidate == FAST and n == 33 else str(candidate.algorithm)))
    )

    assert (choice.permitted, permit.fastest if permit else None) == ((16,), ())
    assert 33 in choice.missing


def test_what_rounds_by_the_number_of_tokens_is_never_permitted() -> None:
    """What is left then is a kernel for one token, and all other numbers are missing."""
    choice, permit, _ = _measured(cast(Trials, FakeTrials(100, lambda candidate, n: f"{candidate.algorithm} {n}")))

    assert choice.permitted == (16,)
    assert set(choice.missing) == {*grid(100), *timed(100)} - {1}
    assert permit is not None
    assert permit.fastest == ((1, ""),)
