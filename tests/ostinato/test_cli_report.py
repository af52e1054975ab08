"""`ostinato report`: what it prints, writes and returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from ostinato.cli.report import COLUMNS
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.ostinato.fake import Terminal

Rate, Moment = sequencer_pb2.Rate, sequencer_pb2.Moment


def rate(events: int, trials: int) -> sequencer_pb2.Rate:
    value = events / trials
    return Rate(events=events, trials=trials, value=value, lower=value / 2, upper=min(1.0, 2 * value + 0.01))


def stratum(diverged: int = 0, *, alarm: bool = False) -> sequencer_pb2.Stratum:
    made = sequencer_pb2.Stratum(
        kind=types_pb2.COMPARISON_KIND_TWIN,
        grade=types_pb2.GRADE_BEST_EFFORT,
        fingerprint_digest=b"\xab" * 32,
        other_replica=True,
        matched=100 - diverged,
        diverged=diverged,
        incomparable=3,
        drift={"fingerprint.device": 2, "": 1},
        compared_tokens=1_000,
        per_comparison=rate(diverged, 100),
        recent=rate(diverged, 100),
        per_token=rate(diverged, 1_000),
        evidence_log10=9.4 if alarm else -1.0,
        alarm=alarm,
        first=Moment(index=3, time_unix_millis=1_000),
        last=Moment(index=300, time_unix_millis=2_000),
        token_spans=[sequencer_pb2.TokenSpan(first=4, last=7, diverged=diverged)],
        samplings=[sequencer_pb2.SamplingShare(sampling="greedy", rate=rate(diverged, 100))],
        companies=[
            sequencer_pb2.CompanyShare(first=0, last=0, rate=rate(0, 1)),
            sequencer_pb2.CompanyShare(first=1, last=1, rate=rate(0, 50)),
            sequencer_pb2.CompanyShare(first=4, last=7, rate=rate(diverged, 50)),
        ],
        times=[sequencer_pb2.TimeShare(time_unix_millis=0, width_millis=60_000, rate=rate(diverged, 100))],
    )
    if diverged:
        made.first_diverged.CopyFrom(Moment(index=7, time_unix_millis=1_500))
        made.last_diverged.CopyFrom(Moment(index=9, time_unix_millis=1_600))
    if alarm:
        made.alarmed.CopyFrom(Moment(index=9, time_unix_millis=1_600))
    return made


def response(*strata: sequencer_pb2.Stratum) -> sequencer_pb2.ReportResponse:
    return sequencer_pb2.ReportResponse(
        log_id="0" * 32,
        writer="w",
        index=300,
        confidence=0.95,
        alarm=any(each.alarm for each in strata),
        strata=strata,
        collision_checks=12,
        collisions=1,
        not_compared=[
            sequencer_pb2.NotCompared(kind=types_pb2.COMPARISON_KIND_AUDIT, reason="busy", count=4),
        ],
    )


def test_all_is_well(ostinato: Terminal) -> None:
    """Without an alarm the exit code is 0, and rates with intervals, drift and missing verdicts are printed, if any."""
    nothing = ostinato("report")
    assert (nothing.exit_code, nothing.stdout.splitlines()[0]) == (0, "nothing was compared yet")
    ostinato.fake.script["Report"].append(response(stratum()))
    result = ostinato("report")
    header, row, *rest = result.stdout.splitlines()

    assert result.exit_code == 0
    assert tuple(header.split()) == COLUMNS
    assert row.split()[:7] == ["twin", "best-effort", "other", "abababababab", "100", "0", "0.000%"]
    assert "0.000% to 1.000%" in row
    assert "twin, best-effort, abababababab, other replica: incomparable 3: others 1, fingerprint.device 2" in rest
    assert "collisions: 1 of 12 checked" in rest
    assert "not compared: audit, busy: 4" in rest


def test_an_alarm_fails(ostinato: Terminal) -> None:
    """While an alarm is up the exit code is 1, and time, token index, occupancy and sampling are printed."""
    ostinato.fake.script["Report"].append(response(stratum(5, alarm=True), stratum()))
    result = ostinato("report")

    assert result.exit_code == 1
    assert "1e+9 UP since 1970-01-01T00:00:01.600Z" in " ".join(result.stdout.split())
    assert "diverged first at 1970-01-01T00:00:01.500Z (entry 7)" in result.stdout
    assert "first differing token: 4-7: 5\n" in result.stdout
    assert "batch occupancy: not known: 0 of 1, 1 run: 0 of 50, 4-7 runs: 5 of 50" in result.stdout
    assert "worst sampled: greedy: 5 of 100" in result.stdout


def test_json_is_the_response(ostinato: Terminal) -> None:
    """--json prints the whole response in one line, with the same exit code."""
    made = response(stratum(5, alarm=True))
    ostinato.fake.script["Report"].append(made)
    result = ostinato("report", "--json", "--confidence", 0.9)

    assert json_format.ParseDict(json.loads(result.stdout), sequencer_pb2.ReportResponse()) == made
    assert result.exit_code == 1
    assert ostinato.fake.calls[-1].request.confidence == 0.9


def test_a_page_without_matplotlib(ostinato: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the message names the extra, and nothing is sent."""
    monkeypatch.delitem(sys.modules, "ostinato.cli.charts", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = ostinato("report", "--html", tmp_path / "page.html")

    assert (result.exit_code, ostinato.fake.calls) == (2, [])
    assert "pip install '.[report]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "page.html").exists()


def test_a_page_fetches_nothing_and_escapes(ostinato: Terminal, tmp_path: Path) -> None:
    """The page loads nothing, and text in the report does not become markup. A page that cannot be written is wrong usage."""
    pytest.importorskip("matplotlib")
    unwritten = ostinato("report", "--html", tmp_path)
    assert (unwritten.exit_code, f"--html: {tmp_path}: Is a directory" in unwritten.stderr) == (2, True)
    bad = stratum(1)
    bad.samplings[0].sampling = "<script>alert(1)</script>"
    ostinato.fake.script["Report"].append(response(bad))
    assert ostinato("report", "--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text("utf-8")

    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "src=" not in page.split("<body>")[0]
    assert '<script src="' not in page


def test_occupancy_in_order() -> None:
    """Ticks ascend by occupancy over all groups, "not known" is last, and each point is at its tick."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from ostinato.cli import charts

    first, second = stratum(1), stratum(2)
    del first.companies[2], second.companies[:2]  # 0 and 1 run; 4 to 7 runs
    first.companies.append(sequencer_pb2.CompanyShare(first=16, last=31, rate=rate(1, 4)))
    axes = Figure().subplots()
    charts.by_occupancy(axes, {"second": second, "first": first})
    points = {
        str(each.get_label()): [float(x) for x in np.asarray(each.get_xdata())] for each in axes.get_lines() if each.get_gid()
    }

    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 run", "4-7 runs", "16-31 runs", "not known"]
    assert [round(place) for place in points["second"]] == [1]
    assert [round(place) for place in points["first"]] == [3, 0, 2]
    assert points["second"][0] < 1
    assert points["first"][1] > 0


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_narrow_terminal(ostinato: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """If the table does not fit the terminal, each cell is on its own line with the column's name; no word is broken."""
    ostinato.fake.script["Report"].append(response(stratum(5, alarm=True), stratum()))
    monkeypatch.setattr("ostinato.cli.show._is_terminal", lambda: True)
    text = ostinato("report", COLUMNS=str(columns), TERM="dumb").stdout

    assert "abababababab" in text
    assert "2.500% to 11.000%" in " ".join(text.split())
    assert ("fingerprint  abababababab" in text) == (columns < 200)
