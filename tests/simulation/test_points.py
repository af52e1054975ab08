"""A failure at every named point: whatever step the sidecar has just taken or was about to take, all promises hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.postgres import Postgres
from tests.simulation.points import DRAFTS, INTERFACES, NOT_REACHED, POINTS, Failure, methods, run_with_failures
from tests.simulation.postgres_log import PostgresLog
from tests.simulation.promises import broken
from tests.simulation.stores import Log, SqliteLog


def about(*steps: str) -> list[str]:
    """The points of the steps that begin so."""
    return [point for point in POINTS if point.split(" ", 1)[1].startswith(steps)]


DATABASE = about("database.")
PLACES = [("sqlite", point) for point in POINTS if point not in DATABASE] + [("postgres", point) for point in POINTS]
"""The points on every backend that a crash can leave something of."""
DURABLE = about("backend.open", "backend.append_many", "database.begin", "database.take", "database.commit")
QUICK = [("death", *place) for place in PLACES if place[0] == "sqlite" or place[1] in DURABLE]
"""Of PostgreSQL those at which something becomes durable."""
QUICK += [("cut", "postgres", point) for point in about("database.begin", "database.commit")]
QUICK += [("crash", "postgres", point) for point in about("database.commit admission", "database.commit outcome")]
EVERY = [("death", *place) for place in PLACES]
EVERY += [(kind, "postgres", point) for kind in ("cut", "crash") for point in DATABASE]
IN_DOUBT = about("database.commit admission", "database.commit outcome", "database.commit audit", "database.commit note")


class Logs:
    """New ones, and what an undisturbed life does on them."""

    def __init__(self, folder: Path, server: Callable[[], Postgres]) -> None:
        self._folder, self._server = folder, server
        self._made = 0
        self.reached = cache(self._reached)

    def new(self, backend: str) -> Log:
        if backend == "postgres":
            return PostgresLog(self._server())
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        return SqliteLog(folder)

    def _reached(self, backend: str) -> Counter[str]:
        """How often it comes by each point."""
        history, counts = run_with_failures(self.new(backend))
        assert broken(history) == {}
        return counts

    def middle(self, backend: str, point: str) -> int:
        """The time in the middle of those at which it comes by there."""
        times = self.reached(backend)[point]
        assert times, "nothing comes by here any more"
        return (times + 1) // 2

    def some(self, backend: str, point: str, most: int) -> list[int]:
        """The first times, and the last."""
        times = self.reached(backend)[point]
        return sorted({*range(1, min(times, most) + 1), times})


@pytest.fixture(scope="module", name="logs")
def _logs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Logs:
    return Logs(tmp_path_factory.mktemp("logs"), lambda: request.getfixturevalue("postgres"))


def test_one_life_is_like_another(logs: Logs) -> None:
    """An undisturbed life comes by each point as often as the one before: the middle of that is the middle of this."""
    _, counts = run_with_failures(logs.new("sqlite"))

    assert counts == logs.reached("sqlite")


def test_an_append_is_over_when_it_is_durable(logs: Logs) -> None:
    """The point after an append comes behind the one after the transaction, for each kind of draft."""
    order = list(logs.reached("sqlite"))

    for kind in DRAFTS:
        assert order.index(f"after backend.append_many {kind}") < order.index(f"after journal.append {kind}")


@pytest.mark.parametrize(("kind", "backend", "point"), QUICK)
def test_a_failure_at_a_point(kind: str, backend: str, point: str, logs: Logs) -> None:
    """The sidecar dies here, with the power, or the line to PostgreSQL breaks, or its server dies, in the middle of a life: the
    sidecar recovers, or finds out what is durable, and no promise is broken."""
    failure = Failure(point, logs.middle(backend, point), kind)
    history, counts = run_with_failures(logs.new(backend), failure)

    assert counts[point] >= failure.occurrence
    assert broken(history) == {}


@pytest.mark.parametrize("moment", ["before database.committed", "after database.committed"])
@pytest.mark.parametrize("point", about("database.commit admission", "database.commit outcome"))
def test_death_in_doubt(point: str, moment: str, logs: Logs) -> None:
    """The line breaks in a commit, which the server has or has not, and the sidecar dies while it asks which: no promise is
    broken."""
    cut = Failure(point, logs.middle("postgres", point), "cut")
    history, counts = run_with_failures(logs.new("postgres"), cut, Failure(moment, 1))

    assert counts[moment] == 1
    assert broken(history) == {}


@pytest.mark.sim
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "backend", "point"), EVERY)
def test_every_failure_at_a_point(kind: str, backend: str, point: str, logs: Logs) -> None:
    """And so it is whichever time the sidecar comes by there: the first twelve (PostgreSQL: four; two of those at which it is
    lost), and the last."""
    for occurrence in logs.some(backend, point, 2 if kind != "death" else 12 if backend == "sqlite" else 4):
        history, _ = run_with_failures(logs.new(backend), Failure(point, occurrence, kind))
        assert broken(history) == {}, f"time {occurrence}"


@pytest.mark.sim
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["before database.committed", "after database.committed"])
@pytest.mark.parametrize("kind", ["cut", "crash"])
@pytest.mark.parametrize("point", IN_DOUBT)
def test_every_death_in_doubt(point: str, kind: str, moment: str, logs: Logs) -> None:
    """And so it is with every commit that can be in doubt, whether the line is lost in it or the server."""
    for occurrence in logs.some("postgres", point, 2):
        history, _ = run_with_failures(logs.new("postgres"), Failure(point, occurrence, kind), Failure(moment, 1))
        assert broken(history) == {}, f"time {occurrence}"


def test_every_step_has_its_points() -> None:
    """Each method of each interface has a point before and after it, unless it is said why not."""
    steps = {f"{interface}.{method}" for interface, protocol in INTERFACES.items() for method in methods(protocol)}
    named = {" ".join(point.split()[1:2]) for point in POINTS}

    assert steps - named == steps & set(NOT_REACHED)
