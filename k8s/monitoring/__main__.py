"""Writes what k8s/components/monitoring has of other files: the rules as the operator reads them, and the dashboards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from k8s.monitoring import divergence, engine, order, overview

HERE = Path(__file__).parent
COMPONENT = HERE.parent / "components" / "monitoring"
BOARDS = (overview.BOARD, divergence.BOARD, order.BOARD, engine.BOARD)


def files() -> Iterator[tuple[Path, str]]:
    """Each with what belongs into it."""
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "ostinato"},
        "spec": yaml.safe_load((HERE / "rules.yaml").read_text()),
    }
    made = "# Made of k8s/monitoring/rules.yaml by `make dashboards`.\n"
    yield COMPONENT / "rules.yaml", made + yaml.safe_dump(rules, sort_keys=False, width=120)
    for board in BOARDS:
        text = JSONEncoder(sort_keys=True, indent=2).encode(board.build())
        yield COMPONENT / "dashboards" / f"{board.name}.json", text + "\n"


if __name__ == "__main__":
    for path, text in files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
