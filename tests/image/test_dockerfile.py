"""The Dockerfile and what it installs, as far as that can be judged without building."""

from __future__ import annotations

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


def test_the_model_is_the_makefiles() -> None:
    """One version of the CPU engine's model, wherever it is installed."""
    [stated] = re.findall(r"^SMOLLM2 := (\S+)==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert locked("smollm2") == {stated[0]: Version(stated[1])}


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
    text = (ROOT / "Dockerfile").read_text()
    assert len(re.findall(r"hadolint ignore=", text)) == len(re.findall(r"# hadolint ignore=DL\d+ # \S", text))


def test_the_images_version_is_the_projects() -> None:
    """The label says what is in the image."""
    assert f"ARG VERSION={ostinato.__version__}\n" in (ROOT / "Dockerfile").read_text()


def test_the_context_has_only_what_is_copied() -> None:
    """.dockerignore lets in what the Dockerfile copies, and begins by leaving out all else."""
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}

    assert next(rule for rule in rules if not rule.startswith("#")) == "*"
    assert all(any(Path(source).is_relative_to(rule) for rule in allowed) for source in sources)
    assert all(any(Path(source).is_relative_to(rule) for source in sources) for rule in allowed)
