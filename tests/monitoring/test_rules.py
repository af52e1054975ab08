"""The rules and the dashboards as files: their content, and that the generated files are current."""

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
    """The output. Fails with promtool's errors."""
    done = subprocess.run(["promtool", *args], cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("path", "text"), [pytest.param(*each, id=each[0].name) for each in files()])
def test_generated_files_are_current(path: Path, text: str) -> None:
    """The committed files equal those that `make dashboards` writes."""
    assert path.read_text() == text


def test_no_dashboard_is_left_over() -> None:
    """Every committed dashboard is still generated."""
    assert set(DASHBOARDS.iterdir()) == {path for path, _ in files() if path.suffix == ".json"}


@needs_promtool
def test_prometheus_reads_the_rules() -> None:
    """Prometheus accepts every expression and template."""
    assert f"{len(list(rules()))} rules found" in promtool("check", "rules", "rules.yaml")


@needs_promtool
def test_the_examples_of_the_rules_hold() -> None:
    """The examples in rules_test.yaml hold: when each alert fires, with which text, and Wilson's bounds."""
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")


@needs_promtool
def test_prometheus_reads_the_configuration_of_the_docs(tmp_path: Path) -> None:
    """Prometheus accepts the configuration in docs/operations.md, with the rules."""
    [shown] = re.findall(r"^```yaml\n(global: .*?)^```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    config = tmp_path / "prometheus.yml"
    config.write_text(shown.replace("k8s/monitoring/rules.yaml", str(MONITORING / "rules.yaml")))

    assert f"{len(list(rules()))} rules found" in promtool("check", "config", str(config))


@every_alert
def test_an_alert_has_both_examples(name: str) -> None:
    """Every alert has an example in which it fires and one in which it does not, both with input series."""
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    examples = [(test, each) for test in tests for each in test.get("alert_rule_test", ()) if each["alertname"] == name]

    assert [bool(each.get("exp_alerts")) for _, each in examples].count(True) == 1
    assert False in [bool(each.get("exp_alerts")) for _, each in examples]
    assert all(test["input_series"] for test, _ in examples)


@every_alert
def test_an_alert_has_a_runbook(name: str) -> None:
    """Every alert has a severity, a summary, a description and a paragraph in docs/operations.md."""
    alert = alerts()[name]
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    found = re.search(rf"^#### {name}\n+(.+?)(?=^#|\Z)", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)

    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    assert (page, anchor) == ("docs/operations.md", name.lower())
    assert found is not None, f"no heading '#### {name}' in {OPERATIONS.name}"
    assert len(found[1]) > 150, found[1]


def test_docs_have_no_other_alert() -> None:
    """docs/operations.md has no paragraph about an alert that does not exist."""
    assert set(re.findall(r"^#### (Ostinato\w+)$", OPERATIONS.read_text(), re.MULTILINE)) == set(alerts())


@pytest.mark.parametrize("name", list(boards()))
def test_grafanas_own_types_read_it(name: str) -> None:
    """A dashboard that is read into the SDK's types and written again is unchanged: no field is misspelt or misplaced."""
    register_default_plugins()
    board = boards()[name]
    again = JSONEncoder(sort_keys=True, indent=2)

    assert lost(board, json.loads(again.encode(Dashboard.from_json(board)))) == []


@pytest.mark.parametrize("name", list(boards()))
def test_a_dashboard_is_complete(name: str) -> None:
    """Panels have ids, unique titles, units and the selected data source, do not overlap, and use the variables."""
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
    """Paths of values in `given` that are missing or different in `read`."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [place for key, value in given.items() for place in lost(value, read.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [place for i, (a, b) in enumerate(zip(given, read, strict=True)) for place in lost(a, b, f"{where}[{i}]")]
    return [] if given == read else [where]


def test_a_lost_field_is_noticed() -> None:
    """The check above finds a misspelt option."""
    register_default_plugins()
    board = boards()["overview"]
    next(panels(board))["options"]["graphMod"] = "area"

    assert lost(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))) != []
