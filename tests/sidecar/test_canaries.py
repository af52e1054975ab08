"""The file of canaries: what it may say, and how a bad one is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ostinato.v1 import types_pb2

from sidecar.canaries import CANARIES_MAX, Canary, read

GOOD = '[[canary]]\nname = "a"\ntext = "b"\nparameters = { seed = 1 }\n'


def test_what_comes_along() -> None:
    """The default set covers short and long, greedy and sampled, several scripts and a schema; every one has a seed."""
    canaries = read(None)
    items = {canary.name: canary.item for canary in canaries}

    assert len(items) == len(canaries) == 6
    assert all(item.parameters.HasField("seed") for item in items.values())
    assert min(len(item.text) for item in items.values()) < 20
    assert max(len(item.text) for item in items.values()) > 800
    assert not all(item.text.isascii() for item in items.values())
    assert {item.parameters.temperature > 0 for item in items.values()} == {True, False}
    assert [name for name, item in items.items() if item.parameters.HasField("response_format")] == ["json"]


def test_a_file(tmp_path: Path) -> None:
    """Parameters are those of the contract, and seeds beyond TOML's numbers too; a file without canaries is one with none."""
    path = tmp_path / "canaries.toml"
    path.write_text(f'{GOOD}[[canary]]\nname = "c"\ntext = "é"\n[canary.parameters]\nseed = 18446744073709551615\nstop = ["x"]')

    parameters = types_pb2.Parameters(seed=2**64 - 1, stop=["x"])
    assert read(path)[1] == Canary("c", types_pb2.Item(text="é", parameters=parameters))

    path.write_text("")
    assert read(path) == ()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[[canary]", "line 1"),
        (GOOD + '\n[[canary]]\nname = "\n', "line 7"),
        ('canary = "a"', "holds something else than [[canary]] tables"),
        (GOOD + "[other]\na = 1", "holds something else than [[canary]] tables"),
        (GOOD.replace("text", "prompt"), "canary[0].prompt: no such field"),
        (GOOD.replace('name = "a"\n', ""), "canary[0].name: is missing"),
        (GOOD.replace('"b"', '""'), "canary[0].text: is missing"),
        (GOOD.replace('"b"', "7"), "canary[0].text: must be a str"),
        (GOOD.replace('"a"', '"' + "é" * 33 + '"'), "canary[0].name: at most 64 bytes"),
        (GOOD + GOOD.replace("{ seed = 1 }", '"hot"'), "canary[1].parameters: is no table"),
        (GOOD + GOOD.replace("seed = 1", "seed = 1, top_q = 2"), "canary[1].parameters.top_q: no such parameter"),
        (GOOD.replace("seed = 1", "seed = -1"), "canary[0].parameters.seed: "),
        (GOOD.replace("seed = 1", "top_k = 1"), "canary[0].parameters.seed: is missing"),
        (GOOD + GOOD, "'a' is the name of two canaries"),
        (GOOD * (CANARIES_MAX + 1), f"canary: {CANARIES_MAX + 1} tables, at most {CANARIES_MAX}"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, wrong: str) -> None:
    """It is refused by its name, the place and what is wrong there."""
    path = tmp_path / "canaries.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)

    assert wrong in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there, a folder, and bytes that are no text are refused by name."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("none", ".", "bytes"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            read(tmp_path / name)
