"""Every alert is raised by its fault and sent by a real Alertmanager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.monitoring import names
from tests.monitoring.faults import COMPILER, IN_TEST_WATCH, with_faults
from tests.monitoring.load import SERVICE, SIDECAR
from tests.monitoring.watch import Webhook, missing

pytestmark = pytest.mark.timeout(180)

LABELS = {
    "OstinatoDeadlineMisses": {"job": SIDECAR},
    "OstinatoDown": {"job": SERVICE, "instance": "service-0"},
    "OstinatoEngineFaults": {"job": SIDECAR, "instance": "sidecar-0", "reason": "PROTOCOL_VIOLATION"},
    "OstinatoErrorBudgetBurnsFast": {"job": SIDECAR, "slo": "calls"},
    "OstinatoErrorBudgetBurnsSlow": {"job": SIDECAR, "slo": "calls"},
    "OstinatoCredentialsUnusable": {"job": SIDECAR, "instance": "sidecar-0", "kind": "tls"},
    "OstinatoNotCompared": {"job": SIDECAR, "instance": "sidecar-0", "kind": "audit"},
}
"""Of alerts whose labels are not only those of the sidecar."""


@pytest.fixture(name="webhook", scope="module")
def _webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    if why := missing():
        pytest.skip(why)
    if shutil.which(COMPILER) is None:
        pytest.skip(f"not installed here: {COMPILER}")
    with with_faults(tmp_path_factory.mktemp("alerts")) as webhook:
        yield webhook


@pytest.mark.parametrize("name", [name for name in names.alerts() if name not in IN_TEST_WATCH])
def test_an_alert_is_received(webhook: Webhook, name: str) -> None:
    """An alert fires at its fault, with its labels, and without template errors in its text."""
    received = webhook.received(name, **LABELS.get(name, {"job": SIDECAR, "instance": "sidecar-0"}))

    assert received, f"of {name} came {[each['labels'] for each in webhook.received(name)]}"
    assert received[0]["status"] == "firing"
    assert received[0]["labels"]["severity"] == names.alerts()[name]["labels"]["severity"]
    assert "<" not in received[0]["annotations"]["description"], "<no value>, <error expanding template>"
