"""The divergence report, end to end: metrics, report and HTML page agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostinato.sync import SyncClient

from tests.pair import Pair, python

ITEMS, DIVERGING, AT = 64, [5, 9, 20, 33, 34, 60], 3
SCRIPT = {"rules": [{"do": "diverge", "at": AT, "sequences": DIVERGING}]}


@pytest.fixture(name="pair", scope="module")
def _pair() -> Iterator[Pair]:
    """A pair whose twins have diverged, as scripted."""
    with Pair(service=["--script", json.dumps(SCRIPT), "--self-test", "off"]) as pair:
        pair.start()
        with SyncClient(pair.target) as client:
            client.generate(["a"] * ITEMS, seed=1, max_new_tokens=8, ignore_eos=True)
        yield pair


def report(pair: Pair, *args: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    done = python("-m", "ostinato.cli", "--target", pair.target, "report", *args)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def test_metrics_and_report_agree(pair: Pair) -> None:
    """The report and the metrics have the counts of the script. With an alarm the exit code is 1."""
    code, text = report(pair, "--json")
    (stratum,) = json.loads(text)["strata"]
    metrics, labels = pair.metrics(), '{grade="best_effort",kind="twin"}'
    verdicts = {
        verdict: metrics[f'ostinato_comparisons_total{{grade="best_effort",kind="twin",replica="same",verdict="{verdict}"}}']
        for verdict in ("match", "diverged")
    }

    assert verdicts == {"match": ITEMS - 1 - len(DIVERGING), "diverged": len(DIVERGING)}
    assert (int(stratum["matched"]), int(stratum["diverged"])) == (verdicts["match"], verdicts["diverged"])
    assert metrics[f"ostinato_divergence_rate{labels}"] == stratum["recent"]["value"] == len(DIVERGING) / (ITEMS - 1)
    assert metrics[f"ostinato_divergence_rate_lower{labels}"] == pytest.approx(stratum["recent"]["lower"])
    assert metrics[f"ostinato_divergence_evidence_log10{labels}"] == stratum["evidence_log10"] > 2
    assert (code, stratum["alarm"], metrics[f"ostinato_divergence_alarm{labels}"]) == (1, True, 1)
    assert {int(each.get("first", 0)): int(each["diverged"]) for each in stratum["token_spans"]} == {2: len(DIVERGING)}
    bucket = 'ostinato_first_difference_token_bucket{grade="best_effort",kind="twin",le="%s"}'
    assert [metrics[bucket % bound] for bound in ("1.0", "3.0", "+Inf")] == [0, len(DIVERGING), len(DIVERGING)]


def chromium() -> Any:
    """A real browser, or a skip with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    return playwright.sync_playwright, path


def test_the_page_in_a_browser(pair: Pair, tmp_path: Path) -> None:
    """The page shows two charts offline and without errors, has less than 1 MB, and has the numbers of the JSON."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    start, path = chromium()
    file = tmp_path / "report.html"
    _, text = report(pair, "--json", "--html", str(file))
    (stratum,) = json.loads(text)["strata"]
    said: list[str] = []
    asked: list[str] = []
    with start() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1800})
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        charts = [page.locator(f"#by-{key} svg").bounding_box() for key in ("occupancy", "time")]
        marks = {key: page.locator(f"#by-{key} [id^=points-] use").count() for key in ("occupancy", "time")}
        cells = page.locator("#strata tbody td").all_inner_texts()
        page.locator("summary").first.click()
        numbers = page.locator("details").first.locator("tbody tr").all_inner_texts()
        browser.close()

    assert said == []
    assert asked == [file.as_uri()]
    assert file.stat().st_size < 1_000_000
    assert all(chart is not None and chart["width"] > 600 and chart["height"] > 200 for chart in charts)
    assert marks == {"occupancy": len(stratum["companies"]), "time": len(stratum["times"])}
    shown = [row.split("\t")[2:4] for row in numbers]
    assert shown == [[each["rate"].get("events", "0"), each["rate"]["trials"]] for each in stratum["companies"]]
    assert cells[4:6] == [str(int(stratum["matched"]) + int(stratum["diverged"])), stratum["diverged"]]
