"""Every alert, raised by a pair to which it happens, and told by a real Alertmanager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.monitoring import names
from tests.monitoring.misfortunes import COMPILER, IN_THE_TOUR, suffering
from tests.monitoring.tour import SERVICE, SIDECAR
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
"""Of those that say more, or less, than which sidecar."""


@pytest.fixture(name="webhook", scope="module")
def _webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    if why := missing():
        pytest.skip(why)
    if shutil.which(COMPILER) is None:
        pytest.skip(f"not installed here: {COMPILER}")
    with suffering(tmp_path_factory.mktemp("alerts")) as webhook:
        yield webhook


@pytest.mark.parametrize("name", [name for name in names.alerts() if name not in IN_THE_TOUR])
def test_an_alert_reaches_whoever_is_called(webhook: Webhook, name: str) -> None:
    """It fires when what it is for happens, with the labels that say where, and its text is filled in."""
    heard = webhook.heard(name, **LABELS.get(name, {"job": SIDECAR, "instance": "sidecar-0"}))

    assert heard, f"of {name} came {[each['labels'] for each in webhook.heard(name)]}"
    assert heard[0]["status"] == "firing"
    assert heard[0]["labels"]["severity"] == names.alerts()[name]["labels"]["severity"]
    assert "<" not in heard[0]["annotations"]["description"], "<no value>, <error expanding template>"
