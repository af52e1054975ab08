"""A real OpenAI gateway before a sidecar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.request
from types import TracebackType
from typing import Any, Self

from tests.pair import Program, held_port
from tests.web import read

START_SECONDS = 60.0


class Gateway(Program):
    """`smg launch` in front of `target`; a context, which kills it: told to stop, it would wait for a load balancer that is not
    there. Its retries are off: each would be a request of its own, with numbers of its own."""

    def __init__(self, target: str, port: int = 0) -> None:
        self._held = held_port(), held_port()
        own, metrics = (held.getsockname()[1] for held in self._held)
        self.address = f"127.0.0.1:{port or own}"
        self.url = f"http://{self.address}/v1"
        args = ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--worker-urls", f"grpc://{target}"]
        args += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
        super().__init__("smg", ["launch", *args, "--disable-retries", "--log-level", "warn"])

    def model(self, seconds: float = START_SECONDS) -> str:
        """The name of what it offers, once it has its tokenizer too."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                read(f"http://{self.address}/readiness")
                return str(json.loads(read(f"{self.url}/models"))["data"][0]["id"])
            time.sleep(0.02)
        raise AssertionError("the gateway was never ready:\n" + "\n".join(self.lines[-40:]))

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        for held in self._held:
            held.close()
        if kind is not None:
            sys.stderr.write("---- gateway\n" + "\n".join(self.lines[-30:]) + "\n")
