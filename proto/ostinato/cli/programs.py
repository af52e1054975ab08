"""Where the two programs are, and how to start one.

In a checkout they are the folders `service` and `sidecar` at its top; the wheel has the same folders below `ostinato/programs`,
so that no package with so common a name lands in site-packages. Either way they are started as `python -m service` with the
folder that holds them on PYTHONPATH, and are never imported here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import typer

import ostinato
from ostinato.cli import show

_SERVING = ("cryptography", "grpc_health", "grpc_reflection", "prometheus_client")
NEEDS: Mapping[str, Sequence[str]] = {
    "service": (*_SERVING, "msgspec"),
    "sidecar": (*_SERVING, "apsw", "msgspec"),
    "smg": ("smg", "smg_grpc_proto"),
}
"""Modules that the extras of pyproject.toml bring, by the program that cannot start without them."""
EXTRAS: Mapping[str, str] = {"service": "cpu", "sidecar": "cpu", "smg": "gateway"}
"""What to install where one of those is missing."""


class Unusable(Exception):
    """A program cannot be started here. The message is one line and says what to do."""


def paths(name: str) -> list[str]:
    """The folders in which a child finds the program, and this package beside it. Raises Unusable."""
    package = Path(ostinato.__file__).parent
    places = {
        package / "programs": (),  # the wheel
        package.parents[1]: ("proto",),  # a checkout
        package.parent: (),  # an image
    }
    for place, beside in places.items():
        if (place / name / "__main__.py").is_file():
            return [str(place), *(str(place / folder) for folder in beside)]
    raise Unusable(f"{name} is not beside {package}: install the wheel, or use a checkout")


def check(name: str) -> None:
    """Raises Unusable if a package is missing without which the program cannot start."""
    for module in NEEDS[name]:
        if _missing(module):
            who = "--gateway" if name == "smg" else name
            raise Unusable(f"{who} needs {module}, which is not installed: pip install 'ostinato[{EXTRAS[name]}]'")


def environment(*names: str) -> dict[str, str]:
    """This process's variables and those by which a child finds these programs, and nothing in its working directory instead.
    Raises Unusable."""
    listed = [path for name in names for path in paths(name)]
    listed += [inherited] if (inherited := os.environ.get("PYTHONPATH")) else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(listed)), "PYTHONSAFEPATH": "1"}


def command(name: str, arguments: Sequence[str]) -> list[str]:
    """What starts a program with these arguments."""
    return [sys.executable, "-m", name, *arguments]


def become(name: str, arguments: Sequence[str]) -> NoReturn:
    """This process goes on as the program: its signals and its exit code are the program's own."""
    try:
        check(name)
        variables = environment(name)
    except Unusable as error:
        show.note(f"ostinato: {error}")
        raise typer.Exit(1) from None
    os.execve(sys.executable, command(name, arguments), variables)  # noqa: S606  # no shell is meant


def service(context: typer.Context) -> None:
    """Runs the service alone; --help lists its settings."""
    become("service", context.args)


def sidecar(context: typer.Context) -> None:
    """Runs the sidecar alone, or one of its commands."""
    become("sidecar", context.args)


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of the package that it lies in
        return True
