"""The route of a prompt is measured, and stays short."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.pair import ROOT

CALLS_MAX, FILES_MAX, STOPS_MAX = 500, 49, 25


def test_the_route_stays_short() -> None:
    """One prompt with one token passes a bounded number of functions, files and stops, from the order's core to the client."""
    command = [sys.executable, "-m", "tests.bench", "route"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = re.search(r"client, sidecar and service │ +(\d+) │ +\d+ │ +(\d+) │ +\d+ │ +(\d+) │", done.stdout)
    stops = re.findall(r"│ ((?:proto|sidecar|service)/\S+:\S+)", done.stdout)

    assert row is not None, done.stdout
    calls, files, number = map(int, row.groups())
    assert (calls <= CALLS_MAX, files <= FILES_MAX, number <= STOPS_MAX) == (True, True, True), done.stdout
    assert stops[0].startswith("sidecar/core/")
    assert any(stop.startswith("proto/ostinato/client.py:") for stop in stops)
