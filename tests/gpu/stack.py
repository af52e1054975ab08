"""The programs, started as a user would."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from ostinato.client import Client

from tests.gpu.fronts import Front, ServiceFront, SidecarFront
from tests.hop import proved
from tests.pair import ROOT, Program

START_SECONDS = 240.0
MESSAGE_BYTES = 256 << 20
OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]


@dataclass
class Stack:
    """Running programs."""

    front: Front
    service: Program
    started_seconds: float
    """Until the service was serving."""
    metrics_port: int
    start_service: Callable[[], Program]
    """Starts another service in place of the first."""
    start_sidecar: Callable[[], Program]
    sidecar: Program | None = None
    public: str = ""
    """The sidecar's address."""

    def processor_seconds(self) -> dict[str, float]:
        """Of processor time so far, by program, this one included."""
        programs = {"service": self.service, **({"sidecar": self.sidecar} if self.sidecar is not None else {})}
        return {name: _processor_seconds(program.pid) for name, program in programs.items()} | {"client": time.process_time()}


def python_path() -> str:
    """For a Python that finds our programs and what this one finds."""
    return os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")])


async def python(*arguments: str, stderr: int = asyncio.subprocess.STDOUT) -> asyncio.subprocess.Process:
    """`python ARGUMENTS`, in the checkout."""
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()},
        stdout=asyncio.subprocess.PIPE, stderr=stderr,
    )  # fmt: skip


@asynccontextmanager
async def running(
    model: Path | None,
    state: Path,
    *flags: str,
    sidecar: bool = False,
    env: Mapping[str, str] | None = None,
    engine: str = "turbomind",
    start_seconds: float = START_SECONDS,
) -> AsyncIterator[Stack]:
    """A service with this model, and a sidecar before it if wanted. State is kept from one call to the next."""
    full_env = {"PYTHONPATH": python_path(), **(env or {})}
    with tempfile.TemporaryDirectory(prefix="ostinato-gpu-") as folder:
        address = f"unix:{folder}/engine.sock"
        began = time.monotonic()
        programs: list[Program] = []

        def start_service() -> Program:
            arguments = ["--engine", engine, "--listen", address, "--metrics", "127.0.0.1:0"]
            arguments += ["--model", str(model)] if engine != "scripted" and model is not None else []
            arguments += ["--state-dir", str(state), "--message-bytes-max", str(MESSAGE_BYTES), "--log-format", "json"]
            programs[:1] = [Program("service", [*arguments, *flags], full_env)]
            return programs[0]

        def start_sidecar() -> Program:
            arguments = ["--engine", address, "--journal", f"{folder}/journal.sqlite", "--metrics", "127.0.0.1:0"]
            arguments += ["--listen", f"unix:{folder}/public.sock", "--log-format", "json"]
            arguments += ["--audit-rate", "0", "--canary-seconds", "0"]  # no other runs
            programs[1:] = [Program("sidecar", arguments, full_env)]
            return programs[1]

        start_service()
        try:
            await asyncio.to_thread(programs[0].wait_for, "serving", start_seconds)
            seconds = time.monotonic() - began
            port = int(str(programs[0].wait_for("metrics")["port"]))
            if sidecar:
                start_sidecar()
                await asyncio.to_thread(programs[1].wait_for, "engine connected", 60.0)
                public = f"unix:{folder}/public.sock"
                async with Client(public, max_response_bytes=MESSAGE_BYTES) as client:
                    yield Stack(
                        SidecarFront(client), programs[0], seconds, port, start_service, start_sidecar, programs[1], public
                    )
            else:
                async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                    front = ServiceFront(await proved(channel, address))
                    yield Stack(front, programs[0], seconds, port, start_service, start_sidecar)
            code = await asyncio.to_thread(programs[-1].stop) if sidecar else 0
            code = code or await asyncio.to_thread(programs[0].stop)
            if code:
                _tell(programs, f"the programs ended with {code}")
        except BaseException:
            _tell(programs, "what the programs said")
            raise
        finally:
            for program in programs:
                if program.running:
                    program.kill()


def _processor_seconds(pid: int) -> float:
    """In user and system mode, all threads: fields 14 and 15 of the process's stat, counted from the command's end."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tell(programs: Sequence[Program], title: str) -> None:
    """Prints the ends of their logs, without the lines about our own streams."""
    sys.stderr.write(f"---- {title}\n")
    for program in programs:
        lines = [line for line in program.lines if '"service.stream"' not in line]
        sys.stderr.write("\n".join([f"-- {program.name}", *lines[-60:]]) + "\n")
