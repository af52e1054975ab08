"""A real Prometheus and a real Alertmanager beside a running pair, and a webhook that receives the alerts."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.pair import held_port
from tests.waiting import until
from tests.web import read, receiving

NEEDED = ("prometheus", "promtool", "prometheus-alertmanager")
RULES = Path(__file__).parents[2] / "k8s" / "monitoring" / "rules.yaml"


def missing() -> str:
    """The missing programs; empty if there are none."""
    names = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed here: {', '.join(names)}" if names else ""


class Webhook:
    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def take(self, body: bytes) -> None:
        self.alerts += json.loads(body)["alerts"]

    def received(self, name: str, **labels: str) -> list[dict[str, Any]]:
        """The alerts with this name and these labels, in order of arrival."""
        wanted = {"alertname": name, **labels}.items()
        return [alert for alert in list(self.alerts) if wanted <= alert["labels"].items()]


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            read(f"{self._url}/-/ready")
            return True
        return False

    def now(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._api("query", query=query)["result"]
        return found

    def over(self, query: str, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._api("query_range", query=query, start=start, end=end, step=step)["result"]
        return found

    def exemplars(self, query: str, start: float, end: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._api("query_exemplars", query=query, start=start, end=end)
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._api("rules")["groups"] for rule in group["rules"]]

    def _api(self, what: str, **values: object) -> Any:
        return json.loads(read(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(values)}"))["data"]


@contextlib.contextmanager
def watching(folder: Path, targets: Mapping[str, int], rules: Path, period: str) -> Iterator[tuple[Prometheus, Webhook]]:
    """Scrapes the jobs' ports and evaluates the rules each period."""
    held = held_port(), held_port()
    ports = [each.getsockname()[1] for each in held]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(_prometheus(rules, period, targets, ports[1])))
    commands = (
        [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series", "--log.level=warn",
            f"--web.listen-address=127.0.0.1:{ports[0]}", "--enable-feature=exemplar-storage",
        ],
        [
            "prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/alerts",
            f"--web.listen-address=127.0.0.1:{ports[1]}", "--cluster.listen-address=", "--log.level=warn",
        ],
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        webhook = Webhook()
        url = stack.enter_context(receiving(webhook.take))
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(_alertmanager(url)))
        for each in held:
            stack.enter_context(each)
        for command in commands:
            log = stack.enter_context((folder / f"{command[0]}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
        found = Prometheus(f"http://127.0.0.1:{ports[0]}")
        try:
            until(found.ready, "Prometheus is ready")
        except AssertionError as error:
            error.add_note((folder / "prometheus.log").read_text())
            raise
        yield found, webhook


def _prometheus(rules: Path, period: str, targets: Mapping[str, int], alertmanager: int) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": period, "scrape_timeout": period, "evaluation_interval": period},
        "rule_files": [str(rules)],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]},
        "scrape_configs": [{"job_name": job, "static_configs": [_target(job, port)]} for job, port in targets.items()],
    }


def _target(job: str, port: int) -> dict[str, Any]:
    return {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": f"{job.removeprefix('ostinato-')}-0"}}


def _alertmanager(url: str) -> dict[str, Any]:
    return {
        "route": {"receiver": "webhook", "group_by": ["alertname"], "group_wait": "100ms", "group_interval": "1s"},
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": url, "send_resolved": True}]}],
    }
