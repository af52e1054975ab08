"""Writes the generated files of k8s/components/monitoring: the rules for the Prometheus operator, and the dashboards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from k8s.monitoring.boards import BOARDS

HERE = Path(__file__).parent
COMPONENT = HERE.parent / "components" / "monitoring"


def files() -> Iterator[tuple[Path, str]]:
    """Paths and contents."""
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
