"""requirements/install.py: what it says where it cannot install."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "install.py"


@pytest.fixture(name="install")
def _install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_is_refused_with_a_newer_one(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line names the version and the command that goes on; a name that does not run is passed over."""
    for name, code in (("python3.14", 1), ("python3.12", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(install.Failed) as refused:
        install.check_python((3, 9, 2))
    assert str(refused.value) == (
        f"Python 3.11 or newer is needed, and {sys.executable} is 3.9; give the same command with PYTHON=python3.12"
    )


def test_this_python_will_do(install: ModuleType) -> None:
    """It is one that the project supports."""
    install.check_python(sys.version_info)


def test_no_index_is_said_last(tmp_path: Path) -> None:
    """Where no package index can be reached the last line says so and what helps; exit code 1."""
    there = tmp_path / "new" / "bin"
    there.mkdir(parents=True)
    (there / "pip").touch()  # it would make an environment, which takes longer than all else here
    (there / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (there / "python").chmod(0o755)
    unreachable = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))} | unreachable
    command = [sys.executable, str(SCRIPT), str(tmp_path / "new"), "nothing much", "no-such-package"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, f"installing nothing much into {tmp_path}/new\n")
    [line] = done.stderr.splitlines()
    assert line.startswith("cannot install: no package index can be reached (")
    assert line.endswith("): connect to the network, or name an index in PIP_INDEX_URL")


def test_what_pip_says_is_told_in_a_line(install: ModuleType) -> None:
    """A full disk, and anything else: pip's last error."""
    full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"

    assert install.why(["Collecting a", full]) == f"the disk is full: {full}"
    assert install.why(["ERROR: a and b conflict", "hint"]) == "ERROR: a and b conflict"
