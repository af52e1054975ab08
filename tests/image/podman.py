"""Images and containers without a daemon: buildah and podman, as root, and what a host may lack for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = {"buildah", "podman", "runc", "catatonit", "mmdebstrap"}
"""Commands, which Debian's packages of these names bring."""
STAND_IN = "localhost/ostinato-python:3.11"
"""The base image made from Debian's packages, where no registry can be reached."""
LIKE_THE_OFFICIAL = """
for name in python3.11 python3 python; do ln -s /usr/bin/python3.11 "$1/usr/local/bin/$name"; done
rm -rf "$1"/var/lib/apt/lists/*; : >"$1/etc/resolv.conf"
"""
WHEELS = ROOT / ".run" / "wheels"
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
CONF = """[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
"""For hosts without systemd, with old or mixed cgroups, or with tight limits; it does no harm to others."""


def run(*command: str | Path, check: bool = True, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """A command's text; where it must succeed and does not, the test fails with what it said."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CONTAINERS_CONF": str(_conf())},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}", pytrace=False
        )
    return done


def podman(*command: str) -> str:
    return run("podman", *command).stdout.strip()


def have_tools() -> None:
    """Installs what is missing; skips nothing: who asked for images is told why there are none."""
    if os.geteuid():
        pytest.fail("images are built and run as root here: try sudo", pytrace=False)
    found = {name for name in NEEDED if shutil.which(name) or Path("/usr/libexec/podman", name).exists()}
    if missing := sorted(NEEDED - found):
        if shutil.which("apt-get") is None:
            pytest.fail(f"needs {', '.join(missing)}, and there is no apt-get to install them with", pytrace=False)
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "--yes", "-qq", "--no-install-recommends", *missing)


def base() -> str:
    """The base image by its tag if a registry has it, else one made of Debian's packages: that one has Debian's Python,
    so it cannot show what depends on the official image's build."""
    [official] = re.findall(r"^BASE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if run("podman", "pull", "--quiet", official, check=False, timeout=120).returncode == 0:
        return str(official)
    if run("podman", "image", "exists", STAND_IN, check=False).returncode:
        mirrors = re.findall(r"^URIs: (\S+)", SOURCES.read_text(), re.MULTILINE) if SOURCES.exists() else []
        with tempfile.TemporaryDirectory() as folder:
            tar = f"{folder}/base.tar"
            run(
                "mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv,ca-certificates",
                *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")),
                f"--customize-hook={LIKE_THE_OFFICIAL}",
                "bookworm", tar, *mirrors[:1],
            )  # fmt: skip
            podman("import", "--quiet", tar, STAND_IN)
    return STAND_IN


def build(target: str, base: str) -> str:
    """The image of a target, from the working tree and from wheels that lie here: the build itself asks no index."""
    tag = f"localhost/ostinato-{target}:check"
    run(
        "buildah", "build", "--isolation", "chroot", "--network", "host", "--pull=never", "--format", "docker",
        "--build-context", f"wheels={WHEELS}", "--build-arg", "PIP_NO_INDEX=1", "--build-arg", f"PYTHON={base}",
        "--layers", "--target", target, "--tag", tag, ".",
    )  # fmt: skip
    return tag


def download(*locks: str) -> None:
    """The wheels that are pinned, checked against their hashes."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for lock in locks:
        run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11",
            "--require-hashes", "--dest", WHEELS, "--requirement", f"requirements/{lock}.txt",
        )  # fmt: skip


def _conf() -> Path:
    path = ROOT / ".run" / "containers.conf"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONF)
    return path
