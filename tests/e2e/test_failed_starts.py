"""Starts that fail: the last line, or the last record of a JSON log, gives the reason."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from ostinato import install_hint
from serving.settings import read

import service.__main__
import service.config
import sidecar.__main__
import sidecar.config
from tests.pair import ROOT, python
from tests.service.llama_kit import LACKING

SERVICE = "service --metrics= --listen unix:{folder}/s.sock --state-dir {folder}/state"
PROGRAMS = {
    "SERVICE": f"{SERVICE} --engine scripted",
    "LLAMA": SERVICE,
    "TURBOMIND": f"{SERVICE} --engine turbomind",
    "SIDECAR": "sidecar --metrics= --listen 127.0.0.1:0 --journal {folder}/journal.sqlite",
}
"""A flag that is given twice is what it was given last."""


class Failure(NamedTuple):
    """A start that cannot succeed, as failed_starts.txt has it."""

    line: str
    """The program and its flags."""
    said: str
    code: int

    def of(self, names: Mapping[str, object]) -> tuple[list[str], str]:
        """Program and flags, and what is said, with these names."""
        program, _, flags = self.line.partition(" ")
        line, said = (
            re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), text)
            for text in (f"{PROGRAMS.get(program, program)} {flags}", self.said)
        )
        return line.split(), said


def listed(*parts: str) -> pytest.MarkDecorator:
    """One test for each failure of these parts of failed_starts.txt."""
    text = Path(__file__).with_name("failed_starts.txt").read_text()
    failures = [
        Failure(line, said, 2 if part == "settings" else 1)
        for part in parts
        for each in re.findall(rf"^\[{part}\]\n([^\[]+)", text, re.MULTILINE)[0].strip().split("\n\n")
        for line, said in [each.split("\n")]
    ]
    return pytest.mark.parametrize("failure", failures, ids=lambda failure: failure.line)


AS_ANYBODY = (
    "import ctypes, os, sys; [ctypes.CDLL(None).prctl(24, right, 0, 0, 0) for right in (1, 2, 10)]; "
    "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])"
)
"""Drops root's capabilities to ignore file modes and to use low ports, then runs the program."""


@pytest.fixture(scope="module", name="names")
def _names() -> Iterator[dict[str, object]]:
    folder = Path(tempfile.mkdtemp(prefix="of"))  # short: a socket's path has 107 bytes
    (folder / "text").write_text("nothing of use\n")
    (folder / "text").chmod(0o600)
    (folder / "closed").mkdir(mode=0o500)
    pair = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 3) + b"odd"
    (folder / "odd.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    if not LACKING:
        from service.engines.llama.model import packaged_model

        with packaged_model().open("rb") as model:
            (folder / "head.gguf").write_bytes(model.read(5_000))
            model.seek(0)
            (folder / "cut.gguf").write_bytes(model.read(8_000_000))
    (folder / "secret").write_bytes(bytes(range(64, 96)))
    (folder / "secret").chmod(0o600)
    locked = sqlite3.connect(folder / "locked", isolation_level=None)
    locked.execute("CREATE TABLE t (c)")
    locked.execute("BEGIN EXCLUSIVE")
    with socket.socket(socket.AF_UNIX) as taken, socket.create_server(("127.0.0.1", 0)) as port, database() as refusing:
        taken.bind(f"{folder}/taken")
        taken.listen()
        yield {
            "folder": folder,
            "port": port.getsockname()[1],
            "database": refusing,
            "long": "x" * 107,
            "turbomind": install_hint("turbomind"),
        }
    locked.close()
    shutil.rmtree(folder)


@contextmanager
def database() -> Iterator[int]:
    """The port of a PostgreSQL server that takes no password."""
    said = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "me"\0\0'

    def refuse() -> None:
        with suppress(OSError):
            while True:
                line, _ = server.accept()
                with line:
                    line.recv(4096)
                    line.sendall(b"E" + struct.pack("!I", 4 + len(said)) + said)

    with socket.create_server(("127.0.0.1", 0)) as server:
        refusing = threading.Thread(target=refuse)
        refusing.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        refusing.join()


@pytest.fixture(name="undisturbed")
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores what a program sets for its whole process."""
    root, threshold, interval = logging.getLogger(), gc.get_threshold(), sys.getswitchinterval()
    handlers, level = root.handlers, root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for name in [name for name in os.environ if name.startswith("OSTINATO_")]:
        monkeypatch.delenv(name)
    yield
    root.handlers, root.level = handlers, level
    gc.set_threshold(*threshold)
    gc.unfreeze()
    sys.setswitchinterval(interval)
    for number, handler in signals.items():
        signal.signal(number, handler)


def check(failure: Failure, names: Mapping[str, object], code: object, errors: str) -> None:
    """Exit code, and a last line that is the reason; earlier lines are those of every start."""
    (program, *_), said = failure.of(names)
    *before, last = (line for line in errors.splitlines() if "high-water mark is on the journal's file system" not in line)
    name, _, reason = last.partition(": ")

    assert (code, name) == (failure.code, program), errors
    assert reason == said or (said.endswith("…") and reason.startswith(said[:-1])), errors
    assert {line.split()[1] for line in before} <= {"INFO"}, errors
    assert "Traceback" not in errors and "tiger" not in errors, errors


@pytest.fixture(name="fails")
def _fails(
    names: Mapping[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undisturbed: None
) -> Callable[[Failure], None]:
    """Starts the program in this process, and checks how it fails."""

    def start(failure: Failure) -> None:
        (program, *flags), _ = failure.of(names)
        monkeypatch.setattr(sys, "argv", [program, "--log-format", "human", *flags])
        main = service.__main__.main if program == "service" else sidecar.__main__.main
        with pytest.raises(SystemExit) as exited:
            sys.exit(main())
        check(failure, names, exited.value.code, capsys.readouterr().err)

    return start


@listed("settings", "starts")
def test_a_start_that_fails_says_why(failure: Failure, fails: Callable[[Failure], None]) -> None:
    """The last line names the flag or file and the cause, once, where a setting cannot be and where all settings are good. One
    record of a JSON log says the same: tests/serving/test_program.py, test_settings.py."""
    fails(failure)


@pytest.mark.llama
@pytest.mark.skipif(bool(LACKING), reason=f"without {', '.join(LACKING)}")
@listed("models")
def test_a_model_that_cannot_be_loaded_says_why(failure: Failure, fails: Callable[[Failure], None]) -> None:
    """What is wrong with a model's file is said in llama.cpp's own words where it is llama.cpp that finds it."""
    fails(failure)


@listed("processes")
def test_a_process_that_fails_says_why(failure: Failure, names: Mapping[str, object]) -> None:
    """The same for real processes of an ordinary user: no library adds output."""
    (program, *flags), _ = failure.of(names)
    done = python("-c", AS_ANYBODY, program, "--log-format", "human", *flags)

    check(failure, names, done.returncode, done.stderr)


LOW = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(LOW <= 1, reason="every port is allowed for all users here")
def test_a_low_port_is_refused_by_the_kernel(names: dict[str, object]) -> None:
    """A port that only root may have is named, with the kernel's reason."""
    line = "SERVICE --engine-secret {folder}/secret --listen 127.0.0.1:1"
    test_a_process_that_fails_says_why(Failure(line, "--listen: cannot listen on 127.0.0.1:1: Permission denied", 1), names)


def test_serve_lists_the_engines() -> None:
    """`ostinato serve`, and with it `make up`, lists the engines where it is given another."""
    done = python("-m", "ostinato.cli", "serve", "--engine", "vllm")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("'vllm' is not one of llama, turbomind, scripted")


def test_the_documented_file_is_one() -> None:
    """The settings file in docs/operations.md is taken by both programs, each its own table."""
    text = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(r"```toml\n(\[service\].*?)```", text, re.DOTALL)
    assert found is not None
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(found[1])
        file.flush()
        served = read(service.config.Settings, "service", ["--config", file.name], {})[0]
        ordered = read(sidecar.config.Settings, "sidecar", ["--config", file.name], {})[0]

    assert (served.runs, served.listen) == (16, ("unix:/run/ostinato/engine.sock",))
    assert (ordered.audit_rate, ordered.vllm_face) == (0.05, True)
