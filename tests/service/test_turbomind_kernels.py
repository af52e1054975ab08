"""Which algorithms may serve, and when a kept manifest is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.turbomind.kernels import (
    PERIOD,
    Manifest,
    Permit,
    Trial,
    Trials,
    _measured,
    between,
    choose,
    fastest,
    from_json,
    grid,
    load,
    save,
    timed,
)
from service.engines.turbomind.overrides import Candidate, Shape
from tests.service.turbomind_kit import LAYER

SHAPE = Shape(0, 0, 576, 1536, 14, 14, 14, 576, 1536, 576, 68)
OTHER = dataclasses.replace(SHAPE, m=49_152)
ENVIRONMENT = {"lmdeploy": "0.18.0", "cublas": "libcublasLt.so.13 130100", "gpu": "H100", "driver": "580.159"}
MANIFEST = Manifest(
    ENVIRONMENT, {SHAPE: Permit((66,), 8448, ((1, "0a"), (8448, "ff"))), OTHER: Permit((66, 67), 256)}, "ab" * 32
)


def trial(n: int, rank: int, algorithm: int, sound: str = "x", *, alike: bool = True) -> Trial:
    rows = tuple(f"{sound}{row}" for row in range(min(n, PERIOD)))
    return Trial(n, rank, Candidate(algorithm, (algorithm, rank), b"%d" % rank), alike, rows)


def measured(n: int, rank: int, seconds: float | None, algorithm: int = 66) -> Trial:
    return dataclasses.replace(trial(n, rank, algorithm), seconds=seconds)


@pytest.mark.parametrize(
    ("trials", "permitted"),
    [
        ([trial(n, rank, algorithm) for n in (1, 2, 8, 100) for rank, algorithm in enumerate((66, 71))], (66, 71)),
        ([trial(1, 0, 16, "y"), *(trial(n, 1, 66) for n in (1, 2, 300))], (66,)),
        ([trial(1, 2, 66), trial(64, 2, 66), trial(1, 0, 30, "y"), trial(64, 0, 30, "z")], (66,)),
        ([trial(1, 2, 66), trial(64, 2, 66), trial(1, 1, 31), trial(64, 1, 31, alike=False)], (66,)),
        ([*(trial(n, 0, 20, "y") for n in (1, 2)), *(trial(n, 1, 66) for n in (1, 2, 3))], (66,)),
        ([trial(n, rank, 20 + rank, "xy"[rank]) for n in (1, 2) for rank in (0, 1)], (20,)),
        ([trial(1, 0, 66), trial(2, 0, 66), trial(5, 0, 20, alike=False)], (66,)),
        ([trial(5, 0, 20, alike=False)], ()),
        ([], ()),
    ],
)
def test_algorithms_with_equal_bits_are_permitted_together(trials: list[Trial], permitted: tuple[int, ...]) -> None:
    """Algorithms with equal bits form one class, whatever their tiles. One with other bits is not permitted, even if cublasLt
    prefers it for one token; nor one whose bits vary, between numbers of tokens or within one. The class that serves the
    most numbers of tokens is permitted, of equal classes the one that cublasLt ranks higher."""
    assert choose(trials) == permitted


@given(st.integers(1, 20_000))
def test_the_grid_has_all_small_numbers_both_ends_and_the_edges_of_tiles(most: int) -> None:
    """The grid is ascending, without duplicates, and ends at the maximum."""
    found = grid(most)

    assert found == sorted(set(found))
    assert found[0] == 1
    assert found[-1] == most
    assert {n for n in (*range(1, 10), 15, 16, 17, 63, 64, 65, 127, 128, 129, 4096, 4097) if n <= most} <= set(found)


@given(st.integers(1, 20_000))
def test_times_are_taken_along_the_grid(most: int) -> None:
    """Timed numbers of tokens are ascending, have both ends, are few, and are dense beyond 512."""
    found, also = timed(most), between(most)

    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, most)
    assert not set(found) & set(also)
    assert len(found) + len(also) <= 48
    whole = sorted(n for n in (*found, *also) if n >= 512)
    assert all(right - left <= max(256, -(-most // 16)) for left, right in pairwise(whole))


STRANGER = dataclasses.replace(measured(8, 5, 2.0), offered=False)


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        (
            [measured(8, 0, 3.0), measured(8, 1, 2.0), measured(8, 2, 1.0, 20), measured(1, 0, 1.0), measured(1, 1, 1.5)],
            {1: None, 8: measured(8, 1, 2.0).candidate},
        ),
        ([measured(8, 0, 1.0), measured(8, 1, 0.98), measured(9, 0, None)], {8: None}),
        ([measured(8, 0, 1.0, 20), STRANGER], {8: STRANGER.candidate}),
    ],
)
def test_the_fastest_permitted_candidate_serves(trials: list[Trial], chosen: dict[int, Candidate | None]) -> None:
    """The fastest permitted candidate serves, whatever its rank, by rising tokens; others are ignored, and so is a trial
    without a time. A difference within noise leaves cublasLt's preferred candidate; one that was not offered is named."""
    assert list(fastest(trials, (66,)).items()) == list(chosen.items())


def test_a_manifest_survives_its_file() -> None:
    """A manifest is read back as it was written."""
    assert from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_manifest_from_elsewhere_is_not_used(name: str, tmp_path: Path) -> None:
    """A manifest of another environment is not used, whatever its file's name."""
    save(tmp_path / "plans", MANIFEST)
    why = f"the kept one is of another environment: {name} was {ENVIRONMENT[name]}, is another"

    assert load(tmp_path / "plans", ENVIRONMENT) == (MANIFEST, "kept")
    assert load(tmp_path / "plans", ENVIRONMENT | {name: "another"}) == (None, why)


def test_the_digest_is_of_kernels_alone() -> None:
    """The order of shapes and how far they were tried change nothing; another algorithm or table does. Which
    of those that round alike is fastest is chance."""
    reordered = dataclasses.replace(
        MANIFEST, permits={shape: MANIFEST.permits[shape] for shape in (OTHER, SHAPE)}, environment={}
    )
    tried = dataclasses.replace(MANIFEST, permits={**MANIFEST.permits, SHAPE: Permit((66,), 1, ((1, "0b"),))})
    another = dataclasses.replace(MANIFEST, permits={**MANIFEST.permits, SHAPE: Permit((67,), 8448)})
    table = dataclasses.replace(MANIFEST, table="")

    assert reordered.digest == tried.digest == MANIFEST.digest
    assert len({MANIFEST.digest, another.digest, table.digest}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        MANIFEST.to_json().replace("66", "67"),
        MANIFEST.to_json().replace("0a", "0b"),
        json.dumps({"environment": {}, "permits": [1], "table": ""}),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(text: str) -> None:
    """A text that is no manifest, or was changed, is refused."""
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


SLOW, FAST = Candidate(66, (66, 1), b"\x01"), Candidate(66, (66, 2), b"\x02")
GEMV = Candidate(16, (16, 1), b"\x03")


@dataclass
class FakeTrials:
    """cublasLt offers the slow tile, for 100 tokens the fast one, and for one token also a kernel that rounds otherwise."""

    rows: int
    shape = LAYER
    rounds: Callable[[Candidate, int], str] = lambda candidate, n: str(candidate.algorithm)

    def _offers(self, n: int) -> list[Candidate]:
        return [*([GEMV] if n == 1 else []), FAST if n == 100 else SLOW]

    def offered(self, n: int) -> Iterator[Trial]:
        for rank, candidate in enumerate(self._offers(n)):
            yield self._trial(n, rank, candidate)

    def timed(self, n: int, others: Iterable[Candidate]) -> Iterator[Trial]:
        offers = self._offers(n)
        for rank, candidate in enumerate(dict.fromkeys([*offers, *others])):
            if candidate != GEMV or n == 1:
                seconds = 1.0 if candidate == FAST and n > 8 else 2.0
                yield replace(self._trial(n, rank, candidate), seconds=seconds, offered=candidate in offers)

    def _trial(self, n: int, rank: int, candidate: Candidate) -> Trial:
        rows = tuple(f"{self.rounds(candidate, n)} {row}" for row in range(min(n, PERIOD)))
        return Trial(n, rank, candidate, True, rows)


def test_an_offer_for_one_number_of_tokens_serves_others_if_it_is_faster() -> None:
    """Each timed number has its fastest candidate of those that round alike; one that was not offered there is tried at all
    numbers that it will serve."""
    permit, trials = _measured(cast(Trials, FakeTrials(100)))

    assert permit is not None
    assert permit.algorithms == (66,)
    assert permit.fastest == tuple((n, "02" if 8 < n < 100 else "") for n in timed(100))
    assert permit.rows == 100
    assert {trial.n for trial in trials if trial.seconds} == {*timed(100), *(n for n in grid(100) if 8 < n < 97)}


def test_a_winner_that_rounds_otherwise_in_between_takes_its_class_with_it() -> None:
    """A fastest candidate with other bits at a number between is dropped: 33 tokens are served as 48."""
    permit, _ = _measured(
        cast(Trials, FakeTrials(100, lambda candidate, n: "odd" if candidate == FAST and n == 33 else str(candidate.algorithm)))
    )

    assert permit == Permit((16,), 100)


def test_what_rounds_by_the_number_of_tokens_is_never_permitted() -> None:
    """An algorithm whose bits depend on the number of tokens is never permitted; what serves one number serves no other."""
    permit, _ = _measured(cast(Trials, FakeTrials(100, lambda candidate, n: f"{candidate.algorithm} {n}")))

    assert permit == Permit((16,), 100, ((1, ""),))
