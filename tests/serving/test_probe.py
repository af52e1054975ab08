"""The probe, as a command against real servers and against what is none."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serving.server import Server, probe
from serving.settings import field

from tests.ostinato.echo import NAME, Echo, register

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a program listens."""

    listen: tuple[str, ...] = field(("unix:/default.sock",), "addresses")
    health_listen: str = field("", "for probes")


async def asked(address: str, *argv: str) -> int:
    """The exit code; the probe blocks, so it has a thread."""
    return await asyncio.to_thread(probe, Settings, "sidecar", ["--address", address, *argv], {})


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_probe_says_what_health_says(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 while the service it names serves, 1 while it does not, and one line with the status each time."""
    server = Server(
        ["127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s.sock"],
        registry=CollectorRegistry(),
    )
    server.add(register, Echo(), NAME)
    await server.start()
    address = server.addresses[0]

    assert await asked(address) == 0
    assert await asked(address, NAME) == 1
    await server.set_health(NAME, serving=True)
    assert await asked(address, NAME) == 0
    assert await asked(address, "no.such.Service") == 1
    await server.stop(grace=0)
    assert await asked(address) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["SERVING:", "NOT_SERVING:", "SERVING:", "NOT_FOUND", "UNAVAILABLE"]
    assert all(address in line for line in lines)


def test_a_server_that_does_not_answer_fails_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that accepts and says nothing costs the timeout and no more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        assert probe(Settings, "service", ["--address", address, "--timeout-seconds", "0.2"], {}) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "unix:/default.sock"),
        ({"OSTINATO_SERVICE_LISTEN": "unix:/nowhere.sock, 127.0.0.1:1"}, "unix:/nowhere.sock"),
        (
            {"OSTINATO_SERVICE_LISTEN": "127.0.0.1:1", "OSTINATO_SERVICE_HEALTH_LISTEN": "unix:/health.sock"},
            "unix:/health.sock",
        ),
        ({"OSTINATO_SERVICE_LISTEN": "unix:/nowhere.sock", "OSTINATO_SERVICE_HEALTH_LISTEN": ""}, "unix:/nowhere.sock"),
        ({"OSTINATO_SIDECAR_LISTEN": "unix:/other.sock", "OSTINATO_SERVICE_ODD": "1"}, "unix:/default.sock"),
    ],
)
def test_the_address_is_the_programs_own(environ: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The environment says where to ask, by the port for probes or the first address; nothing else there matters."""
    assert probe(Settings, "service", [], environ) == 1

    assert capsys.readouterr().out.endswith(f"service at {expected}\n")


def test_the_address_may_be_in_the_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that the environment or --config names says where to ask too, below the environment."""
    file = tmp_path / "ostinato.toml"
    file.write_text('[service]\nlisten = ["unix:/file.sock", "127.0.0.1:1"]\nodd = 1\n')
    named = {"OSTINATO_SERVICE_CONFIG": str(file)}

    assert probe(Settings, "service", [], named) == 1
    assert probe(Settings, "service", ["--config", str(file)], {}) == 1
    assert probe(Settings, "service", [], {**named, "OSTINATO_SERVICE_LISTEN": "unix:/nowhere.sock"}) == 1
    asked = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert asked == ["unix:/file.sock", "unix:/file.sock", "unix:/nowhere.sock"]
    with pytest.raises(SystemExit, match="2"):
        probe(Settings, "service", ["--config", str(tmp_path / "none")], {})


@pytest.mark.parametrize("argv", [["--timeout-seconds", "0"], ["--timeout-seconds", "nan"], ["--adress", "x"], ["a", "b"]])
def test_a_bad_flag_is_not_bad_health(argv: list[str]) -> None:
    """A probe that was asked wrongly exits with 2, as the programs do."""
    with pytest.raises(SystemExit) as ended:
        probe(Settings, "sidecar", argv, {})

    assert ended.value.code == 2


@pytest.mark.parametrize("program", ["service", "sidecar"])
async def test_both_programs_have_it(program: str) -> None:
    """`python -m PROGRAM probe` asks, and starts nothing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", program, "probe", "--address", "127.0.0.1:1",
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/proto"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()

    assert (process.returncode, errors) == (1, b"")
    assert out.startswith(b"UNAVAILABLE")
