"""What `ostinato serve` runs: both programs, and an OpenAI gateway if wanted, until a signal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from ostinato.cli import programs, show
from ostinato.cli.launch import Child, Ended
from ostinato.cli.serve import LISTEN, STATE, Engine

SERVICE_STOP_SECONDS = 10.0
"""Once the sidecar has left, the service has nothing to finish."""
CUT_SHORT_SECONDS = 2.0
"""For a program to stop after another has ended by itself."""
GATEWAY_POLL_SECONDS = 0.05
SILENCE_SECONDS = 2.0
"""Before it is said that this takes a while: what fails at once says nothing else."""
TAKEN, REMEDY = "Address already in use", "stop what listens there, or choose another"
_ALL_STOPPED, _FAILED, _KILLED = 0, 1, 130
_SOCKET_FOLDER_BYTES_MAX = 80
"""So that the socket's path stays below the kernel's 107."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to start. None: as the program's own settings have it, which may come from its environment."""

    config: Path | None = None
    model: Path | None = None
    engine: Engine | None = None
    state: Path = STATE
    listen: str | None = None
    metrics: str | None = None
    service_metrics: str | None = None
    gateway_port: int | None = None
    """None: no gateway."""
    service: Sequence[str] = ()
    """Flags of the service's own."""
    sidecar: Sequence[str] = ()


@dataclass(slots=True)
class Running:
    """What runs, and what it said of itself."""

    children: list[Child] = field(default_factory=list)
    target: str = ""
    """Where clients find the sidecar."""
    ports: dict[str, int] = field(default_factory=dict)
    """Of the metrics pages, by program; 0: there is none."""
    earned: Mapping[str, Any] = field(default_factory=dict)
    """The service's grade, its reasons and costs."""
    connected: Mapping[str, Any] = field(default_factory=dict)
    """Model, grade and fingerprint, as the sidecar knows them."""
    seconds: float = 0.0
    """From the start until it served."""
    openai: str = ""
    """URL of the gateway; empty: there is none."""
    openai_model: str = ""

    async def unless_one_ends(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Raises Ended as soon as one of the programs ends."""
        working = asyncio.create_task(work)
        ends = [asyncio.create_task(child.ended()) for child in self.children]
        try:
            done, _ = await asyncio.wait({working, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end in done:
                    raise end.result()
            return working.result()
        finally:
            for task in (working, *ends):
                task.cancel()


async def until_told(name: str, work: Callable[[Running], Coroutine[Any, Any, int]]) -> int:
    """Runs `work` until it is done or a signal cancels it; a second signal kills what runs. Its exit code, or 0 for what was
    stopped in order, 130 for what was killed, 1 for what failed, after one line on stderr."""
    loop = asyncio.get_running_loop()
    running = Running()
    working = asyncio.create_task(work(running))
    told = 0

    def stop() -> None:
        nonlocal told
        told += 1
        if told == 1:
            show.note("stopping; Ctrl-C again stops at once")
            working.cancel()
            return
        for child in running.children:
            child.signal(signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    try:
        return await working
    except asyncio.CancelledError:
        return _ALL_STOPPED if told == 1 else _KILLED
    except (programs.Unusable, Ended, OSError) as error:
        show.note(f"ostinato {name}: {show.visible(str(error))}")
        return _FAILED


async def serve(wanted: Wanted, running: Running) -> int:
    async with started(wanted, running):
        _say(wanted, running)
        await running.unless_one_ends(asyncio.Event().wait())
    raise AssertionError("it serves until it is cancelled or a program ends")


@asynccontextmanager
async def started(wanted: Wanted, running: Running) -> AsyncIterator[None]:
    """All that is wanted, serving, and stopped in order at the context's end. Raises Unusable, Ended or OSError: one line that
    says what to do."""
    for name in ("service", "sidecar", *(["smg"] if wanted.gateway_port else [])):
        programs.check(name)
    if wanted.gateway_port:
        _check_free(wanted.gateway_port)
    with _held(wanted.state), _folder_for_socket() as folder:
        patience: float | None = None
        try:
            began = time.monotonic()
            await _start_pair(wanted, running, f"unix:{folder}/engine.sock")
            await _wait_until_serving(running)
            if wanted.gateway_port:
                await _start_gateway(wanted, wanted.gateway_port, running)
            running.seconds = time.monotonic() - began
            yield
        except Ended as error:
            patience = CUT_SHORT_SECONDS
            raise _explained(error) from None
        finally:
            stopping = asyncio.create_task(_stop(running, patience))
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:  # a first signal, after a program has ended by itself
                await stopping
                raise


async def _start_pair(wanted: Wanted, running: Running, address: str) -> None:
    """Both listen, the service at `address`."""
    variables = programs.environment("service", "sidecar")
    for name, flags in (("service", _service_flags(wanted, address)), ("sidecar", _sidecar_flags(wanted, address))):
        await _start(name, programs.command(name, flags), variables, wanted, running)
    service, sidecar = running.children

    async def listening() -> None:
        running.ports["service"] = int((await service.said("metrics"))["port"])
        running.ports["sidecar"] = int((await sidecar.said("metrics"))["port"])
        running.target = _reachable(str((await sidecar.said("listening"))["addresses"]).split(",")[0])

    await running.unless_one_ends(listening())


async def _start(name: str, command: Sequence[str], variables: Mapping[str, str], wanted: Wanted, running: Running) -> None:
    running.children.append(await Child.start(name, command, variables, wanted.state / f"{name}.log"))


def _service_flags(wanted: Wanted, address: str) -> list[str]:
    """Ours that the caller may outdo, the caller's, and those that `serve` itself rests on."""
    flags = {"--config": wanted.config, "--engine": wanted.engine, "--model": wanted.model, "--metrics": wanted.service_metrics}
    if wanted.state != STATE and not _has(wanted, "service", "state_dir"):
        flags["--state-dir"] = wanted.state / "service"
    return [*_given(flags), *wanted.service, "--listen", address, "--log-format", "json", "--log-level", "INFO"]


def _sidecar_flags(wanted: Wanted, address: str) -> list[str]:
    """Likewise."""
    flags: dict[str, object] = {"--config": wanted.config, "--listen": wanted.listen, "--metrics": wanted.metrics}
    if wanted.state != STATE and not _has(wanted, "sidecar", "journal"):
        flags["--journal"] = wanted.state / "journal.sqlite"
    face = ["--vllm-face"] if wanted.gateway_port else []
    return [*_given(flags), *wanted.sidecar, *face, "--engine", address, "--log-format", "json", "--log-level", "info"]


def _has(wanted: Wanted, program: str, setting: str) -> bool:
    """Whether the environment or the settings file has this setting of a program, which --state must not outdo."""
    prefix = f"OSTINATO_{program.upper()}_"
    if f"{prefix}{setting.upper()}" in os.environ:
        return True
    file = wanted.config or os.environ.get(f"{prefix}CONFIG")
    try:
        table = tomllib.loads(Path(file).read_text("utf-8")).get(program) if file else None
    except (OSError, ValueError):
        return False  # the program says what is wrong with its file
    return isinstance(table, dict) and setting in table


def _given(flags: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in flags.items() if value is not None]


async def _wait_until_serving(running: Running) -> None:
    """The service has its grade, and the sidecar is connected."""
    service, sidecar = running.children
    console = Console(stderr=True)
    with console.status("loading the model") as status:

        async def serving() -> None:
            await service.said("engine loaded")
            status.update("testing the model; about 30 s the first time")
            running.earned = await service.said("grade earned")
            running.connected = await sidecar.said("engine connected")

        async def reassuring() -> None:
            await asyncio.sleep(SILENCE_SECONDS)
            if not console.is_terminal:
                show.note("loading and testing the model; the test takes about 30 s the first time")

        reassure = asyncio.create_task(reassuring())
        try:
            await running.unless_one_ends(serving())
        finally:
            reassure.cancel()


async def _start_gateway(wanted: Wanted, port: int, running: Running) -> None:
    """smg in front of the sidecar, ready."""
    with socket.socket() as held:  # for its own metrics, which it serves in any case
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        flags = {
            "--host": "127.0.0.1",
            "--port": port,
            "--worker-urls": f"grpc://{running.target}",
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": held.getsockname()[1],
            "--log-level": "warn",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        # Its retries would be requests of their own, with sequences of their own.
        command = programs.command("smg", ["launch", *words, "--disable-retries"])
        await _start("smg", command, {**os.environ, "PYTHONSAFEPATH": "1"}, wanted, running)
        url = f"http://127.0.0.1:{port}"
        running.openai_model = await running.unless_one_ends(_gateway_model(url))
        running.openai = f"{url}/v1"


async def _gateway_model(url: str) -> str:
    """The name of what the gateway offers, once it has its tokenizer too."""

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


async def _stop(running: Running, patience: float | None) -> None:
    """The sidecar drains, at most for so many seconds; then whatever is in front of it and behind it ends."""
    if len(running.children) > 1:
        await running.children[1].stop(patience)
    for child in running.children[2:]:
        await child.stop(0)  # told to stop, smg would wait for a load balancer that is not there
    for child in running.children[:1]:
        await child.stop(SERVICE_STOP_SECONDS)


def _explained(error: Ended) -> Ended:
    """With our own flag where it has another name, and with what to do about a taken port."""
    why = error.why
    if error.name == "service" and why.startswith("--metrics:"):
        why = f"--service{why.removeprefix('-')}"
    return Ended(error.name, f"{why}; {REMEDY}" if why.endswith(TAKEN) else why)


def _check_free(port: int) -> None:
    """Raises Unusable if the gateway's port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"--gateway-port: cannot listen on 127.0.0.1:{port}: {error.strerror}"
            raise programs.Unusable(f"{why}; {REMEDY}") from None


@contextmanager
def _held(state: Path) -> Iterator[None]:
    """The folder, made, and this process's alone. Raises Unusable."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = (state / "serve.lock").open("a+")
    except OSError as error:
        raise programs.Unusable(f"--state {state}: {error.strerror}; choose a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip() or "another one"
            why = f"process {process} serves in {state.absolute()} already"
            raise programs.Unusable(f"{why}: stop it, or choose another folder with --state") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _folder_for_socket() -> Iterator[str]:
    """Between service and sidecar, closed to other users."""
    place = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="ostinato-",
        dir=place if len(os.fsencode(place)) < _SOCKET_FOLDER_BYTES_MAX else "/tmp",  # noqa: S108
    ) as folder:
        yield folder


def _reachable(address: str) -> str:
    """Where a client on this machine reaches who listens at `address`."""
    for everywhere, here in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if address.startswith(everywhere):
            return here + address.removeprefix(everywhere)
    return address


def _say(wanted: Wanted, running: Running) -> None:
    """What runs, where, with which grade, what that rests on, and what to try now."""
    earned, connected = running.earned, running.connected
    why = "; ".join(dict.fromkeys([str(earned["rests_on"]), str(earned["reason"])]))
    costs = ", ".join(f"{earned[f'{part}_seconds']} s of {part.replace('_', '-')}" for part in ("load", "proof", "self_test"))
    lines = [
        f"{connected['model']} serves at grade {str(connected['grade']).upper()}, after {running.seconds:.1f} s",
        f"  that rests on  {why}",
        f"  and it cost    {costs}",
        f"  fingerprint    {connected['fingerprint']}",
        f"  gRPC           {running.target}",
    ]
    if running.openai:
        lines.append(f"  OpenAI's API   {running.openai}")
    pages = [f"http://127.0.0.1:{port}/metrics ({name})" for name, port in sorted(running.ports.items()) if port]
    lines += [
        f"  metrics        {', '.join(pages) or 'none'}",
        f"  files          {wanted.state.absolute()}: *.log, and journal and proofs unless a setting has them elsewhere",
        "",
    ]
    show.line("\n".join(lines + _next(running)))


def _next(running: Running) -> list[str]:
    ostinato = f"{_own_name()}{'' if running.target == LISTEN else f' -t {shlex.quote(running.target)}'}"
    lines = [
        "Ctrl-C stops it all. In another terminal:",
        "",
        f'  {ostinato} generate "Shanghai is" -n 3 --seed 1 --top-k 40',
        f"  {ostinato} tail --follow",
        f"  {ostinato} replay 1..3",
    ]
    if running.openai:
        body = {"model": running.openai_model, "seed": 1, "messages": [{"role": "user", "content": "Where is Shanghai?"}]}
        header = "-H 'Content-Type: application/json'"
        lines.append(f"  curl -s {running.openai}/chat/completions {header} -d {shlex.quote(json.dumps(body))}")
    return lines


def _own_name() -> str:
    """What to type to call this very command."""
    name = Path(sys.argv[0])
    if name.name != "ostinato":
        return f"{shlex.quote(sys.executable)} -m ostinato.cli"
    if shutil.which("ostinato") == str(name.absolute()):
        return "ostinato"
    here = Path.cwd()
    return shlex.quote(str(name.absolute().relative_to(here) if name.absolute().is_relative_to(here) else name.absolute()))
