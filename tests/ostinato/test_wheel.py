"""The wheel: what is in it, and that both programs run from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ostinato

from tests.ostinato.test_cli_serve import ANYWHERE, UNTESTED

ROOT = Path(__file__).parents[2]
DIST_INFO = f"ostinato-{ostinato.__version__}.dist-info"
HOMES = {
    "proto/ostinato/": "ostinato/",
    "proto/serving/": "ostinato/programs/serving/",
    "service/": "ostinato/programs/service/",
    "sidecar/": "ostinato/programs/sidecar/",
}
"""Folders of the repository, and their places in the wheel."""


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    [made] = folder.glob("*.whl")
    return zipfile.ZipFile(made)


@pytest.fixture(scope="module", name="python")
def _python(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and this environment's packages, but without this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    wheel.extractall(packages)
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth files are not read
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `ostinato ARGUMENTS` in this working directory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OSTINATO_", "PYTHON"))}
    command = [str(python), "-m", "ostinato.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_it_has_every_file_in_its_place(wheel: zipfile.ZipFile) -> None:
    """The wheel has all files of these folders in git, only the package, and the package's version."""
    listed = subprocess.run(["git", "ls-files", "--", *HOMES], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {
        home + name.removeprefix(folder)
        for folder, home in HOMES.items()
        for name in listed.stdout.splitlines()
        if name.startswith(folder)
    }

    names = set(wheel.namelist())
    assert "ostinato/programs/sidecar/canaries.toml" in wanted
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names} == {"ostinato", DIST_INFO}


def test_a_client_needs_little(wheel: zipfile.ZipFile) -> None:
    """A client's requirements are gRPC, protobuf and the command line's libraries; all others are extras."""
    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    wanted = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}

    assert wanted == {"googleapis-common-protos", "grpcio", "grpcio-status", "protobuf", "rich", "typer"}
    assert "ostinato = ostinato.cli:main" in wheel.read(f"{DIST_INFO}/entry_points.txt").decode()


def test_no_common_name_is_a_package(python: Path, tmp_path: Path) -> None:
    """The wheel adds no packages of these names to site-packages."""
    names = ("serving", "service", "sidecar")
    code = f"import importlib.util as i, ostinato; print([i.find_spec(n) for n in {names}], ostinato.__file__)"
    done = subprocess.run([python, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.startswith(f"[None, None, None] {python.parents[1]}/"), done.stdout


def test_serve_answers_from_it(python: Path, tmp_path: Path) -> None:
    """Both programs start, and a request is answered, recorded and replayed by the same command."""
    command = [str(python), "-m", "ostinato.cli", "serve", "--engine", "scripted", *ANYWHERE, *UNTESTED]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as serve:
        assert serve.stdout is not None
        lines = list(iter(serve.stdout.readline, "\n"))
        [target] = [line.split()[-1] for line in lines if line.startswith("  gRPC ")]
        made = run(python, tmp_path, "-t", target, "generate", "hello", "--seed", "1", "--json")
        replayed = run(python, tmp_path, "-t", target, "replay", "1")
        serve.terminate()
        serve.stdout.read()

    assert (made.returncode, replayed.returncode, serve.returncode) == (0, 0, 0), (made, replayed)
    assert "1 match" in replayed.stdout + replayed.stderr
