"""Both programs in containers: started by hand, and as the Pod that the manifests describe."""

from __future__ import annotations

import contextlib
import copy
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.image.podman import podman, run
from tests.k8s.manifests import Yaml, built, pod, statefulset

HARDENED = (
    "--read-only", "--tmpfs=/tmp:rw,size=64m,mode=1777", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=host",
    "--no-healthcheck", "--pids-limit=256",
)  # fmt: skip
SHELLS = tuple(f"--volume=/dev/null:/usr/bin/{name}:ro" for name in ("dash", "bash"))
"""There is none where these lie over them: whatever would start one fails."""
MEMORY_BYTES = {"service": 2 << 30, "sidecar": 1 << 30}
"""As in the manifests."""
READY_SECONDS = 900.0
"""A self-test on a busy machine."""
OF_A_CLUSTER = ("startupProbe", "livenessProbe", "readinessProbe", "restartPolicy", "lifecycle", "ports", "imagePullPolicy")
"""What podman does not do as a kubelet does; tests/k8s has these, and the tests here do what hooks and probes would."""


@dataclass(frozen=True)
class Images:
    base: str
    sidecar: str
    service: str


@dataclass(frozen=True)
class Pair:
    """Two containers that can admit."""

    service: str
    sidecar: str
    target: str

    def probe(self, program: str, service: str = "") -> subprocess.CompletedProcess[str]:
        """By exec, as a cluster does."""
        command = ["podman", "exec", getattr(self, program), "python", "-m", program, "probe", *filter(None, [service])]
        return run(*command, check=False)

    def log(self) -> str:
        """The ends of both."""
        return "\n".join(run("podman", "logs", "--tail=20", name, check=False).stderr for name in (self.service, self.sidecar))

    def ready(self) -> None:
        """Waits until it can admit."""
        _until(lambda: self.probe("sidecar", "ostinato.v1.Generation").returncode == 0, self.log)


@contextlib.contextmanager
def by_hand(images: Images) -> Iterator[Pair]:
    """Only the socket is shared; each has a volume of its own for what it keeps."""
    pair = Pair("ostinato-check-service", "ostinato-check-sidecar", f"127.0.0.1:{_port()}")
    volumes = [f"ostinato-check-{what}" for what in ("socket", "sidecar", "service")]
    environment = {
        "sidecar": (f"OSTINATO_SIDECAR_LISTEN={pair.target}", "OSTINATO_SIDECAR_METRICS=127.0.0.1:0"),
        "service": ("OSTINATO_SERVICE_METRICS=127.0.0.1:0",),
    }
    with _removed(["rm", "--force", "--time=0", pair.service, pair.sidecar], volumes):
        for volume in volumes:
            options = ("type=tmpfs", "device=tmpfs", "o=uid=10001,gid=10001,mode=0770")
            podman("volume", "create", *(f"--opt={option}" for option in options), volume)
        for program, variables in environment.items():
            memory = MEMORY_BYTES[program]
            podman(
                "run", "--detach", "--name", getattr(pair, program), *HARDENED, *SHELLS,
                f"--memory={memory}", f"--memory-swap={memory}",
                f"--volume={volumes[0]}:/run/ostinato", f"--volume=ostinato-check-{program}:/var/lib/ostinato",
                *(f"--env={variable}" for variable in variables), getattr(images, program),
            )  # fmt: skip
        pair.ready()
        yield pair


@contextlib.contextmanager
def as_a_pod(images: Images) -> Iterator[Pair]:
    """What k8s/base describes, without a self-test, on ports of this host that are free."""
    pair = Pair("ostinato-check-pod-service", "ostinato-check-pod-sidecar", f"127.0.0.1:{_port()}")
    spec = _for_podman(images, pair.target)
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ostinato-check-pod"}, "spec": spec}
    with _removed(["pod", "rm", "--force", "--time=0", "ostinato-check-pod"], claims), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pod.yaml")
        path.write_text(yaml.safe_dump(document))
        podman("kube", "play", str(path))
        pair.ready()
        yield pair


def _for_podman(images: Images, target: str) -> Yaml:
    resources = built(())
    spec = copy.deepcopy(pod(resources))
    spec["containers"] = [*spec.pop("initContainers"), *spec["containers"]]
    for container in spec["containers"]:
        for name in OF_A_CLUSTER:
            container.pop(name, None)
        container["image"] = getattr(images, container["name"])
        for variable in container["env"]:
            address = re.fullmatch(r"0\.0\.0\.0:(\d+)", variable.get("value", ""))
            if address:
                variable["value"] = target if variable["name"].endswith("_LISTEN") else "127.0.0.1:0"
        container["env"] = [v for v in container["env"] if "resourceFieldRef" not in v.get("valueFrom", {})]
    spec["containers"][-1]["env"].append({"name": "OSTINATO_SERVICE_SELF_TEST", "value": "off"})
    for name in ("topologySpreadConstraints", "serviceAccountName"):
        del spec[name]
    templates = [claim["metadata"]["name"] for claim in statefulset(resources)["spec"]["volumeClaimTemplates"]]
    spec["volumes"] += [{"name": n, "persistentVolumeClaim": {"claimName": f"ostinato-check-pod-{n}"}} for n in templates]
    return spec | {"hostNetwork": True, "restartPolicy": "Never"}  # a Pod that is going is not restarted


@contextlib.contextmanager
def _removed(removing: list[str], volumes: list[str]) -> Iterator[None]:
    """Nothing is left of an earlier run at the start, nor of this one at the end."""

    def remove() -> None:
        run("podman", *removing, check=False)
        run("podman", "volume", "rm", "--force", *volumes, check=False)

    remove()
    try:
        yield
    finally:
        remove()


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def _until(holds: Callable[[], bool], why_not: Callable[[], str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not holds():
        assert time.monotonic() < deadline, why_not()
        time.sleep(0.2)
