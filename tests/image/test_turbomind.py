"""The image for GPUs, built and asked what can be asked of it without one: `make image-check-turbomind`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.image.pairs import HARDENED, SHELLS
from tests.image.podman import base, build, download, have_tools, podman, run

pytestmark = [pytest.mark.image, pytest.mark.turbomind, pytest.mark.timeout(0)]

FOUND = """
import pathlib, shutil
from service.engines.turbomind import overrides
path = overrides.build(pathlib.Path("/tmp/none"))
print(path.parent, sum(overrides.Overrides(path).counters.calls.values()), *map(shutil.which, overrides.COMPILERS))
"""
BOUND = """
import pathlib
from service.engines.turbomind import overrides
loaded = overrides.Overrides(overrides.build(pathlib.Path("/tmp/none")))
import torch, lmdeploy.turbomind
print(lmdeploy.turbomind.is_available())
"""

LIBRARY = """
import importlib.util, pathlib
[found] = (pathlib.Path(importlib.util.find_spec("lmdeploy").origin).parent / "turbomind").glob("_turbomind*.so")
print(found)
"""


@pytest.fixture(name="image", scope="module")
def _image() -> str:
    have_tools()
    download("service-turbomind")
    return build("service-turbomind", base())


def inside(image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A command in a container as a cluster has it, in which no shell can be started."""
    hardened = ["podman", "run", "--rm", *HARDENED, *SHELLS, *options, "--env=PYTHONPATH=/app", "--entrypoint=python"]
    return run(*hardened, image, *command, check=False)


def test_it_is_no_larger_than_it_must_be(image: str) -> None:
    """What LMDeploy asks for is most of it."""
    size = int(podman("image", "inspect", image, "--format={{.Size}}"))
    print(f"{image}: {size / 1e9:.1f} GB")

    assert size < 10e9


def test_it_brings_its_overrides(image: str) -> None:
    """They were compiled when it was built, are found beside their source and load; there is no compiler."""
    assert inside(image, "-c", FOUND).stdout.split() == ["/app/service/engines/turbomind", "0", "None", "None", "None"]


def test_it_says_what_it_lacks(image: str) -> None:
    """Without a model it ends and names the flag; its health command says that nobody is there."""
    ended = inside(image, "-m", "service", "--listen=unix:/tmp/e/engine.sock", "--state-dir=/tmp/s")

    assert (ended.returncode, "--model" in ended.stderr.splitlines()[-1]) == (1, True)
    assert inside(image, "-m", "service", "probe").returncode == 1


def test_turbomind_is_bound_to_the_overrides(image: str, tmp_path: Path) -> None:
    """With something in the driver's place TurboMind's library finds CUDA in the wheels and our cublasGemmEx; torch, of another
    CUDA, keeps its own."""
    (tmp_path / "cuda.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in of_the_driver(image)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    tmp_path.chmod(0o755)
    options = (
        f"--volume={tmp_path}:/driver:ro",
        "--env=LD_LIBRARY_PATH=/driver",
        "--env=LD_BIND_NOW=1",
        "--env=LD_DEBUG=bindings",
    )
    done = inside(image, "-c", BOUND, options=options)
    bound = dict(re.findall(r"binding file (\S+) \[0\] to (\S+) \[0\]: normal symbol `cublasGemmEx'", done.stderr))
    by_name = {Path(of).name.partition(".")[0]: Path(to).name for of, to in bound.items()}

    assert done.stdout == "True\n"
    assert by_name["_turbomind"].startswith("overrides-")
    assert by_name["libtorch_cuda"].startswith("libcublas.so.")


def of_the_driver(image: str) -> list[str]:
    """The functions of the driver that TurboMind's library wants."""
    [path] = inside(image, "-c", LIBRARY).stdout.split()
    folder = podman("image", "mount", image)
    try:
        symbols = run("nm", "--dynamic", "--undefined-only", f"{folder}{path}").stdout
    finally:
        podman("image", "unmount", image)
    return re.findall(r" U (cu[A-Z]\w+)$", symbols, re.MULTILINE)
