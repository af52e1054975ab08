"""A running pair under a real Prometheus with the project's rules, and a real Alertmanager with a webhook."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.monitoring import names
from tests.monitoring.load import SERVICE, SIDECAR, Running, faulty
from tests.monitoring.watch import missing
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)

EMPTY = names.GPU | {"ostinato_service_streams_refused": "a refused stream, as with two sidecars at one service"}
"""Metrics without a sample in this test, and what would give one."""


@pytest.fixture(name="running", scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Shared by all tests: they check the same quarter of a minute."""
    if why := missing():
        pytest.skip(why)
    with faulty(tmp_path_factory.mktemp("running"), (3, 3, 2)) as made:
        yield made


def test_a_divergence_is_an_alert(running: Running) -> None:
    """A divergence at grade EXACT increases a counter and raises an alert, which the webhook receives with its labels."""
    until(lambda: bool(running.webhook.received("OstinatoDiverged", kind="twin")), "the webhook receives it")
    received = running.webhook.received("OstinatoDiverged", kind="twin")[0]

    assert received["status"] == "firing"
    assert received["labels"] == {
        "alertname": "OstinatoDiverged", "severity": "critical", "grade": "exact", "instance": "sidecar-0", "job": SIDECAR,
        "kind": "twin",
    }  # fmt: skip
    assert received["annotations"]["description"] == "sidecar-0: kind twin, grade exact, within an hour."


def test_no_alert_without_its_fault(running: Running) -> None:
    """No alert fires for order, journal, grade and credentials, which have no fault."""
    until(lambda: bool(running.webhook.received("OstinatoDivergenceAlarm")), "the divergence alarm is raised")
    well = {
        "OstinatoCertificateExpires", "OstinatoCollision", "OstinatoCredentialsUnusable", "OstinatoEpochFlapping",
        "OstinatoGradeLost", "OstinatoJournalFull", "OstinatoOrderStalled", "OstinatoQueueSaturated",
    }  # fmt: skip
    seen = {
        series["metric"]["alertname"]
        for series in running.prometheus.over('ALERTS{alertstate="firing"}', running.start, time.time())
    }

    assert seen & well == set()
    assert {"OstinatoDiverged", "OstinatoDrift", "OstinatoDivergenceAlarm"} <= seen


def test_drift_is_an_alert(running: Running) -> None:
    """A service with another fingerprint raises an alert that names the changed field."""
    until(lambda: bool(running.webhook.received("OstinatoDrift", kind="twin")), "the webhook receives it")
    twins = running.webhook.received("OstinatoDrift", kind="twin")

    assert {each["labels"]["field"] for each in twins} == {"fingerprint.driver"}


def test_the_first_time_is_an_increase(running: Running) -> None:
    """A counter whose first increase raises an alert is on the page from the start; otherwise the first one would be missed."""
    once = [rule["expr"] for rule in names.alerts().values() if "last_over_time" not in rule["expr"]]
    counters = {name for expr in once for name in re.findall(r"increase\((ostinato_\w+)(?:{[^}]*})?\[1h]\)+ > 0", expr)}
    samples = running.pair.sidecar.page()

    assert len(counters) >= 3
    assert [name for name in counters if not re.search(rf"^{name}(?:{{.*}})? ", samples, re.MULTILINE)] == []


def test_no_rule_has_an_error(running: Running) -> None:
    """Prometheus evaluates every rule without an error."""
    until(lambda: all(rule["health"] == "ok" for rule in running.prometheus.rules()), "no rule has an error")
    recorded = {rule["name"] for rule in running.prometheus.rules() if rule["type"] == "recording"}

    assert [name for name in recorded if not running.prometheus.now(name)] == []


def empty(running: Running, name: str) -> list[tuple[str, str]]:
    """Titles and queries of panels without data, except for queries of the metrics in EMPTY."""
    found = []
    for panel in names.panels(names.boards()[name]):
        for target in panel["targets"]:
            query = names.expanded(target["expr"])
            if target.get("instant"):
                series = running.prometheus.now(query)
            else:
                series = running.prometheus.over(query, running.start, time.time())
            if not series and not names.metric_names([query]) <= set(EMPTY):
                found.append((panel["title"], query))
    return found


@pytest.mark.parametrize("name", list(names.boards()))
def test_no_panel_is_empty(running: Running, name: str) -> None:
    """Every query of every panel gets data, except for queries of the metrics in EMPTY."""
    with contextlib.suppress(AssertionError):
        until(lambda: not empty(running, name), "every panel has data")

    assert empty(running, name) == []


@pytest.mark.parametrize("name", list(names.boards()))
def test_annotations(running: Running, name: str) -> None:
    """Every dashboard has annotations at the sidecar's restart and at the new fingerprint."""
    marks = {
        each["name"]: running.prometheus.over(names.expanded(each["expr"]), running.start, time.time())
        for each in names.boards()[name]["annotations"]["list"]
    }

    assert len(marks["Epoch"]) == 1
    assert len({series["metric"]["fingerprint"] for series in marks["Fingerprint"]}) == 2


@pytest.mark.parametrize("metric", ["item_seconds", "time_to_first_token_seconds", "admission_seconds"])
def test_exemplars_are_sequences(running: Running, metric: str) -> None:
    """Exemplars of latency buckets are sequences of existing items."""
    found = running.prometheus.exemplars(f"ostinato_{metric}_bucket", running.start, time.time())
    last = int(running.prometheus.now("ostinato_last_sequence")[0]["value"][1])
    sequences = {int(each["labels"]["sequence"]) for series in found for each in series["exemplars"]}

    assert sequences
    assert 1 <= min(sequences) <= max(sequences) <= last


@pytest.mark.parametrize("job", [SIDECAR, SERVICE])
def test_promtool_accepts_the_metrics(running: Running, job: str) -> None:
    """promtool has no complaint about names, types and help of both programs' metrics, but for the colons of vLLM's names."""
    text = (running.pair.sidecar if job == SIDECAR else running.pair.service).page()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)

    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not re.fullmatch(r"vllm:\w+ metric names should not contain ':'", line)] == []
    assert (done.returncode != 0) == (len(said) == 3) == (job == SIDECAR), said


def test_every_metric_is_known_and_used(running: Running) -> None:
    """Panels, rules and docs name only existing metrics, and each metric is in a panel, a rule or the docs."""
    there = names.served(running.pair.sidecar.page()) | names.served(running.pair.service.page()) | set(names.GPU)

    assert (names.in_panels() | names.in_rules() | names.in_docs()) - there == set()
    assert there - names.in_panels() - names.in_rules() - names.in_docs() == set()
