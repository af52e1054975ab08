"""The page of the divergence report, in a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ostinato.sync import SyncClient

from tests.e2e.kit import ostinato, rule, scripted
from tests.pair import running_pair


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """The page shows two charts offline and without errors, has less than 1 MB, and has the numbers of the JSON."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    file = tmp_path / "report.html"
    with running_pair(service=scripted(rules=[rule("diverge", 3, sequences=[5, 9, 20, 33, 34, 60])])) as pair:
        with SyncClient(pair.target) as client:
            client.generate(["a"] * 64, seed=1, max_new_tokens=8, ignore_eos=True)
        done = ostinato("--target", pair.target, "report", "--json", "--html", str(file))
    assert done.exit_code == 1, "an alarm is up"
    (stratum,) = json.loads(done.stdout)["strata"]
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
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
