"""`ostinato serve`: what it starts, what it prints, and that it leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

import pytest
from typer.testing import CliRunner

import ostinato
from ostinato.cli import serve
from ostinato.cli.app import app

from tests.pair import ROOT, Program, held_port
from tests.waiting import until

SECONDS = 60.0
ANYWHERE = ("--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", "--service-metrics=127.0.0.1:0")
UNTESTED = ("--service-flag", "--self-test off", "--sidecar-flag", "--canary-seconds 0 --journal-reserve-bytes 65536")
STOPPING = "stopping; Ctrl-C again stops at once"


class Serve(Program):
    """`ostinato serve` with the scripted engine and a state folder of its own; a context, which kills it."""

    def __init__(
        self, state: Path, *flags: str, addresses: Sequence[str] = ANYWHERE, env: Mapping[str, str] | None = None
    ) -> None:
        self.state = state
        own = ["--engine", "scripted", "--state", str(state), *addresses, *UNTESTED]
        super().__init__("ostinato.cli", ["serve", *own, *flags], env)

    def wait_for_line(self, part: str) -> str:
        """The first line with this in it."""
        until(lambda: not self.running or any(part in line for line in self.lines), part, SECONDS)
        return next((line for line in self.lines if part in line), "\n".join(self.lines))

    def ended(self) -> int:
        """The exit code, once it has ended by itself."""
        return self.stop(signal.SIGCONT)

    @property
    def target(self) -> str:
        self.wait_for_line(" replay 1..3")  # the last of what it says
        return self.wait_for_line("  gRPC ").removeprefix("  gRPC").strip()

    def logged(self, name: str) -> str:
        """What a program has written so far."""
        log = self.state / f"{name}.log"
        return log.read_text() if log.exists() else ""

    def children(self) -> list[int]:
        """Processes that have this state folder among their arguments, other than this one."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{self.state}/".encode() in arguments and int(process.name) != self.pid:
                found.append(int(process.name))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for child in self.children():
            os.kill(child, signal.SIGKILL)


@pytest.fixture(name="state")
def _state(tmp_path: Path) -> Path:
    return tmp_path / "a state"


@pytest.fixture(name="taken")
def _taken() -> Iterator[str]:
    with held_port() as held:
        held.listen()
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_it_serves_and_says_what(state: Path) -> None:
    """It prints model, grade, reason, address and what to try, answers there, and after a signal exits 0 without a child."""
    with Serve(state) as serve:
        with ostinato.SyncClient(serve.target) as client:
            answer = client.generate("hello", seed=1, max_new_tokens=4)
        said = "\n".join(serve.lines)
        before = len(serve.lines)
        code = serve.stop()

        assert len(answer.results[0].output.token_ids) == 4
        assert said.startswith("scripted serves at grade BEST_EFFORT, after ")
        assert "that rests on  the script says so; not tested" in said
        assert f"-t {serve.target} generate" in said
        assert (code, serve.lines[before:], serve.children()) == (0, [STOPPING], [])


@pytest.mark.parametrize(("moment", "number"), [("start", signal.SIGINT), ("test", signal.SIGTERM), ("serving", signal.SIGHUP)])
def test_a_signal_ends_it_all_at_any_moment(state: Path, moment: str, number: signal.Signals) -> None:
    """A signal while it starts, tests its engine or serves gives one line, exit code 0 and no child."""
    slow = ("--service-flag", """--self-test full --script '{"delay_seconds": 0.1}'""") if moment == "test" else ()
    with Serve(state, *slow) as serve:
        reached = {
            "start": lambda: (state / "service.log").exists(),
            "test": lambda: '"engine loaded"' in serve.logged("service"),
            "serving": lambda: serve.target,
        }
        until(reached[moment])
        before = len(serve.lines)
        code = serve.stop(number)

        assert (code, serve.lines[before:], serve.children()) == (0, [STOPPING], [])


async def test_a_signal_ends_it_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed terminal or pipe does not keep the first signal from stopping it."""

    def closed(text: str) -> None:
        raise OSError(text)

    monkeypatch.setattr("ostinato.cli.show.note", closed)
    ending = asyncio.create_task(serve.run_until_signal("serve", serve.Serving(), asyncio.sleep(60, 0)))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(ending, 10) == 0


def test_a_hangup_that_is_ignored_stays_ignored(state: Path) -> None:
    """Under nohup a SIGHUP has no effect: the SIGTERM after it is the first signal that stops it."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        serve = Serve(state)
    finally:
        signal.signal(signal.SIGHUP, usual)
    with serve:
        assert serve.target
        before = len(serve.lines)
        os.kill(serve.pid, signal.SIGHUP)

        assert (serve.stop(), serve.lines[before:]) == (0, [STOPPING])


def test_a_second_signal_does_not_wait(state: Path) -> None:
    """An answer that does not end delays the drain; a second signal kills, with exit code 130 and no child."""
    hang = ("--service-flag", """--script '{"rules": [{"do": "hang", "at": 1}]}'""")
    with Serve(state, *hang) as serve:
        with ostinato.SyncClient(serve.target) as client:
            next(client.stream("hello"))
            os.kill(serve.pid, signal.SIGINT)
            until(lambda: '"draining"' in serve.logged("sidecar"))
            code = serve.stop(signal.SIGINT)

        assert (code, serve.lines[-1], serve.children()) == (130, STOPPING, [])


@pytest.mark.parametrize("name", ["service", "sidecar"])
def test_a_program_that_dies_ends_it_all(state: Path, name: str) -> None:
    """If a program ends, the last line names it and the reason, and the exit code is 1 without a child."""
    with Serve(state) as serve:
        assert serve.target
        [child] = [pid for pid in serve.children() if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
        os.kill(child, signal.SIGKILL)
        until(lambda: not serve.running)

        assert (serve.stop(), serve.lines[-1]) == (1, f"ostinato serve: {name}: was ended by SIGKILL")
        assert serve.children() == []


def test_it_takes_its_children_along_when_killed(state: Path) -> None:
    """After kill -9 of serve, the programs end."""
    with Serve(state) as serve:
        assert serve.target
        assert len(serve.children()) == 2
        serve.kill()
        until(lambda: not serve.children())


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        ("--listen={taken}", 1, "sidecar: --listen: cannot listen on {taken}: {in_use}"),
        ("--metrics={taken}", 1, "sidecar: --metrics: cannot listen on {taken}: {in_use}"),
        ("--service-metrics={taken}", 1, "service: --service-metrics: cannot listen on {taken}: {in_use}"),
        ("--gateway --gateway-port={port}", 1, "--gateway-port: cannot listen on {taken}: {in_use}"),
        ("--listen=0.0.0.0:0", 2, "sidecar: --listen: '0.0.0.0:0': anyone * or allow it with --sidecar-flag --open"),
        ("--service-flag='--runs=none --engine=llama'", 2, "service: --runs: 'none' is not a whole number"),
        (
            "--service-flag='--require-grade EXACT'",
            1,
            "service: --require-grade: EXACT is required, BEST_EFFORT was earned: not tested",
        ),
        ("--state=/dev/null/x", 1, "--state /dev/null/x: Not a directory; choose a folder that can be written"),
    ],
)
def test_what_prevents_serving_is_one_line(state: Path, taken: str, flags: str, code: int, why: str) -> None:
    """A taken port, an address beyond loopback without credentials, a setting or a grade that a program refuses, and a folder
    that cannot be written are one line, with the program and its flag as `serve` takes it. Nothing is left behind."""
    told = {"taken": taken, "port": taken.rpartition(":")[2], "in_use": f"{serve.TAKEN}; {serve.REMEDY}"}
    with Serve(state, *shlex.split(flags.format(**told))) as running:
        assert (running.ended(), len(running.lines), running.children()) == (code, 1, []), "\n".join(running.lines)
        assert fnmatchcase(running.lines[0], f"ostinato serve: {why.format(**told)}")


def test_one_state_folder_serves_once(state: Path) -> None:
    """A second serve on one folder is refused and names the first; after the first has ended, a third continues its journal."""
    with Serve(state) as first:
        assert first.target
        second = Serve(state)
        code = second.ended()
        why = f"process {first.pid} serves in {state} already"
        assert (code, second.lines) == (1, [f"ostinato serve: {why}: stop it, or choose another folder with --state"])
        assert first.running
        first.stop()
    with Serve(state) as third, ostinato.SyncClient(third.target) as client:
        assert client.head().epoch == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--engine", "x"], "Invalid value for '--engine': 'x' is not one of llama, turbomind, scripted"),
        (["/no.gguf"], "MODEL: there is no file or folder /no.gguf"),
        (["--gateway-port", "8000"], "--gateway-port: needs --gateway"),
        (["--service-flag", "'"], "--service-flag: No closing quotation"),
    ],
)
def test_wrong_usage_is_two(state: Path, flags: list[str], why: str) -> None:
    """What `serve` itself can tell to be wrong exits 2 before anything is started, and is named."""
    result = CliRunner().invoke(app, ["serve", "--state", str(state), *flags])

    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
    assert not state.exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is named, with the command that installs it."""
    monkeypatch.setitem(serve.NEEDS, "sidecar", ("cryptography", "no_such_module"))

    with pytest.raises(serve.ProgramFailed, match=r"^sidecar needs no_such_module, .*: pip install '\.\[cpu\]' in a checkout"):
        serve.check_installed("sidecar")


@pytest.mark.parametrize("name", ["service", "sidecar"])
def test_one_program_takes_its_own_flags(name: str, tmp_path: Path) -> None:
    """`ostinato service` and `ostinato sidecar` run the programs, also if the working directory has a folder of that name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__main__.py").write_text("raise SystemExit('the wrong one')")
    flags = {"--help": 0, "--no-such-flag": 2}
    ended = [
        subprocess.run(
            [sys.executable, "-P", "-m", "ostinato.cli", name, flag],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT / "proto")},
            capture_output=True,
            text=True,
            check=False,
        )
        for flag in flags
    ]

    assert [each.returncode for each in ended] == list(flags.values()), ended
    assert "--log-format" in ended[0].stdout
    assert "--no-such-flag" in ended[1].stderr


def test_other_settings_come_from_a_file_and_the_environment(state: Path, tmp_path: Path) -> None:
    """Service and sidecar each read their table of --config; flags win over it. An address without a flag comes from the
    program's environment variable."""
    config = tmp_path / "ostinato.toml"
    config.write_text('[service]\nnew_tokens_max = 7\n\n[sidecar]\nwriter = "from-a-file"\nmetrics = "127.0.0.1:1"\n')
    addresses = [each for each in ANYWHERE if not each.startswith("--listen=")]
    door = {"OSTINATO_SIDECAR_LISTEN": f"unix:{state}/door"}
    with Serve(state, "--config", str(config), addresses=addresses, env=door) as serve:
        assert serve.target == f"unix:{state}/door"
        with ostinato.SyncClient(serve.target) as client:
            assert client.head().writer == "from-a-file"
            assert client.model().limits.new_tokens_max == 7


def test_a_journal_that_is_set_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--state does not override a journal of the settings file, also of one that only the program is told of, or of the
    environment. A flag that the program refuses is left to it."""
    config = tmp_path / "ostinato.toml"
    config.write_text(f'[sidecar]\njournal = "{tmp_path / "other.sqlite"}"\n')

    def passed(*flags: str) -> bool:
        serving = serve.Serving(state=tmp_path / "state", flags={"sidecar": list(flags)})
        return any(flag.startswith("--journal=") for flag in serve._flags(serving, "sidecar", "unix:x"))

    assert passed()
    assert passed("--config")
    assert not passed("--metrics", "x", f"--config={config}")
    assert not passed("--config", str(config))

    monkeypatch.setenv("OSTINATO_SIDECAR_JOURNAL", str(tmp_path / "third.sqlite"))

    assert not passed()
