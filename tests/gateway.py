"""A real OpenAI gateway before a sidecar."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SMG = Path(sys.executable).parent / "smg"
START_SECONDS = 60.0


class Gateway:
    """`smg launch` in front of `target`, a context. Its retries are off: each would be a
    request of its own, with numbers of its own."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it lives as long as this
        command = [SMG, "launch", "--host", "127.0.0.1", "--port", str(self.port), "--worker-urls", f"grpc://{target}"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--disable-retries", "--log-level", "warn"]
        self._process = subprocess.Popen(list(map(str, command)), stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float = START_SECONDS) -> str:
        """The model's name, once the gateway has its tokenizer too."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self._get("/readiness")
                return str(self._get("/v1/models")["data"][0]["id"])
            time.sleep(0.02)
        raise AssertionError(f"the gateway was never ready:\n{self.log()}")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return json.load(answer)

    def log(self) -> str:
        """Its last lines."""
        self._log.seek(0)
        return "".join(self._log.readlines()[-40:])

    def stop(self) -> None:
        """At once: told to stop, it would wait for a load balancer that is not there."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if kind is not None:
            sys.stderr.write(f"---- gateway\n{self.log()}\n")
        self._log.close()


def free_port() -> int:
    """One that is free now; the gateway does not say which it took, so it has to be told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
