"""The rules and the dashboards as files: what they say, and that they say the same as what they are made of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.monitoring.__main__ import files
from tests.monitoring.names import DASHBOARDS, K8S, OPERATIONS, alerts, boards, panels, rules

MONITORING = K8S / "monitoring"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed here")
every_alert = pytest.mark.parametrize("name", list(alerts()))


def promtool(*args: str) -> str:
    """What it says of good files; it says what is wrong with others in the failure."""
    done = subprocess.run(["promtool", *args], cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("path", "text"), [pytest.param(*each, id=each[0].name) for each in files()])
def test_what_is_committed_is_what_is_made(path: Path, text: str) -> None:
    """`make dashboards` would change nothing."""
    assert path.read_text() == text


def test_no_dashboard_is_left_over() -> None:
    """Every committed dashboard is still made."""
    assert set(DASHBOARDS.iterdir()) == {path for path, _ in files() if path.suffix == ".json"}


@needs_promtool
def test_prometheus_reads_the_rules() -> None:
    """Every expression and template is one."""
    assert f"{len(list(rules()))} rules found" in promtool("check", "rules", "rules.yaml")


@needs_promtool
def test_the_rules_do_what_their_examples_say() -> None:
    """Each alert is silent and speaks when rules_test.yaml says so, word for word, and the bounds are Wilson's."""
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")


@needs_promtool
def test_prometheus_reads_the_configuration_of_the_docs(tmp_path: Path) -> None:
    """What docs/operations.md shows can be copied: Prometheus takes it, with the rules."""
    [shown] = re.findall(r"^```yaml\n(global: .*?)^```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    config = tmp_path / "prometheus.yml"
    config.write_text(shown.replace("k8s/monitoring/rules.yaml", str(MONITORING / "rules.yaml")))

    assert f"{len(list(rules()))} rules found" in promtool("check", "config", str(config))


@every_alert
def test_an_alert_has_both_examples(name: str) -> None:
    """One in which it is silent, one in which it speaks, and both with data of what it asks for."""
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    examples = [(test, each) for test in tests for each in test.get("alert_rule_test", ()) if each["alertname"] == name]

    assert [bool(each.get("exp_alerts")) for _, each in examples].count(True) == 1
    assert False in [bool(each.get("exp_alerts")) for _, each in examples]
    assert all(test["input_series"] for test, _ in examples)


@every_alert
def test_an_alert_says_what_to_do(name: str) -> None:
    """It has a severity, a summary and a description, and its runbook is a paragraph with something to do in it."""
    alert = alerts()[name]
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    found = re.search(rf"^#### {name}\n+(.+?)(?=^#|\Z)", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)

    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    assert (page, anchor) == ("docs/operations.md", name.lower())
    assert found is not None, f"no heading '#### {name}' in {OPERATIONS.name}"
    assert len(found[1]) > 150, found[1]


def test_docs_know_no_other_alert() -> None:
    """A paragraph about an alert that is gone would be looked for in vain."""
    assert set(re.findall(r"^#### (Ostinato\w+)$", OPERATIONS.read_text(), re.MULTILINE)) == set(alerts())


@pytest.mark.parametrize("name", list(boards()))
def test_grafanas_own_types_read_it(name: str) -> None:
    """Read into the types of the SDK and written again, a dashboard has lost nothing: no field is misspelt or misplaced."""
    register_default_plugins()
    board = boards()[name]
    again = JSONEncoder(sort_keys=True, indent=2)

    assert lost(board, json.loads(again.encode(Dashboard.from_json(board)))) == []


@pytest.mark.parametrize("name", list(boards()))
def test_a_dashboard_is_complete(name: str) -> None:
    """Panels have ids, titles, units and the chosen data source, cover nothing, and choose what the variables choose."""
    board = boards()[name]
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    queries = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    titles = [panel["title"] for panel in panels(board)]

    assert sorted(titles) == sorted(set(titles)), "two panels of one title"
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels(board))
    assert {panel["datasource"]["uid"] for panel in panels(board)} == {"${datasource}"}
    assert len(places) == len(set(places)), "panels lie on each other"
    assert max(x for x, _ in places) < 24
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "job", "instance"]
    assert [each["name"] for each in board["annotations"]["list"]] == ["Epoch", "Fingerprint"]
    assert board["links"][0]["tags"] == board["tags"]
    assert [query for query in queries if '=~"$job"' not in query and not query.startswith("count(ALERTS{")] == []
    assert [query for query in queries if re.search(r"\b(ON|JOB|RATE)\b", query)] == []


def lost(given: Any, read: Any, where: str = "") -> list[str]:
    """Places of what `given` has and `read` has not, or has otherwise."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [place for key, value in given.items() for place in lost(value, read.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [place for i, (a, b) in enumerate(zip(given, read, strict=True)) for place in lost(a, b, f"{where}[{i}]")]
    return [] if given == read else [where]


def test_what_is_lost_is_noticed() -> None:
    """The check can fail: a misspelt option is lost on the way."""
    register_default_plugins()
    board = boards()["overview"]
    next(panels(board))["options"]["graphMod"] = "area"

    assert lost(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))) != []
