"""This machine: LMDeploy, its library, the GPU and the driver. Torch is imported last, because it loads cuBLAS, and the
overrides must be loaded before that."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostinato import install_hint

from service.engines.base import EngineUnusable

VERSIONS = ((0, 18), (0, 19))
"""Of LMDeploy: the first, and the one above. The overrides were tested with these."""
INSTALL = install_hint("turbomind")
ELSE = "without a GPU use --engine llama"
_DRIVER = re.compile(r"\s(\d+\.\d+(?:\.\d+)?)\s")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first device."""

    name: str
    capability: str
    """Such as 9.0."""
    driver: str


def module(name: str) -> Any:
    """Imports a third-party module. Raises EngineUnusable."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EngineUnusable(f"--engine turbomind needs {name}: {error}; {INSTALL}") from error


def lmdeploy_version() -> str:
    """Raises EngineUnusable if LMDeploy is missing, or of a version that this engine does not support."""
    try:
        version = importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        raise EngineUnusable(f"--engine turbomind needs lmdeploy: {INSTALL}; {ELSE}") from None
    least, below = VERSIONS
    if not least <= tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < below:
        wanted = f">={least[0]}.{least[1]},<{below[0]}.{below[1]}"
        raise EngineUnusable(f"--engine turbomind was made for lmdeploy{wanted}, found {version}: {INSTALL}")
    return version


def turbomind_library() -> Path:
    """The path of TurboMind's shared library, without loading it. Raises EngineUnusable."""
    spec = importlib.util.find_spec("lmdeploy")
    folders = [Path(folder) / "turbomind" for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("_turbomind*.so"))]
    if not found:
        raise EngineUnusable(f"--engine turbomind: lmdeploy is there, but not its TurboMind library: {INSTALL}")
    return found[0]


def gpu(wanted: int) -> Gpu:
    """Imports torch. Raises EngineUnusable if there are fewer CUDA devices than wanted."""
    cuda = module("torch").cuda
    if not cuda.is_available():
        raise EngineUnusable(f"--engine turbomind needs a CUDA device, and torch finds none; {ELSE}")
    if (found := cuda.device_count()) < wanted:
        raise EngineUnusable(f"--tp is {wanted}, and torch finds {found} CUDA devices: lower it")
    major, minor = cuda.get_device_capability(0)
    return Gpu(cuda.get_device_name(0), f"{major}.{minor}", _driver())


def mapped(part: str) -> str:
    """Names of the loaded libraries whose names contain this."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return " ".join(sorted({Path(line.split()[-1]).name for line in lines if "/" in line and part in line.rsplit("/", 1)[-1]}))


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = _DRIVER.search(text)
    return found.group(1) if found else "unknown"
