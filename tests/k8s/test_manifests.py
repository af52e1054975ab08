"""Manifests, and what a cluster would find wrong and no schema does: names, labels, ports, places and times that must agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

import ostinato

from service.config import Settings as Service
from sidecar import checks
from sidecar.__main__ import DRAIN_END_SECONDS, GENERATION, SEQUENCER
from sidecar.config import Settings as Sidecar
from sidecar.observe import Metrics
from tests.e2e.test_floods import MEGABYTES_MAX
from tests.k8s.manifests import (
    BIN,
    K8S,
    OVERLAYS,
    Combination,
    built,
    combinations,
    containers,
    environment,
    kustomize,
    of_kind,
    pod,
    quantity,
    settings,
    statefulset,
)
from tests.monitoring.names import metric_names
from tests.pair import Program

VERSIONS = ("1.33", "1.37")
"""The first with native sidecars for everybody, and the newest known here."""
DOCKERFILE = (K8S.parent / "Dockerfile").read_text()
FOREIGN = {"Certificate", "PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that an operator brings; no schema of Kubernetes has them."""
every = pytest.mark.parametrize("chosen", combinations(), ids=lambda chosen: "+".join(chosen) or "base")


@cache
def _validated(text: str) -> None:
    resource = json.loads(text)
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


@every
def test_it_is_what_the_schemas_say(chosen: Combination) -> None:
    """No field is misspelt, missing or of another type, in the oldest version that can run it and in the newest."""
    for resource in built(chosen):
        if resource["kind"] not in FOREIGN:
            _validated(json.dumps(resource, sort_keys=True))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_a_component_on_the_base(overlay: str) -> None:
    """Overlays say nothing of their own, so that what they do can be had together."""
    assert kustomize(K8S / "overlays" / overlay) == built((overlay,))


def test_the_kustomization_of_the_docs(tmp_path: Path) -> None:
    """What docs/operations.md shows can be copied: it builds, and changes what it says."""
    text = (K8S.parent / "docs" / "operations.md").read_text()
    [shown] = re.findall(r"^```yaml\n(apiVersion: kustomize.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "ostinato").mkdir()
    shutil.copytree(K8S, tmp_path / "ostinato" / "k8s")
    (tmp_path / "kustomization.yaml").write_text(shown)
    resources = kustomize(tmp_path)
    claims = statefulset(resources)["spec"]["volumeClaimTemplates"]

    assert {container["image"] for container in containers(resources).values()} == {
        f"registry.example/ostinato-{name}@sha256:{'0' * 64}" for name in ("sidecar", "service")
    }
    assert [claim["spec"]["resources"]["requests"]["storage"] for claim in claims] == ["100Gi", "1Gi"]
    assert of_kind(resources, "Certificate")
    assert of_kind(resources, "PrometheusRule")


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_kubernetes_own_types_read_it(folder: str, tmp_path: Path) -> None:
    """Go's decoder takes every quantity, duration and number; schemas do not look into their text."""
    path = tmp_path / "all.yaml"
    core = [resource for resource in kustomize(K8S / folder) if resource["kind"] == "StatefulSet"]
    path.write_text(yaml.safe_dump_all(core))
    done = subprocess.run(
        [BIN / "kubectl", "set", "env", "--local", "-f", path, "A=b", "-o", "name"],
        env={**os.environ, "KUBECONFIG": os.devnull}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (0, "statefulset.apps/ostinato\n", "")


@every
def test_selectors_find_the_pod(chosen: Combination) -> None:
    """Everything that looks for Pods by labels finds ours."""
    resources = built(chosen)
    labels = statefulset(resources)["spec"]["template"]["metadata"]["labels"]
    selectors = [statefulset(resources)["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in of_kind(resources, "Service")]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in of_kind(resources, "PodDisruptionBudget")]
    selectors += [policy["spec"]["podSelector"]["matchLabels"] for policy in of_kind(resources, "NetworkPolicy")]
    selectors += [monitor["spec"]["selector"]["matchLabels"] for monitor in of_kind(resources, "PodMonitor")]
    selectors += [spread["labelSelector"]["matchLabels"] for spread in pod(resources)["topologySpreadConstraints"]]

    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    assert statefulset(resources)["spec"]["serviceName"] in [s["metadata"]["name"] for s in of_kind(resources, "Service")]


@every
def test_ports_are_where_programs_listen(chosen: Combination) -> None:
    """Services, policies and monitors name ports that containers have, and on which the programs listen."""
    resources = built(chosen)
    declared = {port["containerPort"]: port["name"] for c in containers(resources).values() for port in c["ports"]}
    listening = [settings(c).metrics for c in containers(resources).values()]
    sidecar = settings(containers(resources)["sidecar"])
    listening += [*sidecar.listen, *filter(None, [sidecar.health_listen])]
    asked = [port["targetPort"] for service in of_kind(resources, "Service") for port in service["spec"]["ports"]]
    asked += [p["port"] for n in of_kind(resources, "NetworkPolicy") for rule in n["spec"]["ingress"] for p in rule["ports"]]
    monitored = [e["port"] for m in of_kind(resources, "PodMonitor") for e in m["spec"]["podMetricsEndpoints"]]

    assert set(declared) == {int(address.rpartition(":")[2]) for address in listening}
    assert all(isinstance(port, int) for port in asked)
    assert set(asked) <= set(declared)
    assert set(monitored) <= set(declared.values())


@every
def test_probes_ask_the_right_things(chosen: Combination) -> None:
    """By integer ports of their own container; starting and living ask the Sequencer, which does not wait for a model."""
    resources = built(chosen)
    sidecar, service = (containers(resources)[name] for name in ("sidecar", "service"))
    ports = [port["containerPort"] for port in sidecar["ports"]]
    probes = {kind: sidecar[f"{kind}Probe"]["grpc"] for kind in ("startup", "liveness", "readiness")}

    assert all(type(probe["port"]) is int and probe["port"] in ports for probe in probes.values())
    assert [probes[kind]["service"] for kind in ("startup", "liveness", "readiness")] == [SEQUENCER, SEQUENCER, GENERATION]
    assert service["livenessProbe"]["exec"]["command"][:4] == ["python", "-m", "service", "probe"]
    assert "startupProbe" not in service, "its socket is there before its model is"
    giving_up = [sidecar["startupProbe"], sidecar["livenessProbe"], service["livenessProbe"]]
    assert {probe["terminationGracePeriodSeconds"] for probe in giving_up} == {30}, "what hangs does not drain"


@every
def test_a_stop_begins_in_the_sidecar(chosen: Combination) -> None:
    """It is a native sidecar, to which SIGTERM comes when the service has ended. Its hook sends it the other signal when the
    service gets that one."""
    spec = pod(built(chosen))
    [sidecar], [service] = spec["initContainers"], spec["containers"]

    assert [(each["name"], each.get("restartPolicy")) for each in (sidecar, service)] == [
        ("sidecar", "Always"),
        ("service", None),
    ]
    assert spec.get("restartPolicy", "Always") == "Always"
    assert sidecar["lifecycle"] == {
        "preStop": {"exec": {"command": ["python", "-c", "import os, signal; os.kill(1, signal.SIGINT)"]}}
    }
    assert "lifecycle" not in service
    assert DOCKERFILE.count("STOPSIGNAL") == DOCKERFILE.count("STOPSIGNAL SIGTERM") == 1


@every
def test_the_programs_take_their_environment(chosen: Combination) -> None:
    """Every variable is a setting with a value that the program takes, and no Service's name can add another."""
    resources = built(chosen)
    spec = pod(resources)

    for name, container in containers(resources).items():
        prefixed = [key for key in environment(container) if key.startswith("OSTINATO_")]
        assert all(key.startswith(f"OSTINATO_{name.upper()}_") for key in prefixed)
        settings(container)
    assert spec["enableServiceLinks"] is False


@every
def test_callers_prove_who_they_are(chosen: Combination) -> None:
    """The sidecar is given credentials or is open by a component that says so, and by nothing else; a Secret is mounted
    as a whole folder, read-only, for the program's group."""
    resources = built(chosen)
    sidecar = containers(resources)["sidecar"]
    given, volumes = settings(sidecar), {volume["name"]: volume for volume in pod(resources)["volumes"]}
    mounts = {mount["name"]: mount for mount in sidecar["volumeMounts"]}

    assert given.open == ("open" in chosen)
    assert (given.tokens is not None) == ("tokens" in chosen) == given.allow_plaintext_tokens
    assert (given.tls_client_ca is not None) == ("mtls" in chosen)
    for name in ("tokens", "tls"):
        if name in volumes:
            assert volumes[name]["secret"] == {"secretName": f"ostinato-{name}", "defaultMode": 0o440}
            assert mounts[name] == {"name": name, "mountPath": f"/etc/ostinato/{name}", "readOnly": True}


@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_without_credentials_it_does_not_start(overlay: str, tmp_path: Path) -> None:
    """The sidecar itself, in the manifests' environment: the base, and overlays that say nothing of callers, are refused; with
    tokens, or openly, it listens."""
    tokens = tmp_path / "tokens"
    tokens.write_text("")
    tokens.chmod(0o440)
    here = {
        "OSTINATO_SIDECAR_LISTEN": "0.0.0.0:0",
        "OSTINATO_SIDECAR_METRICS": "127.0.0.1:0",
        "OSTINATO_SIDECAR_TOKENS": str(tokens),
        "OSTINATO_SIDECAR_JOURNAL": str(tmp_path / "journal"),
    }
    given = environment(containers(built((overlay,) if overlay else ()))["sidecar"])
    sidecar = Program("sidecar", [], {name: here.get(name, value) for name, value in given.items()})
    try:
        if overlay in ("open", "tokens"):
            sidecar.wait_for("listening")
        else:
            with pytest.raises(AssertionError, match="require credentials"):
                sidecar.wait_for("listening")
            assert sidecar.stop() == 2
    finally:
        sidecar.kill()


@every
def test_every_drain_fits_into_the_next(chosen: Combination) -> None:
    """What was admitted can end before the sidecar's drain does, that one before the service's, and both within the grace."""
    resources = built(chosen)
    sidecar, service = (settings(containers(resources)[name]) for name in ("sidecar", "service"))
    grace = pod(resources)["terminationGracePeriodSeconds"]

    assert sidecar.item_timeout_seconds <= sidecar.drain_seconds
    assert sidecar.drain_seconds + DRAIN_END_SECONDS < service.drain_seconds < grace
    assert grace > Sidecar().drain_seconds + Sidecar().item_timeout_seconds
    assert grace > Service().drain_seconds + Sidecar().item_timeout_seconds


@every
def test_one_file_has_one_writer(chosen: Combination) -> None:
    """More than one Pod only where the order is shared, each under its own name; a number that KEDA owns is not stated."""
    resources = built(chosen)
    replicas = statefulset(resources)["spec"].get("replicas")
    [writer] = [v for v in containers(resources)["sidecar"]["env"] if v["name"] == "OSTINATO_SIDECAR_WRITER"]
    claims = [claim["metadata"]["name"] for claim in statefulset(resources)["spec"]["volumeClaimTemplates"]]

    assert replicas == (None if "autoscaling" in chosen else 3 if "postgres" in chosen else 1)
    assert writer["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert claims == (["state"] if "postgres" in chosen else ["journal", "state"])


@every
def test_what_is_written_lies_on_a_volume(chosen: Combination) -> None:
    """Every mount has its volume, and every path of a setting its mount: the root is read-only."""
    resources = built(chosen)
    volumes = {volume["name"] for volume in pod(resources)["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in statefulset(resources)["spec"]["volumeClaimTemplates"]}
    for container in containers(resources).values():
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        values = [value for key, value in environment(container).items() if key.startswith("OSTINATO_")]
        paths = [value.removeprefix("unix:") for value in values if re.match(r"(unix:)?/", value)]

        assert set(mounts.values()) <= volumes
        assert "/tmp" in mounts  # where libraries put what is theirs
        assert [path for path in paths if not any(Path(path).is_relative_to(mount) for mount in mounts)] == []


@every
def test_nothing_has_the_name_of_another(chosen: Combination) -> None:
    """Variables, ports, volumes and mounts are refused by a server if they are there twice, and so are names that are none."""
    resources = built(chosen)
    spec = pod(resources)
    claims = [claim["metadata"]["name"] for claim in statefulset(resources)["spec"]["volumeClaimTemplates"]]
    lists = [[f"{each['kind']}/{each['metadata']['name']}" for each in resources]]
    lists += [[volume["name"] for volume in spec["volumes"]] + claims]
    for key in ("name", "containerPort"):
        lists += [[port[key] for container in containers(resources).values() for port in container["ports"]]]
    for container in containers(resources).values():
        lists += [[variable["name"] for variable in container["env"]], [m["mountPath"] for m in container["volumeMounts"]]]
    names = [resource["metadata"]["name"] for resource in resources] + lists[1] + list(containers(resources))

    assert [each for each in lists if len(each) != len(set(each))] == []
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)] == []
    assert all(len(port["name"]) <= 15 for container in containers(resources).values() for port in container["ports"])


@every
def test_it_is_restricted(chosen: Combination) -> None:
    """Pod Security's `restricted`, and a read-only root besides; nothing of the node, no token of the cluster."""
    resources = built(chosen)
    spec = pod(resources)

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
    assert {kind for volume in spec["volumes"] for kind in volume} <= {
        "name", "configMap", "secret", "emptyDir", "persistentVolumeClaim",
    }  # fmt: skip
    for container in containers(resources).values():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert of_kind(resources, "Secret") == [], "secrets are made by those who run it"


@every
def test_resources_can_be_had(chosen: Combination) -> None:
    """Quantities are quantities, memory is bounded, and nothing asks for more than it may have. The sidecar's request covers
    what floods are shown to take at most, and that the bounds of what is let in and held; its limit is twice as much."""
    resources = built(chosen)
    sizes = [volume["emptyDir"]["sizeLimit"] for volume in pod(resources)["volumes"] if "emptyDir" in volume]
    sizes += [c["spec"]["resources"]["requests"]["storage"] for c in statefulset(resources)["spec"]["volumeClaimTemplates"]]

    assert all(quantity(size) > 0 for size in sizes)
    for container in containers(resources).values():
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) == set(limits)
        assert all(0 < quantity(requests[name]) <= quantity(limits[name]) for name in requests)
    sidecar = containers(resources)["sidecar"]
    memory = {kind: int(quantity(sidecar["resources"][kind]["memory"])) for kind in ("requests", "limits")}
    given, floods = settings(sidecar), MEGABYTES_MAX * 10**6
    assert given.arriving_bytes_max + given.request_bytes_max + given.held_bytes_max < floods <= memory["requests"]
    assert memory["limits"] >= 2 * floods


@every
def test_images_are_this_version(chosen: Combination) -> None:
    """Each image has a tag, and it is the project's version."""
    images = {name: container["image"] for name, container in containers(built(chosen)).items()}
    service = "ostinato-service-turbomind" if "turbomind" in chosen else "ostinato-service"

    assert images == {"sidecar": f"ostinato-sidecar:{ostinato.__version__}", "service": f"{service}:{ostinato.__version__}"}


@every
def test_scaling_asks_for_what_there_is(chosen: Combination) -> None:
    """Scaling asks for metrics that the sidecar has; tests/monitoring asks the same of the rules."""
    numbers = CollectorRegistry()
    Metrics(numbers)
    asked = [t["metadata"]["query"] for scaled in of_kind(built(chosen), "ScaledObject") for t in scaled["spec"]["triggers"]]

    assert metric_names(asked) <= {metric.name for metric in numbers.collect()}
    assert bool(asked) == bool(metric_names(asked)) == ("autoscaling" in chosen)


def test_monitoring_brings_the_dashboards() -> None:
    """Each in a ConfigMap of its own, with the label by which Grafana's sidecar finds it, byte for byte."""
    maps = [each for each in of_kind(built(("monitoring",)), "ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    files = (K8S / "components" / "monitoring" / "dashboards").glob("*.json")

    assert {each["metadata"]["name"]: each["data"] for each in maps} == {
        f"ostinato-dashboard-{path.stem}": {path.name: path.read_text()} for path in files
    }


def test_the_rules_know_the_jobs() -> None:
    """What Prometheus calls the two programs is what the rules and dashboards call them; an instance has its Pod's name."""
    [monitor] = of_kind(built(("monitoring",)), "PodMonitor")
    set_to = {
        endpoint["port"]: {
            each["targetLabel"]: each.get("replacement", each.get("sourceLabels")) for each in endpoint["relabelings"]
        }
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    pod_name = ["__meta_kubernetes_pod_name"]

    assert set_to == {
        "metrics": {"job": "ostinato-sidecar", "instance": pod_name},
        "engine-metrics": {"job": "ostinato-service", "instance": pod_name},
    }


def test_the_canaries_are_canaries() -> None:
    """The sidecar takes the file of the component, and knows every one in it by its name."""
    assert [*checks.read_canaries(K8S / "components" / "canaries" / "canaries.toml")] == ["greedy", "sampled"]


def test_bad_quantities_are_noticed() -> None:
    """The check can fail."""
    for text in ("", "1Gx", "-1", "1 Gi", "cpu"):
        with pytest.raises(ValueError, match="not a quantity"):
            quantity(text)
    assert quantity("1Gi") == 1024**3
