"""The metrics that there are, and those that somebody asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from service.engines.turbomind.metrics import Meter

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
DASHBOARDS = K8S / "components" / "monitoring" / "dashboards"
OPERATIONS = ROOT / "docs" / "operations.md"

_OVERRIDES: Any = SimpleNamespace(counters=SimpleNamespace(calls={}, plans=0, uncovered=0, corrected=0))
_LOAD: Any = SimpleNamespace(usage=0, tick=0, active=0, waiting=0, prefix_hits=0)
GPU = {metric.name: "only TurboMind says it, on a GPU" for metric in Meter(1, lambda: _LOAD).collect(_OVERRIDES)}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a dashboard, without its rows."""
    return (panel for panel in board["panels"] if panel["type"] != "row")


def boards() -> dict[str, dict[str, Any]]:
    """All dashboards by name, as committed."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def spelt(query: str, rate: str = "10s") -> str:
    """A panel's query as Grafana would send it, with everything chosen."""
    return re.sub(r"\$(job|instance)\b", ".*", query.replace("$__rate_interval", rate))


def rules() -> Iterator[dict[str, Any]]:
    """Recording and alerting ones, in order."""
    groups = yaml.safe_load((K8S / "monitoring" / "rules.yaml").read_text())["groups"]
    return (rule for group in groups for rule in group["rules"])


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def asked(texts: Iterable[str]) -> set[str]:
    """Names of metrics in queries or prose, as their families are called; what rules record is not one."""
    words = {word for text in texts for word in re.findall(r"(?<![\w:])(?:ostinato|lmdeploy)_[a-z0-9_]+(?![\w:])", text)}
    return {re.sub(r"_(total|bucket|sum|count)$", "", word) for word in words}


def in_panels() -> set[str]:
    """What dashboards ask for."""
    return asked(path.read_text() for path in DASHBOARDS.glob("*.json"))


def in_rules() -> set[str]:
    """What rules ask for."""
    return asked(rule["expr"] for rule in rules())


def in_docs() -> set[str]:
    """What docs/operations.md names."""
    return asked([OPERATIONS.read_text()])


def served(page: str) -> set[str]:
    """Families of a metrics page that are ours."""
    families = {re.sub(r"_total$", "", name) for name in re.findall(r"^# TYPE (ostinato_\w+) ", page, re.MULTILINE)}
    return {name for name in families if not name.endswith("_created")}
