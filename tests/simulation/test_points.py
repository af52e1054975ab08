"""Death at every named point: whatever step the sidecar has just taken or was about to take, all promises hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.simulation.points import NOT_REACHED, POINTS, SEAMS, dies_at, methods
from tests.simulation.promises import broken
from tests.simulation.stores import SqliteLog, Store

STORES: dict[str, Callable[[Path], Store]] = {"sqlite": SqliteLog}
"""Every backend that a crash can leave something of."""


@cache
def reached(backend: str, folder: Path) -> Counter[str]:
    """How often a life without a death comes by each point."""
    history, counts = dies_at(STORES[backend](folder))
    assert broken(history) == {}
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("backend", STORES)
@pytest.mark.parametrize("point", POINTS)
def test_death_at_a_point(point: str, backend: str, folder: Path, tmp_path: Path) -> None:
    """The sidecar dies here, with the power, in the middle of its life; it recovers, and no promise is broken."""
    times = reached(backend, folder)[point]
    assert times, "nothing comes by here any more"
    history, counts = dies_at(STORES[backend](tmp_path), point, (times + 1) // 2)

    assert counts[point] >= (times + 1) // 2
    assert broken(history) == {}


@pytest.mark.sim
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", STORES)
@pytest.mark.parametrize("point", POINTS)
def test_every_death_at_a_point(point: str, backend: str, folder: Path, tmp_path: Path) -> None:
    """And so it is whichever time the sidecar comes by there: the first twelve, and the last."""
    times = reached(backend, folder)[point]
    for occurrence in sorted({*range(1, min(times, 12) + 1), times}):
        room = tmp_path / str(occurrence)
        room.mkdir()
        history, _ = dies_at(STORES[backend](room), point, occurrence)
        assert broken(history) == {}, f"time {occurrence}"


def test_every_step_has_its_points() -> None:
    """Each method of each seam has a point before and after it, unless it is said why not."""
    steps = {f"{seam}.{method}" for seam, protocol in SEAMS.items() for method in methods(protocol)}
    named = {" ".join(point.split()[1:2]) for point in POINTS}

    assert steps - named == steps & set(NOT_REACHED)
