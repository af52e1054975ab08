"""Real processes for tests, benchmarks and the demo: a service and a sidecar, on sockets and files of their own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.web import read

ROOT = Path(__file__).parent.parent
START_SECONDS = 180.0


def _shared_folder(variable: str) -> Path:
    """A folder that this process makes and removes, and that those which it starts find by this variable."""
    if variable not in os.environ:
        os.environ[variable] = tempfile.mkdtemp(prefix="ostinato-proofs-")
        atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)
    return Path(os.environ[variable])


PROOFS = _shared_folder("PROOFS_OF_TESTS")
"""Proofs of the self-test, shared by all pairs of a run of the tests, as by successive starts of a service."""


def held_port() -> socket.socket:
    """A socket that reserves a port while it is open; a program that is given the number can listen there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def samples(port: int) -> dict[str, float]:
    """What /metrics at this port of the machine says, by name and labels as written."""
    text = read(f"http://127.0.0.1:{port}/metrics")
    return {name: float(value) for name, value in re.findall(r"^([a-z]\S*(?: \S+=.*})?) (\S+)$", text, re.MULTILINE)}


def environment(root: Path = ROOT, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without settings of ours; Python finds the programs of this checkout."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OSTINATO_")}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(root), str(root / "proto")]), **(more or {})}


def python(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments and this input, run to its end."""
    line, around = [sys.executable, *args], environment(more=env)
    return subprocess.run(line, cwd=ROOT, env=around, input=stdin, capture_output=True, text=True, timeout=60, check=False)


class Program:
    """`python -m NAME`, its log kept line by line."""

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        root: Path = ROOT,
        *,
        descriptors: int | None = None,
    ) -> None:
        """`descriptors`: as by `ulimit -n`; None: those of this process."""
        self.name = name
        limited = [] if descriptors is None else ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh"]
        self.lines: list[str] = []
        self._records: list[dict[str, object]] = []
        self._process = subprocess.Popen(
            [*limited, sys.executable, "-m", name, *args],
            cwd=root,
            env=environment(root, env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):  # TurboMind also prints lines that are numbers
                        self._records.append(record)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def metrics_port(self) -> int:
        return int(str(self.wait_for("metrics")["port"]))

    def page(self, **headers: str) -> str:
        return read(f"http://127.0.0.1:{self.metrics_port}/metrics", **headers)

    def records(self) -> list[dict[str, object]]:
        """The log's JSON lines."""
        return list(self._records)

    def said(self, message: str) -> list[dict[str, object]]:
        """The log records with this message."""
        return [record for record in self.records() if record.get("message") == message]

    def wait_for(self, message: str, seconds: float = START_SECONDS, *, nth: int = 1) -> dict[str, object]:
        """The nth log record with this message; fails loudly with the log if the program ends or the time runs out."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(said := self.said(message)) >= nth:
                return said[nth - 1]
            if not self.running:
                self._reader.join()
                break
            time.sleep(0.01)
        raise AssertionError(f"{self.name} never said {message!r}:\n" + "\n".join(self.lines[-40:]))

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 40.0) -> int:
        """The exit code."""
        if self.running:
            self._process.send_signal(number)
        code = self._process.wait(seconds)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


class Pair:
    """A service and a sidecar. A context manager: at its end, programs that run are killed and the files are removed."""

    def __init__(
        self,
        *,
        service: Sequence[str] = (),
        sidecar: Sequence[str] = (),
        engine: str = "scripted",
        state: Path | None = None,
        root: Path = ROOT,
    ) -> None:
        """`root`: the checkout whose programs they are."""
        self.folder = Path(tempfile.mkdtemp(prefix="ostinato-"))
        self.descriptors: int | None = None
        """As by `ulimit -n`."""
        self.env: dict[str, str] = {}
        """Additional environment variables of both programs."""
        self._root = root
        self._state = state or self.folder / "state"
        if state is None:
            self._state.mkdir()
            (self._state / "proofs").symlink_to(PROOFS)
        self.engine_address = f"unix:{self.folder}/engine.sock"
        self._service_args = ["--engine", engine, *service]
        self._sidecar_args = list(sidecar)
        self.programs: list[Program] = []
        """All that were ever started."""
        self._running: dict[str, Program] = {}
        self._port = held_port()  # also while one sidecar is gone and the next is not there yet
        self.target = ""

    @property
    def service(self) -> Program:
        """The one that was started last."""
        return self._running["service"]

    @property
    def sidecar(self) -> Program:
        return self._running["sidecar"]

    def start_service(self, *extra: str) -> Program:
        """Running, but not necessarily ready."""
        return self._start(
            "service",
            ["--listen", self.engine_address, "--metrics", "127.0.0.1:0", "--state-dir", str(self._state)],
            [*self._service_args, *extra],
        )

    def start_sidecar(self, *extra: str) -> Program:
        """Listening; `target` is its address. Second runs are off, unless its flags say otherwise."""
        args = ["--engine", self.engine_address, "--journal", f"{self.folder}/journal.sqlite", "--metrics", "127.0.0.1:0"]
        args += ["--listen", self.target or f"127.0.0.1:{self._port.getsockname()[1]}", "--journal-reserve-bytes", str(1 << 20)]
        args += ["--audit-rate", "0", "--canary-seconds", "0"]
        sidecar = self._start("sidecar", args, [*self._sidecar_args, *extra])
        self.target = str(sidecar.wait_for("listening")["addresses"]).split(",")[0]
        return sidecar

    def replace_service(self, *extra: str) -> None:
        """Kill the service and start another one, with these flags too, until the sidecar is connected to it."""
        connections = len(self.sidecar.said("engine connected"))
        self.service.kill()
        self.start_service(*extra)
        self.sidecar.wait_for("engine connected", nth=connections + 1)

    def stop(self) -> None:
        """The sidecar drains, then the service."""
        for name in ("sidecar", "service"):
            if name in self._running:
                self._running[name].stop()

    def _start(self, name: str, args: list[str], extra: list[str]) -> Program:
        program = self._running[name] = self._program(name, [*args, "--log-format", "json", *extra])
        self.programs.append(program)
        return program

    def _program(self, name: str, args: list[str]) -> Program:
        return Program(name, args, self.env, self._root, descriptors=self.descriptors)

    def start(self) -> Self:
        """Both, connected."""
        self.start_service()
        self.start_sidecar().wait_for("engine connected")
        return self

    def metrics(self, program: Program | None = None) -> dict[str, float]:
        """Samples of a program's /metrics by name and labels, as written: `ostinato_comparisons_total{kind="twin"}`."""
        return samples((program or self._running.get("sidecar") or self.programs[0]).metrics_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for program in self.programs:
            if program.running:
                program.kill()
        if kind is not None:
            for program in self.programs:
                sys.stderr.write(f"---- {program.name}\n" + "\n".join(program.lines[-30:]) + "\n")
        self._port.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running_pair(**kwargs: Sequence[str]) -> Iterator[Pair]:
    """A connected pair."""
    with Pair(**kwargs) as pair:  # type: ignore[arg-type]
        yield pair.start()
