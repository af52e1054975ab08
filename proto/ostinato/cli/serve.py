"""`ostinato serve`, `service` and `sidecar`: starts the programs.

`serve` runs service and sidecar, and with --gateway an OpenAI gateway, as child processes until a signal. `service` and
`sidecar` replace this process by the program.

A child has a process group of its own, so that a Ctrl-C at the terminal reaches only this process, which then stops the
children in order. If this process dies, the kernel sends them SIGTERM.

Modules that only a running `serve` needs are imported in its functions: the other commands do not wait for them.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import ostinato
from ostinato import install_hint
from ostinato.cli import show
from ostinato.cli.session import FAILED, INTERRUPTED, USAGE, usage, wrong
from ostinato.signature import new_key, signer_of

STATE = Path(".run")
"""The programs' default for journal and proofs."""
SIGNING_KEY = "signing.pem"
"""In the state folder."""
LISTEN = "127.0.0.1:7001"
"""The sidecar's default, and the client's."""
GATEWAY_PORT = 8000

LOG_BYTES_MAX = 16 << 20
"""Of a log file; one older file is kept."""
CAUSES_MAX = 20
"""Lines that may explain why a program ended."""
SERVICE_STOP_SECONDS = 10.0
"""Once the sidecar has stopped, the service has no work left."""
CUT_SHORT_SECONDS = 2.0
"""For a program to stop after another has ended by itself."""
GATEWAY_POLL_SECONDS = 0.05
SILENCE_SECONDS = 2.0
"""Before the note that loading takes a while. Errors at once come without it."""
TAKEN, REMEDY = "Address already in use", "stop what listens there, or choose another"
_CHUNK_BYTES = 1 << 16
_LAST_LINES_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_SOCKET_FOLDER_BYTES_MAX = 80
"""Keeps the socket's path below the kernel's limit of 107."""

ENGINES = ("llama", "turbomind", "scripted")


def _engine(name: str | None) -> str | None:
    if name is not None and name not in ENGINES:
        raise wrong(f"{name!r} is not one of {', '.join(ENGINES)}")
    return name


# The commands.
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(help="GGUF file (llama) or Hugging Face folder (turbomind). Default: SmolLM2, if installed."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="|".join(ENGINES), callback=_engine, help="Default: turbomind for a folder, else llama."),
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="ADDRESS", help=f"The sidecar's address. Default {LISTEN}.")] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address of the sidecar's metrics. Default 127.0.0.1:9400.")
    ] = None,
    service_metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address of the service's metrics. Default 127.0.0.1:9401.")
    ] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Serve OpenAI's API too, with smg.")] = False,
    gateway_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Port of OpenAI's API, on 127.0.0.1. Default {GATEWAY_PORT}.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with the tables [service] and [sidecar]: their settings.")
    ] = None,
    state: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Holds journal, proofs and logs.")] = STATE,
    service_flag: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="For the service, such as '--runs 4'. May be repeated.")
    ] = None,
    sidecar_flag: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="For the sidecar, such as '--audit-rate 0'. May be repeated.")
    ] = None,
) -> None:
    """Starts service and sidecar, and stops both at Ctrl-C.

    Other settings of the two programs: --config, --service-flag, --sidecar-flag, or their environment variables
    (OSTINATO_SERVICE_*, OSTINATO_SIDECAR_*), which `ostinato service --help` and `ostinato sidecar --help` list.
    """
    if model is not None and not model.exists():
        raise wrong(f"MODEL: there is no file or folder {model}")
    if gateway_port is not None and not gateway:
        raise wrong("--gateway-port: needs --gateway")
    if engine is None and model is not None:
        engine = "turbomind" if model.is_dir() else "llama"
    services = {"--config": config, "--engine": engine, "--model": model, "--metrics": service_metrics}
    sidecars = {"--config": config, "--listen": listen, "--metrics": metrics}
    serving = Serving(
        state=state,
        gateway_port=(gateway_port or GATEWAY_PORT) if gateway else None,
        flags={
            "service": [*_given(services), *_split("--service-flag", service_flag)],
            "sidecar": [*_given(sidecars), *_split("--sidecar-flag", sidecar_flag)],
        },
    )
    raise typer.Exit(asyncio.run(run_until_signal("serve", serving, _serve(serving))))


def service(context: typer.Context) -> None:
    """Runs the service alone; --help lists its settings."""
    _become("service", context.args)


def sidecar(context: typer.Context) -> None:
    """Runs the sidecar alone, or one of its commands."""
    _become("sidecar", context.args)


def _split(option: str, given: Sequence[str] | None) -> list[str]:
    with usage(option):
        return [word for text in given or () for word in shlex.split(text)]


# Where the programs are. In a checkout they are the folders `service` and `sidecar`; the wheel has them in `ostinato/programs`,
# so that site-packages gets no package with so common a name. They are started as `python -m service` with PYTHONPATH set.
_SERVING = ("cryptography", "grpc_health", "grpc_reflection", "msgspec", "prometheus_client")
NEEDS: Mapping[str, Sequence[str]] = {
    "service": _SERVING,
    "sidecar": (*_SERVING, "apsw"),
    "smg": ("smg", "smg_grpc_proto"),
}
"""Modules without which a program cannot start. The extras of pyproject.toml install them."""
EXTRAS: Mapping[str, str] = {"service": "cpu", "sidecar": "cpu", "smg": "gateway"}
"""The extra to install if one is missing."""


class ProgramFailed(Exception):
    """A program cannot be started, or has ended by itself. The message is one line, and `code` an exit code."""

    def __init__(self, why: str, code: int = FAILED) -> None:
        super().__init__(why)
        self.code = code


def check_installed(name: str) -> None:
    """Raises ProgramFailed if a package is missing without which the program cannot start."""
    for module in NEEDS[name]:
        if importlib.util.find_spec(module) is None:
            who = "--gateway" if name == "smg" else name
            raise ProgramFailed(f"{who} needs {module}, which is not installed: {install_hint(EXTRAS[name])}")


def _environment(name: str) -> dict[str, str]:
    """This process's variables, with a PYTHONPATH for the program and this package, and without the working directory. Raises
    ProgramFailed."""
    package = Path(ostinato.__file__).parent
    checkout = package.parents[1]
    for place, *others in ([package / "programs"], [checkout, checkout / "proto"], [package.parent]):  # the last: an image
        if (place / name / "__main__.py").is_file():
            inherited = os.environ.get("PYTHONPATH")
            path = os.pathsep.join(map(str, (place, *others, *([inherited] if inherited else []))))
            return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    raise ProgramFailed(f"{name} is not beside {package}: install the wheel, or use a checkout")


def _command(name: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _become(name: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by the program, which then gets its signals and sets its exit code."""
    try:
        check_installed(name)
        variables = _environment(name)
    except ProgramFailed as error:
        show.note(f"ostinato: {error}")
        raise typer.Exit(FAILED) from None
    os.execve(sys.executable, _command(name, arguments), variables)  # noqa: S606  # no shell is wanted


class Child:
    """A running program. Its output goes to a log file and is searched for JSON log records."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: logging.Handler) -> None:
        self.name = name
        self._process = process
        self.stopped = False
        """By us: its end is expected."""
        self._records = defaultdict[str, asyncio.Future[Mapping[str, Any]]](asyncio.get_running_loop().create_future)
        self._causes: deque[str] = deque(maxlen=CAUSES_MAX)
        self._log = logging.Logger(name)  # noqa: LOG001  # not part of this process's logging
        self._log.addHandler(log)
        self._running = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Child:
        """Raises OSError."""
        from ctypes import CDLL
        from logging.handlers import RotatingFileHandler

        logging.raiseExceptions = False  # a full disk loses lines of a log file, and prints nothing
        libc = CDLL(None)  # before the fork
        handler = RotatingFileHandler(log, maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *command,
            env=variables,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        return cls(name, process, handler)

    async def record(self, message: str) -> Mapping[str, Any]:
        """The first log record with this message."""
        return await self._records[message]

    @property
    def ended(self) -> bool:
        return self._running.done()

    async def watch(self) -> None:
        """Until the program has ended. Raises ProgramFailed if it did so by itself."""
        await asyncio.wait({self._running})
        if not self.stopped:
            raise self._failure()

    async def stop(self, seconds: float | None) -> None:
        """SIGTERM, and SIGKILL after this long; None: never."""
        self.signal(signal.SIGTERM)
        await asyncio.wait({self._running}, timeout=seconds)
        self.signal(signal.SIGKILL)
        await asyncio.wait({self._running})

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, SIGKILL also to the program's own children. No effect on a program that has ended."""
        if self._process.returncode is not None:
            return
        # Not Process.send_signal: it polls first, and may reap the program before asyncio does, which then has no exit code.
        send = os.killpg if number == signal.SIGKILL else os.kill
        with suppress(ProcessLookupError):
            send(self._process.pid, number)

    def _failure(self) -> ProgramFailed:
        """With the name of `serve`'s own flag, or how it passes one on, and with what to do about a port that is taken."""
        code = self._process.returncode
        assert code is not None, "only of a program that has ended"
        if code < 0:
            return ProgramFailed(f"{self.name}: was ended by {signal.Signals(-code).name}")
        if not self._causes:
            return ProgramFailed(f"{self.name}: ended with exit code {code}")
        lines = list(self._causes) if code == USAGE else [self._causes[-1]]
        why = "; ".join(line.removeprefix(f"{self.name}: ") for line in lines)
        why = why.replace("allow it with --", f"allow it with --{self.name}-flag --")
        if self.name == "service" and why.startswith("--metrics:"):
            why = f"--service{why.removeprefix('-')}"
        remedy = f"; {REMEDY}" if why.endswith(TAKEN) else ""
        return ProgramFailed(f"{self.name}: {why}{remedy}", USAGE if code == USAGE else FAILED)

    async def _run(self) -> None:
        """Until the program has ended and its output has been read."""
        reading = asyncio.create_task(self._read())
        await self._process.wait()
        await asyncio.wait({reading}, timeout=_LAST_LINES_SECONDS)  # its own children may hold the pipe open
        reading.cancel()
        for handler in self._log.handlers:
            handler.close()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace"))
        if rest:
            self._take(rest.decode(errors="replace"))

    def _take(self, line: str) -> None:
        self._log.info("%s", line)
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            if line.strip():
                self._causes.append(line.strip())
            return
        first = self._records[str(record.get("message"))]
        if not first.done():
            first.set_result(record)
        if record.get("level") in ("ERROR", "CRITICAL"):
            last = str(record.get("exception", "")).strip().rpartition("\n")[2]
            self._causes.append(f"{record.get('message')}: {last}" if last else str(record.get("message")))


@dataclass(slots=True)
class Serving:
    """What to start, then what runs and what the programs reported."""

    state: Path = STATE
    gateway_port: int | None = None
    """None: no gateway."""
    flags: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"service": (), "sidecar": ()})
    """By program."""
    children: dict[str, Child] = field(default_factory=dict)
    target: str = ""
    """Of the sidecar, for clients."""
    ports: dict[str, int] = field(default_factory=dict)
    """Of the metrics pages by program; 0: there is none."""
    earned: Mapping[str, Any] = field(default_factory=dict)
    """The service's grade, its reasons and what it cost."""
    connected: Mapping[str, Any] = field(default_factory=dict)
    """Model, grade and fingerprint, from the sidecar."""
    seconds: float = 0.0
    """From the start until it served."""
    openai: str = ""
    """URL of the gateway."""
    openai_model: str = ""

    async def stop(self) -> None:
        """The sidecar drains, unless a program has ended by itself; then the gateway and the service end."""
        drain = CUT_SHORT_SECONDS if any(child.ended for child in self.children.values()) else None
        for child in self.children.values():
            child.stopped = True
        # At SIGTERM, smg would wait for a load balancer.
        for name, seconds in (("sidecar", drain), ("smg", 0), ("service", SERVICE_STOP_SECONDS)):
            if name in self.children:
                await self.children[name].stop(seconds)


async def run_until_signal(name: str, serving: Serving, work: Coroutine[Any, Any, int]) -> int:
    """Runs `work` until it ends or a signal cancels it; a second signal kills the children. The exit code: that of `work`, 0 if
    it was stopped, 130 if it was killed. If it failed, prints one line on stderr; 2 for bad settings of a program, else 1."""
    loop = asyncio.get_running_loop()
    working = asyncio.create_task(work)
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            working.cancel()
            with suppress(OSError):  # the terminal may be closed
                show.note("stopping; Ctrl-C again stops at once")
            return
        for child in serving.children.values():
            child.signal(signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    try:
        return await working
    except asyncio.CancelledError:
        return 0 if signals == 1 else INTERRUPTED
    except (ProgramFailed, OSError) as error:
        show.note(f"ostinato {name}: {show.visible(str(error))}")
        return error.code if isinstance(error, ProgramFailed) else FAILED


async def _serve(serving: Serving) -> int:
    async with started(serving):
        _announce(serving)
        await asyncio.Event().wait()
    raise AssertionError("it serves until it is cancelled or a program ends")


@asynccontextmanager
async def started(serving: Serving) -> AsyncIterator[None]:
    """Starts everything; at the end of the context stops it in order. The end of a program ends the context. Raises
    ProgramFailed or OSError, whose message is one line that says what to do."""
    import tempfile

    for name in ("service", "sidecar", *(["smg"] if serving.gateway_port else [])):
        check_installed(name)
    if serving.gateway_port:
        _check_free(serving.gateway_port)
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) >= _SOCKET_FOLDER_BYTES_MAX:
        place = "/tmp"  # noqa: S108
    # The folder, for the socket between service and sidecar, is closed to other users.
    with _locked(serving.state), tempfile.TemporaryDirectory(prefix="ostinato-", dir=place) as folder:
        try:
            async with asyncio.TaskGroup() as watching:
                try:
                    began = time.monotonic()
                    await _start_pair(serving, watching, f"unix:{folder}/engine.sock")
                    await _wait_until_serving(serving)
                    if serving.gateway_port:
                        await _start_gateway(serving, watching, serving.gateway_port)
                    serving.seconds = time.monotonic() - began
                    yield
                finally:
                    stopping = asyncio.create_task(serving.stop())
                    try:
                        await asyncio.shield(stopping)
                    except asyncio.CancelledError:  # a first signal, after a program has ended by itself
                        await stopping
                        raise
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None


async def _start(
    serving: Serving, watching: asyncio.TaskGroup, name: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> Child:
    child = await Child.start(name, _command(name, arguments), variables, serving.state / f"{name}.log")
    serving.children[name] = child
    watching.create_task(child.watch())
    return child


async def _start_pair(serving: Serving, watching: asyncio.TaskGroup, address: str) -> None:
    """Until both listen, the service at `address`."""
    _make_signing_key(serving.state / SIGNING_KEY)
    for name in ("service", "sidecar"):
        await _start(serving, watching, name, _flags(serving, name, address), _environment(name))
    for name, child in serving.children.items():
        serving.ports[name] = int((await child.record("metrics"))["port"])
    listening = await serving.children["sidecar"].record("listening")
    serving.target = _reachable(str(listening["addresses"]).split(",")[0])


def _flags(serving: Serving, name: str, address: str) -> list[str]:
    """The caller's flags come after those that they may override, and before those that `serve` depends on."""
    state = serving.state
    places = {
        "service": {"state_dir": state / "service"},
        "sidecar": {"journal": state / "journal.sqlite", "signing_key": state / SIGNING_KEY},
    }
    ours = {f"--{each.replace('_', '-')}": place for each, place in places[name].items() if not _is_set(serving, name, each)}
    gateway = ["--vllm-face"] if name == "sidecar" and serving.gateway_port else []
    socket = ["--listen" if name == "service" else "--engine", address]
    return [*_given(ours), *serving.flags[name], *gateway, *socket, "--log-format", "json", "--log-level", "info"]


def _make_signing_key(path: Path) -> None:
    """The key that signs the journal is made at the first start, and the public key beside it at each."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(new_key())
    with suppress(ValueError):  # the sidecar says what is wrong with it
        path.with_suffix(".pub").write_text(signer_of(path.read_bytes()).public_pem)


def _is_set(serving: Serving, program: str, setting: str) -> bool:
    """Whether the environment or the settings file has this setting, which --state must not override."""
    import argparse
    import tomllib

    prefix = f"OSTINATO_{program.upper()}_"
    if f"{prefix}{setting.upper()}" in os.environ:
        return True
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default=os.environ.get(f"{prefix}CONFIG"))
    try:
        file = parser.parse_known_args(serving.flags[program])[0].config
        table = tomllib.loads(Path(file).read_text("utf-8")).get(program) if file else None
    except (argparse.ArgumentError, OSError, ValueError):
        return False  # the program reports what is wrong with the flag or the file
    return isinstance(table, dict) and setting in table


def _given(flags: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in flags.items() if value is not None]


async def _wait_until_serving(serving: Serving) -> None:
    """Until the service has its grade and the sidecar is connected."""
    service, sidecar = serving.children.values()
    proof = "about 30 s, unless an earlier start left a proof"
    console = Console(stderr=True)

    def reassure() -> None:
        if not console.is_terminal:
            show.note(f"loading and testing the model; the test takes {proof}")

    reassuring = asyncio.get_running_loop().call_later(SILENCE_SECONDS, reassure)
    try:
        with console.status("loading the model") as status:
            await service.record("engine loaded")
            status.update(f"testing the model; {proof}")
            serving.earned = await service.record("grade earned")
            serving.connected = await sidecar.record("engine connected")
    finally:
        reassuring.cancel()


async def _start_gateway(serving: Serving, watching: asyncio.TaskGroup, port: int) -> None:
    """Until smg serves the sidecar's model."""
    with socket.socket() as held:  # a free port for smg's own metrics, which cannot be turned off
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        flags = {
            "--host": "127.0.0.1",
            "--port": port,
            "--worker-urls": f"grpc://{serving.target}",
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": held.getsockname()[1],
            "--log-level": "warn",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        # A retry by smg would be another request, with other sequences.
        arguments = ["launch", *words, "--disable-retries"]
        await _start(serving, watching, "smg", arguments, {**os.environ, "PYTHONSAFEPATH": "1"})
        url = f"http://127.0.0.1:{port}"
        serving.openai_model = await _gateway_model(url)
        serving.openai = f"{url}/v1"


async def _gateway_model(url: str) -> str:
    """The name of the gateway's model, once the gateway is ready and has its tokenizer."""
    import urllib.request

    def get(path: str) -> Any:
        with urllib.request.urlopen(f"{url}{path}", timeout=2) as answer:  # noqa: S310  # http, as made above
            return json.load(answer)

    def ask() -> str:
        get("/readiness")
        return str(get("/v1/models")["data"][0]["id"])

    while True:
        with suppress(OSError, LookupError, ValueError):
            return await asyncio.to_thread(ask)
        await asyncio.sleep(GATEWAY_POLL_SECONDS)


def _check_free(port: int) -> None:
    """Raises ProgramFailed if the gateway's port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"--gateway-port: cannot listen on 127.0.0.1:{port}: {error.strerror}"
            raise ProgramFailed(f"{why}; {REMEDY}") from None


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Creates the folder and locks it for this process. Raises ProgramFailed."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = (state / "serve.lock").open("a+")
    except OSError as error:
        raise ProgramFailed(f"--state {state}: {error.strerror}; choose a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip() or "another one"
            why = f"process {process} serves in {state.absolute()} already"
            raise ProgramFailed(f"{why}: stop it, or choose another folder with --state") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _reachable(address: str) -> str:
    """The target for a client on this machine of a server that listens at `address`."""
    for everywhere, here in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if address.startswith(everywhere):
            return here + address.removeprefix(everywhere)
    return address


def _announce(serving: Serving) -> None:
    """Prints what runs, where, at which grade and why, and what to try now."""
    earned, connected = serving.earned, serving.connected
    why = "; ".join(dict.fromkeys([str(earned["rests_on"]), str(earned["reason"])]))
    costs = ", ".join(f"{earned[f'{part}_seconds']} s of {part.replace('_', '-')}" for part in ("load", "proof", "self_test"))
    lines = [
        f"{connected['model']} serves at grade {str(connected['grade']).upper()}, after {serving.seconds:.1f} s",
        f"  that rests on  {why}",
        f"  and it cost    {costs}",
        f"  fingerprint    {connected['fingerprint']}",
        f"  gRPC           {serving.target}",
    ]
    if serving.openai:
        lines.append(f"  OpenAI's API   {serving.openai}")
    pages = [f"http://127.0.0.1:{port}/metrics ({name})" for name, port in sorted(serving.ports.items()) if port]
    lines += [
        f"  metrics        {', '.join(pages) or 'none'}",
        f"  files          {serving.state.absolute()}: *.log, signing.pub; unless set elsewhere, journal, key and proofs",
        "",
    ]
    show.line("\n".join(lines + _what_to_try(serving)))


def _what_to_try(serving: Serving) -> list[str]:
    command = f"{_own_name()}{'' if serving.target == LISTEN else f' -t {shlex.quote(serving.target)}'}"
    lines = [
        "Ctrl-C stops it all. In another terminal:",
        "",
        f'  {command} generate "Shanghai is" -n 3 --seed 1 --top-k 40',
        f"  {command} tail --follow",
        f"  {command} replay 1..3",
    ]
    if serving.openai:
        body = {"model": serving.openai_model, "seed": 1, "messages": [{"role": "user", "content": "Where is Shanghai?"}]}
        header = "-H 'Content-Type: application/json'"
        lines.append(f"  curl -s {serving.openai}/chat/completions {header} -d {shlex.quote(json.dumps(body))}")
    return lines


def _own_name() -> str:
    """How to call this command in another terminal."""
    name = Path(sys.argv[0])
    if name.name != "ostinato":
        return f"{shlex.quote(sys.executable)} -m ostinato.cli"
    if shutil.which("ostinato") == str(name.absolute()):
        return "ostinato"
    here = Path.cwd()
    return shlex.quote(str(name.absolute().relative_to(here) if name.absolute().is_relative_to(here) else name.absolute()))
