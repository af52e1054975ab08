"""What the command prints."""

from __future__ import annotations

import sys

import pytest

from ostinato import errors
from ostinato.cli import show

OSC = "\x1b]0;owned\x07"
"""Sets a terminal's title."""


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_printed_controls_a_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, notes, tables, cards and errors escape control characters wherever they stand: in names of fields, in the fields
    of a refusal, and in an error's message. Lines and tabs stay."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show.line(f"a\tb\n{OSC}")
    show.note(OSC)
    show.table([f"name{OSC}"], [[f"cell{OSC}"]])
    show.card([(f"name{OSC}", f"value{OSC}")])
    show.failure(errors.InvalidRequest(violations=[errors.Violation(f"items[0].{OSC}", OSC)] * 2))
    show.failure(errors.OstinatoError(OSC))
    show.failure(errors.Disconnected(OSC))
    said = capsys.readouterr()

    assert "\x1b]" not in said.out + said.err
    assert "\x07" not in said.out + said.err
    assert said.out.startswith("a\tb\n\\x1b]0;owned\\x07\n")
