"""The metrics of both programs, and those that dashboards, rules and docs use."""

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
GPU = {metric.name: "only with TurboMind, on a GPU" for metric in Meter(1, lambda: _LOAD).collect(_OVERRIDES)}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A dashboard's panels without its rows."""
    return (panel for panel in board["panels"] if panel["type"] != "row")


def boards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def expanded(query: str, rate: str = "10s") -> str:
    """A panel's query as Grafana would send it, with all jobs and instances selected."""
    return re.sub(r"\$(job|instance)\b", ".*", query.replace("$__rate_interval", rate))


def rules() -> Iterator[dict[str, Any]]:
    """Recording and alerting rules, in order."""
    groups = yaml.safe_load((K8S / "monitoring" / "rules.yaml").read_text())["groups"]
    return (rule for group in groups for rule in group["rules"])


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def metric_names(texts: Iterable[str]) -> set[str]:
    """Names of metric families in queries or prose, without those of recording rules."""
    words = {word for text in texts for word in re.findall(r"(?<![\w:])(?:ostinato_|lmdeploy_|vllm:)[a-z0-9_]+(?![\w:])", text)}
    return {re.sub(r"_(total|bucket|sum|count)$", "", word) for word in words}


def in_panels() -> set[str]:
    return metric_names(path.read_text() for path in DASHBOARDS.glob("*.json"))


def in_rules() -> set[str]:
    return metric_names(rule["expr"] for rule in rules())


def in_docs() -> set[str]:
    return metric_names([OPERATIONS.read_text()])


def served(page: str) -> set[str]:
    families = {re.sub(r"_total$", "", name) for name in re.findall(r"^# TYPE ((?:ostinato_|vllm:)\w+) ", page, re.MULTILINE)}
    return {name for name in families if not name.endswith("_created")}
