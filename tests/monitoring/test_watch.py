"""A real Prometheus watches a running pair by the project's rules, and a real Alertmanager calls a webhook."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest

from tests.monitoring import names
from tests.monitoring.tour import SERVICE, SIDECAR, Tour, port, touring
from tests.monitoring.watch import missing, until
from tests.pair import Program

pytestmark = pytest.mark.timeout(180)

EMPTY = names.GPU | {
    "ostinato_service_streams_refused": "a service that turned a stream away; two sidecars at one service would do it",
}
"""Metrics without a sample here, and what it would need."""


@pytest.fixture(name="tour", scope="module")
def _tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    """One for all: what they claim is about the same quarter of a minute."""
    if why := missing():
        pytest.skip(why)
    with touring(tmp_path_factory.mktemp("tour"), (5, 4, 3)) as made:
        yield made


def page(program: Program | None) -> str:
    """Its metrics, in plain text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port(program)}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_a_divergence_reaches_whoever_is_called(tour: Tour) -> None:
    """A scripted divergence at a grade that promises none becomes a counter, an alert and a call that says where."""
    until(lambda: bool(tour.webhook.heard("OstinatoDiverged", kind="twin")), "the webhook hears of it")
    heard = tour.webhook.heard("OstinatoDiverged", kind="twin")[0]

    assert heard["status"] == "firing"
    assert heard["labels"] == {
        "alertname": "OstinatoDiverged", "severity": "critical", "grade": "exact", "instance": "sidecar-0", "job": SIDECAR,
        "kind": "twin",
    }  # fmt: skip
    assert heard["annotations"]["description"] == "sidecar-0: kind twin, grade exact, within an hour."


def test_what_is_well_calls_nobody(tour: Tour) -> None:
    """Nothing is said of order, journal, grade and credentials, which were well all the time."""
    until(lambda: bool(tour.webhook.heard("OstinatoDivergenceAlarm")), "the evidence is an alarm")
    well = {
        "OstinatoCertificateExpires", "OstinatoCollision", "OstinatoCredentialsUnusable", "OstinatoEpochFlapping",
        "OstinatoGradeLost", "OstinatoJournalFull", "OstinatoOrderStalled", "OstinatoQueueSaturated",
    }  # fmt: skip
    seen = {
        series["metric"]["alertname"] for series in tour.prometheus.over('ALERTS{alertstate="firing"}', tour.start, time.time())
    }

    assert seen & well == set()
    assert {"OstinatoDiverged", "OstinatoDrift", "OstinatoDivergenceAlarm"} <= seen


def test_a_deploy_that_drifts_is_told(tour: Tour) -> None:
    """A service with another fingerprint makes an alert that names the field which changed."""
    until(lambda: bool(tour.webhook.heard("OstinatoDrift", kind="twin")), "the webhook hears of it")
    twins = tour.webhook.heard("OstinatoDrift", kind="twin")

    assert {each["labels"]["field"] for each in twins} == {"fingerprint.driver"}


def test_the_first_time_is_an_increase(tour: Tour) -> None:
    """What an alert fires for once it has happened is on the page before it has, or the first time would pass unnoticed."""
    once = [rule["expr"] for rule in names.alerts().values() if "last_over_time" not in rule["expr"]]
    counters = {name for expr in once for name in re.findall(r"increase\((ostinato_\w+)(?:{[^}]*})?\[1h]\)+ > 0", expr)}
    samples = page(tour.pair.sidecar)

    assert len(counters) >= 3
    assert [name for name in counters if not re.search(rf"^{name}(?:{{.*}})? ", samples, re.MULTILINE)] == []


def test_every_rule_is_well(tour: Tour) -> None:
    """Prometheus has evaluated every rule, and none had an error."""
    until(lambda: all(rule["health"] == "ok" for rule in tour.prometheus.rules()), "all have been evaluated without an error")
    recorded = {rule["name"] for rule in tour.prometheus.rules() if rule["type"] == "recording"}

    assert [name for name in recorded if not tour.prometheus.now(name)] == []


def empty(tour: Tour, name: str) -> list[tuple[str, str]]:
    """Titles and queries of a dashboard's panels that bring nothing, though no metric of EMPTY is in them."""
    found = []
    for panel in names.panels(names.boards()[name]):
        for target in panel["targets"]:
            query = names.spelt(target["expr"])
            if target.get("instant"):
                series = tour.prometheus.now(query)
            else:
                series = tour.prometheus.over(query, tour.start, time.time())
            if not series and not names.asked([query]) <= set(EMPTY):
                found.append((panel["title"], query))
    return found


@pytest.mark.parametrize("name", list(names.boards()))
def test_no_panel_is_empty(tour: Tour, name: str) -> None:
    """Every query of every panel comes to have data of this pair, but for those of metrics that EMPTY names."""
    with contextlib.suppress(AssertionError):
        until(lambda: not empty(tour, name), "rare things happen too")

    assert empty(tour, name) == []


@pytest.mark.parametrize("name", list(names.boards()))
def test_annotations_mark_what_happened(tour: Tour, name: str) -> None:
    """The start of the sidecar in its second epoch, and the fingerprint of another service, are on every dashboard."""
    marks = {
        each["name"]: tour.prometheus.over(names.spelt(each["expr"]), tour.start, time.time())
        for each in names.boards()[name]["annotations"]["list"]
    }

    assert len(marks["Epoch"]) == 1
    assert len({series["metric"]["fingerprint"] for series in marks["Fingerprint"]}) == 2


@pytest.mark.parametrize("metric", ["item_seconds", "time_to_first_token_seconds", "admission_seconds"])
def test_exemplars_are_sequences(tour: Tour, metric: str) -> None:
    """A slow bucket leads to an item that there is: its exemplar is a sequence that was given out."""
    found = tour.prometheus.exemplars(f"ostinato_{metric}_bucket", tour.start, time.time())
    last = int(tour.prometheus.now("ostinato_last_sequence")[0]["value"][1])
    sequences = {int(each["labels"]["sequence"]) for series in found for each in series["exemplars"]}

    assert sequences
    assert 1 <= min(sequences) <= max(sequences) <= last


@pytest.mark.parametrize("job", [SIDECAR, SERVICE])
def test_promtool_finds_nothing_to_say(tour: Tour, job: str) -> None:
    """Names, types and help of both programs' metrics are as Prometheus wants them."""
    text = page(tour.pair.sidecar if job == SIDECAR else tour.pair.service)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_metric_is_known_and_used(tour: Tour) -> None:
    """Panels, rules and docs name only metrics that a program has; and each of those is in a panel, a rule or the docs."""
    there = names.served(page(tour.pair.sidecar)) | names.served(page(tour.pair.service)) | set(names.GPU)

    assert (names.in_panels() | names.in_rules() | names.in_docs()) - there == set()
    assert there - names.in_panels() - names.in_rules() - names.in_docs() == set()
