"""The manifests, built as `kubectl apply -k` builds them, and what a test asks of them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from serving.settings import read

from service.config import Settings as Service
from sidecar.config import Settings as Sidecar

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
BIN = Path(sys.executable).parent
COMPONENTS = (
    *sorted({path.parent.name for path in K8S.glob("components/*/kustomization.yaml")} - {"autoscaling"}),
    "autoscaling",
)
"""In an order in which they may be named: who scales takes the number of Pods from who states it."""
OVERLAYS = tuple(sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml")))
SETTINGS: dict[str, type] = {"service": Service, "sidecar": Sidecar}

Yaml: TypeAlias = dict[str, Any]
Combination: TypeAlias = tuple[str, ...]


def combinations() -> tuple[Combination, ...]:
    """The base, every two components on it, and all of them; each overlay alone and as it would be run, watched and behind
    certificates. Scaling brings the shared order that it needs. Components patch each other's work in pairs if they do at all;
    `open` sets one variable."""
    paired = [name for name in COMPONENTS if name != "open"]
    chosen = [set(pair) for count in range(3) for pair in itertools.combinations(paired, count)] + [set(COMPONENTS)]
    chosen += [{overlay, *more} for overlay in OVERLAYS for more in ((), ("mtls", "monitoring"))]
    complete = [names | ({"postgres"} if "autoscaling" in names else set()) for names in chosen]
    return tuple(dict.fromkeys(tuple(name for name in COMPONENTS if name in names) for names in complete))


@cache
def built(chosen: Combination) -> tuple[Yaml, ...]:
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        place = Path(folder).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(K8S / "base", place)],
            "components": [os.path.relpath(K8S / "components" / name, place) for name in chosen],
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(place)


def kustomize(folder: Path) -> tuple[Yaml, ...]:
    """What kubectl makes of a folder."""
    done = subprocess.run([BIN / "kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(resources: tuple[Yaml, ...], kind: str) -> list[Yaml]:
    return [resource for resource in resources if resource["kind"] == kind]


def statefulset(resources: tuple[Yaml, ...]) -> Yaml:
    [found] = of_kind(resources, "StatefulSet")
    return found


def pod(resources: tuple[Yaml, ...]) -> Yaml:
    spec: Yaml = statefulset(resources)["spec"]["template"]["spec"]
    return spec


def containers(resources: tuple[Yaml, ...]) -> dict[str, Yaml]:
    """The Pod's, by name; each runs the program of its name."""
    spec = pod(resources)
    return {container["name"]: container for container in (*spec["initContainers"], *spec["containers"])}


def environment(container: Yaml) -> dict[str, str]:
    """What the kubelet would set."""
    return {variable["name"]: _value(container, variable) for variable in container.get("env", [])}


def _value(container: Yaml, variable: Yaml) -> str:
    if "value" in variable:
        text: str = variable["value"]
        return text
    match variable["valueFrom"]:
        case {"fieldRef": {"fieldPath": "metadata.name"}}:
            return "ostinato-0"
        case {"secretKeyRef": {"name": "ostinato-journal", "key": "dsn"}}:
            return "postgresql://ostinato:secret@postgres:5432/ostinato"
        case {"resourceFieldRef": {"containerName": name, "resource": "limits.cpu", "divisor": "1"}}:
            assert name == container["name"]
            return str(-(-quantity(container["resources"]["limits"]["cpu"]) // 1))
        case other:
            raise AssertionError(f"{variable['name']} comes from where no test looks: {other}")


def settings(container: Yaml) -> Any:
    """What the program makes of its environment; it stops the test where it would stop."""
    own = {key: value for key, value in environment(container).items() if key.startswith("OSTINATO_")}
    return _settings(container["name"], tuple(container.get("args", ())), tuple(sorted(own.items())))


@cache
def _settings(name: str, args: tuple[str, ...], own: tuple[tuple[str, str], ...]) -> Any:
    return read(SETTINGS[name], name, args, dict(own))[0]


_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)} | {
    f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGT", 1)
}


def quantity(text: str) -> Decimal:
    """Raises ValueError for what Kubernetes would not take. Numbers that YAML does not read as text are refused too."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", text)
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return Decimal(found[1]) * _SUFFIXES[found[2]]
