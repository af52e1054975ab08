"""Audits: which ones start when, and their budget. Canaries: their file."""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ostinato.v1 import types_pb2

from sidecar.checks import BURST_SECONDS, CANARIES_MAX, GROUP, AuditBacklog, DueAudit, TokenBucket, read_canaries

PATIENCE = 30.0


def backlog(*alone: bool, most: int = 100) -> AuditBacklog:
    """Sequences 1, 2 and so on, all chosen at time 0."""
    made = AuditBacklog(most, PATIENCE)
    for sequence, each in enumerate(alone, start=1):
        assert made.add(DueAudit(sequence, each, 0.0))
    return made


def taken(made: AuditBacklog, now: float = 0.0, *, occupancy: int = 0, room: int = 8) -> list[int]:
    return [due.sequence for due in made.take(now, occupancy=occupancy, room=room)]


def test_what_ran_beside_others_starts_at_once() -> None:
    """Audits of items that ran beside others start in order, as far as there is room. Those of items that ran alone wait."""
    made = backlog(False, True, False, False)

    assert taken(made, room=2) == [1, 3]
    assert taken(made) == [4]
    assert [due.sequence for due in made.waiting] == [2]


@pytest.mark.parametrize(
    ("alone", "now", "occupancy", "room", "go"),
    [
        pytest.param(GROUP - 1, 0.0, 0, 8, 0, id="too few"),
        pytest.param(GROUP, 0.0, 0, 8, GROUP, id="a group"),
        pytest.param(GROUP + 2, 0.0, 0, 8, GROUP + 2, id="more than a group"),
        pytest.param(1, 0.0, 1, 8, 1, id="others run"),
        pytest.param(2, PATIENCE, 0, 8, 2, id="waited long enough, and takes another along"),
        pytest.param(2, PATIENCE - 0.1, 0, 8, 0, id="not yet"),
        pytest.param(2, 0.0, 0, 2, 2, id="as large a group as may run"),
        pytest.param(1, 0.0, 0, 1, 1, id="only one may run"),
        pytest.param(0, PATIENCE, 1, 8, 0, id="nothing"),
    ],
)
def test_what_ran_alone_waits_for_other_runs(alone: int, now: float, occupancy: int, room: int, go: int) -> None:
    """An item that ran alone waits for a group, for other runs, or for the end of its wait. Then all start together."""
    assert len(taken(backlog(*[True] * alone), now, occupancy=occupancy, room=room)) == go


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 2), st.integers(1, 6), st.floats(0, 2 * PATIENCE))
def test_nothing_is_lost_or_run_twice(alone: list[bool], occupancy: int, room: int, now: float) -> None:
    """Each audit is either taken or waits. Those taken are in order, and not more than there is room for. After the longest
    wait they wait for room only."""
    made = backlog(*alone)
    chosen = taken(made, now, occupancy=occupancy, room=room)

    assert sorted([*chosen, *(due.sequence for due in made.waiting)]) == list(range(1, len(alone) + 1))
    assert chosen == sorted(chosen)
    assert len(chosen) <= room
    while waiting := len(made.waiting):
        assert len(taken(made, now + PATIENCE, room=room)) == min(waiting, room)


def test_the_backlog_is_bounded() -> None:
    """A full backlog refuses an audit, and takes one again when there is room."""
    made = backlog(True, False, most=2)

    assert not made.add(DueAudit(3, False, 0.0))
    assert taken(made) == [2]
    assert made.add(DueAudit(3, False, 0.0))


def test_the_budget() -> None:
    """The budget may be overdrawn once, stays closed until the debt is paid, and accumulates no more than the burst."""
    bucket = TokenBucket(10.0, now=100.0)
    assert bucket.open(100.0)
    bucket.take(int(10 * BURST_SECONDS) + 50)
    assert not bucket.open(105.0)
    assert bucket.open(105.1)
    bucket.take(1)
    assert not bucket.open(105.1)
    assert bucket.open(10_000.0)
    bucket.take(int(10 * BURST_SECONDS))
    assert not bucket.open(10_000.0)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 500)), max_size=50))
def test_the_budget_holds(story: list[tuple[float, int]]) -> None:
    """Over any period no more is taken than the burst, the rate, and one overdraft."""
    bucket, now, spent = TokenBucket(20.0, 0.0), 0.0, 0
    for seconds, tokens in story:
        now += seconds
        if bucket.open(now):
            assert spent <= 20.0 * (BURST_SECONDS + now) + 1e-6
            bucket.take(tokens)
            spent += tokens


def test_no_budget_is_no_bound() -> None:
    """A rate of 0 is no limit."""
    bucket = TokenBucket(0.0, 0.0)
    bucket.take(10**12)

    assert bucket.open(0.0)


GOOD = '[[canary]]\nname = "a"\ntext = "b"\nparameters = { seed = 1 }\n'


def test_what_comes_along() -> None:
    """The default canaries cover short and long, greedy and sampled, several scripts and a schema. Each has a seed."""
    items = read_canaries(None)

    assert len(items) == 6
    assert all(item.parameters.HasField("seed") for item in items.values())
    assert min(len(item.text) for item in items.values()) < 20
    assert max(len(item.text) for item in items.values()) > 800
    assert not all(item.text.isascii() for item in items.values())
    assert {item.parameters.temperature > 0 for item in items.values()} == {True, False}
    assert [name for name, item in items.items() if item.parameters.HasField("response_format")] == ["json"]


def test_a_file(tmp_path: Path) -> None:
    """A file may have any parameter of the contract, and seeds above TOML's integers. An empty file has no canaries."""
    path = tmp_path / "canaries.toml"
    path.write_text(f'{GOOD}[[canary]]\nname = "c"\ntext = "é"\n[canary.parameters]\nseed = 18446744073709551615\nstop = ["x"]')

    parameters = types_pb2.Parameters(seed=2**64 - 1, stop=["x"])
    assert read_canaries(path)["c"] == types_pb2.Item(text="é", parameters=parameters)

    path.write_text("")
    assert read_canaries(path) == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[[canary]", "line 1"),
        (GOOD + '\n[[canary]]\nname = "\n', "line 7"),
        ('canary = "a"', "Expected `array`, got `str` - at `$.canary`"),
        (GOOD + "[other]\na = 1", "unknown field `other`"),
        (GOOD.replace("text", "prompt"), "unknown field `prompt` - at `$.canary[0]`"),
        (GOOD.replace('name = "a"\n', ""), "missing required field `name`"),
        (GOOD.replace('"b"', '""'), "length >= 1 - at `$.canary[0].text`"),
        (GOOD.replace('"b"', "7"), "Expected `str`, got `int` - at `$.canary[0].text`"),
        (GOOD.replace('"a"', '"' + "é" * 65 + '"'), "length <= 64 - at `$.canary[0].name`"),
        (GOOD + GOOD.replace("{ seed = 1 }", '"hot"'), "Expected `object`, got `str`"),
        (GOOD + GOOD.replace("seed = 1", "seed = 1, top_q = 2"), "canary[1].parameters.top_q: no such parameter"),
        (GOOD.replace("seed = 1", "seed = -1"), "canary[0].parameters.seed: "),
        (GOOD.replace("seed = 1", "top_k = 1"), "canary[0].parameters.seed: is missing"),
        (GOOD + GOOD, "'a' is the name of two canaries"),
        (GOOD * (CANARIES_MAX + 1), f"length <= {CANARIES_MAX} - at `$.canary`"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, wrong: str) -> None:
    """The error names the file, the place in it and the fault."""
    path = tmp_path / "canaries.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_canaries(path)

    assert wrong in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    """The error for a missing file, a folder and bytes that are not UTF-8 names the path."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("none", ".", "bytes"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            read_canaries(tmp_path / name)
