"""Starts that fail: the last line, or the last record of a JSON log, gives the reason."""

from __future__ import annotations

import gc
import json
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostinato import install_hint
from serving.settings import load

import service.__main__
import service.config
import sidecar.__main__
import sidecar.config
from tests.pair import ROOT, python
from tests.service.llama_kit import LACKING


@dataclass(frozen=True)
class Failure:
    """A start that cannot succeed. {folder}, {port} and {database} stand for those of the test."""

    line: str
    """The program and its flags."""
    code: int
    said: str
    """The whole message, or its beginning if it ends with …."""


SERVICE = "service --engine scripted --metrics= --listen unix:{folder}/s.sock --state-dir {folder}/state"
OVER_TCP = "--engine-secret {folder}/secret"
SIDECAR = "sidecar --metrics= --listen 127.0.0.1:0 --journal {folder}/journal.sqlite"
LLAMA = "service --metrics= --listen unix:{folder}/s.sock --state-dir {folder}/state"
TURBOMIND = "service --engine turbomind --metrics= --listen unix:{folder}/s.sock --state-dir {folder}/state"

# Each way in which a start fails, once. All that is refused is in the tests of settings, addresses, credentials and journals.

SETTINGS = {
    "unknown flag": Failure("service --modle x", 2, "--modle: names no setting; did you mean --model or --socket-mode?"),
    "more than gRPC counts": Failure(
        "sidecar --message-bytes-max 2147483648", 2, "--message-bytes-max: '2147483648' is not 1024 to 2147483647"
    ),
    "more than gRPC counts, again": Failure(
        "service --message-bytes-max 2147483648", 2, "--message-bytes-max: '2147483648' is not 4096 to 2147483647"
    ),
    "bad script": Failure(f"{SERVICE} --script {{{{", 2, "--script: is not JSON: Input data was truncated"),
    "bad rule": Failure(f'{SERVICE} --script {{{{"runs":0}}}}', 2, "--script: Expected `int` >= 1 - at `$.runs`"),
    "settings file is no TOML": Failure(
        "sidecar --config {folder}/text", 2, "--config: {folder}/text: is not TOML: Expected '='…"
    ),
    "engine's address": Failure("sidecar --engine nonsense", 2, "--engine: 'nonsense' is no address: unix:path or host:port"),
    "no address": Failure(
        f"{SERVICE} --listen nonsense", 2, "--listen: 'nonsense': is no address: unix:/path, or an IP address…"
    ),
    "open sidecar": Failure(
        f"{SIDECAR} --listen 0.0.0.0:0",
        2,
        "--listen: '0.0.0.0:0': anyone who reaches it could do everything: …",
    ),
    "open service": Failure(
        f"{SERVICE} --listen 0.0.0.0:0",
        2,
        "--listen: '0.0.0.0:0': the sidecar cannot prove itself there: …",
    ),
    "service on a loopback port": Failure(
        f"{SERVICE} --listen 127.0.0.1:0",
        2,
        "--listen: '127.0.0.1:0': the sidecar cannot prove itself there: use unix:/path, …",
    ),
    "service that others can listen to": Failure(
        f"{SERVICE} {OVER_TCP} --listen 0.0.0.0:0",
        2,
        "--listen: '0.0.0.0:0': prompts could be read on the way: turn TLS on, …",
    ),
    "missing secret": Failure(
        f"{SERVICE} --engine-secret {{folder}}/none",
        2,
        "--engine-secret: {folder}/none: No such file or directory",
    ),
    "sidecar's missing secret": Failure(
        f"{SIDECAR} --engine 127.0.0.1:1 --engine-secret {{folder}}/none",
        2,
        "--engine-secret: {folder}/none: No such file or directory",
    ),
    "long socket path": Failure(
        f"{SIDECAR} --listen unix:/{'x' * 107}",
        2,
        f"--listen: 'unix:/{'x' * 107}': a socket's path is at most 107 bytes long, this one is 108",
    ),
    "metrics' address": Failure(f"{SERVICE} --metrics x", 2, "--metrics: 'x' is not host:port"),
    "socket's mode": Failure("service --engine scripted --socket-mode rw", 2, "--socket-mode: 'rw' is not a file mode"),
    "no room for the reserve": Failure(
        "sidecar --journal-bytes-max 65536", 2, "--journal-bytes-max must be more than twice --journal-reserve-bytes"
    ),
    "a file's bound": Failure(
        "sidecar --journal postgresql://h/x --journal-bytes-max 99999999", 2, "--journal-bytes-max bounds a file; a PostgreSQL…"
    ),
    "tenants from two sources": Failure(
        f"{SIDECAR} --trust-tenant-metadata --tls-certificate x --tls-key x --tls-client-ca x",
        2,
        "--trust-tenant-metadata: tenants come from --tls-client-ca already",
    ),
    "bad certificate": Failure(
        f"{SIDECAR} --tls-certificate {{folder}}/text --tls-key {{folder}}/text",
        2,
        "--tls-certificate: {folder}/text: holds no certificate in PEM form",
    ),
    "bad tokens": Failure(
        f"{SIDECAR} --tokens {{folder}}/text", 2, "--tokens: {folder}/text: line 1: a role is one of tenant, admin, denied"
    ),
    "bad canaries": Failure(f"{SIDECAR} --canaries {{folder}}/text", 2, "--canaries: {folder}/text: Expected '=' after a key…"),
}

STARTS = {
    "metrics' port": Failure(
        f"{SERVICE} --metrics 127.0.0.1:{{port}}", 1, "--metrics: cannot listen on 127.0.0.1:{port}: Address already in use"
    ),
    "service's socket": Failure(
        f"{SERVICE} --listen unix:{{folder}}/taken", 1, "--listen: cannot listen on unix:{folder}/taken: Address already in use"
    ),
    "folder is a file": Failure(
        f"{SERVICE} --listen unix:{{folder}}/text/s",
        1,
        "--listen: cannot listen on unix:{folder}/text/s: {folder}/text is no directory",
    ),
    "socket is a file": Failure(
        f"{SERVICE} --listen unix:{{folder}}/text", 1, "--listen: cannot listen on unix:{folder}/text: the file is no socket"
    ),
    "state is a file": Failure(
        f"{SERVICE} --self-test off --state-dir {{folder}}/text",
        1,
        "--state-dir: {folder}/text/sequences.json cannot be read: Not a directory: let this user read it…",
    ),
    "missed grade": Failure(
        f"{SERVICE} --self-test off --require-grade EXACT",
        1,
        "--require-grade: EXACT is required, BEST_EFFORT was earned: not tested",
    ),
    "no lmdeploy": Failure(
        f"{TURBOMIND} --model {{folder}}",
        1,
        f"--engine turbomind needs lmdeploy: {install_hint('turbomind')}; without a GPU use --engine llama",
    ),
    "journal is a text": Failure(
        f"{SIDECAR} --journal {{folder}}/text", 1, "--journal: {folder}/text is not a journal, nor any other SQLite file…"
    ),
    "journal below a file": Failure(
        f"{SIDECAR} --journal {{folder}}/text/j",
        1,
        "--journal: the folder {folder}/text cannot be created by user…",
    ),
    "bad mark": Failure(
        f"{SIDECAR} --high-water {{folder}}/text",
        1,
        "--high-water: {folder}/text is no high-water mark (…",
    ),
    "no database": Failure(
        f"{SIDECAR} --journal postgresql://me:tiger@127.0.0.1:1/x",
        1,
        "--journal: the database cannot be reached: connection failed: …",
    ),
    "bad password": Failure(
        f"{SIDECAR} --journal postgresql://me:tiger@127.0.0.1:{{database}}/x?sslmode=disable&gssencmode=disable",
        1,
        "--journal: the database cannot be reached: connection failed: …",
    ),
    "bad URL": Failure(
        f"{SIDECAR} --journal postgresql://me:tiger@h/x?odd=1",
        1,
        "--journal: the URL cannot be read; special characters in it are percent-encoded",
    ),
}

MODELS = {
    "no model": Failure(
        f"{LLAMA} --model {{folder}}/no", 1, "--model: {folder}/no: No such file or directory; name a readable GGUF file"
    ),
    "model is a folder": Failure(
        f"{LLAMA} --model {{folder}}", 1, "--model: {folder}: Is a directory; name a readable GGUF file"
    ),
    "model is a text": Failure(
        f"{LLAMA} --model {{folder}}/text", 1, "--model: {folder}/text: it does not begin with GGUF; name a readable GGUF file"
    ),
    "model is cut in its head": Failure(
        f"{LLAMA} --model {{folder}}/head.gguf", 1, "--model: {folder}/head.gguf: it is cut short; name a readable GGUF file"
    ),
    "model is cut": Failure(
        f"{LLAMA} --model {{folder}}/cut.gguf",
        1,
        "--model: {folder}/cut.gguf: cannot be loaded; llama.cpp says: tensor 'token_embd.weight' data is not within…",
    ),
    "unknown architecture": Failure(
        f"{LLAMA} --model {{folder}}/odd.gguf",
        1,
        "--model: {folder}/odd.gguf: cannot be loaded; llama.cpp says: unknown model architecture: 'odd'",
    ),
    "long context": Failure(
        f"{LLAMA} --context-tokens 8193",
        1,
        "--context-tokens must be at most 8192 for SmolLM2-135M-Instruct.Q4_1.gguf, is 8193",
    ),
}

PROCESSES = {
    "locked journal": Failure(
        f"{SIDECAR} --journal {{folder}}/locked", 1, "--journal: {folder}/locked is in use by another sidecar or command…"
    ),
    "service's port": Failure(
        f"{SERVICE} --engine-secret {{folder}}/secret --listen 127.0.0.1:{{port}}",
        1,
        "--listen: cannot listen on 127.0.0.1:{port}: Address already in use",
    ),
    "sidecar's port": Failure(
        f"{SIDECAR} --listen 127.0.0.1:{{port}}", 1, "--listen: cannot listen on 127.0.0.1:{port}: Address already in use"
    ),
    "probes' port": Failure(
        f"{SIDECAR} --health-listen 127.0.0.1:{{port}}",
        1,
        "--health-listen: cannot listen on 127.0.0.1:{port}: Address already in use",
    ),
    "closed folder": Failure(
        f"{SERVICE} --listen unix:{{folder}}/closed/s",
        1,
        "--listen: cannot listen on unix:{folder}/closed/s: Permission denied",
    ),
    "closed journal": Failure(
        f"{SIDECAR} --journal {{folder}}/closed/j",
        1,
        "--journal: {folder}/closed/j: its folder {folder}/closed cannot be written by user…",
    ),
}

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
        yield {"folder": folder, "port": port.getsockname()[1], "database": refusing}
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


def check(failure: Failure, names: dict[str, object], form: str, code: int, errors: str) -> None:
    """Exit code, and a last line that is the reason; earlier lines are those of every start."""
    program, said = failure.line.split()[0], failure.said.format(**names)
    *before, last = (line for line in errors.splitlines() if "high-water mark is on the journal's file system" not in line)
    if form == "human":
        levels = [line.split()[1] for line in before]
        name, _, reason = last.partition(": ")
    else:
        levels = [json.loads(line)["level"] for line in before]
        record = json.loads(last)
        assert (record["level"], record["exit_code"]) == ("CRITICAL", failure.code), errors
        name, reason = record["logger"], record["message"]

    assert (code, name) == (failure.code, program), errors
    assert reason == said or (said.endswith("…") and reason.startswith(said[:-1])), errors
    assert set(levels) <= {"INFO"}, errors
    assert "Traceback" not in errors and "tiger" not in errors, errors


def argv_of(failure: Failure, names: dict[str, object], form: str) -> list[str]:
    """The program and its flags."""
    program, *flags = failure.line.format(**names).split()
    return [program, "--log-format", form, *flags]


FORMS = pytest.mark.parametrize("form", ["human", "json"])


def in_process(
    failure: Failure, names: dict[str, object], form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts the program in this process, and checks how it fails."""
    program, *flags = argv_of(failure, names, form)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    main = service.__main__.main if program == "service" else sidecar.__main__.main
    with pytest.raises(SystemExit) as exited:
        sys.exit(main())
    code = exited.value.code

    assert isinstance(code, int)
    check(failure, names, form, code, capsys.readouterr().err)


@FORMS
@pytest.mark.parametrize("failure", [*SETTINGS.values(), *STARTS.values()], ids=[*SETTINGS, *STARTS])
@pytest.mark.usefixtures("undisturbed")
def test_a_start_that_fails_says_why(
    failure: Failure, form: str, names: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line names the flag or file and the cause, once; it is one record where the log is JSON."""
    in_process(failure, names, form, capsys, monkeypatch)


@pytest.mark.llama
@pytest.mark.skipif(bool(LACKING), reason=f"without {', '.join(LACKING)}")
@pytest.mark.parametrize("failure", MODELS.values(), ids=MODELS)
@pytest.mark.usefixtures("undisturbed")
def test_a_model_that_cannot_be_loaded_says_why(
    failure: Failure, names: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with a model's file is said in llama.cpp's own words where it is llama.cpp that finds it."""
    in_process(failure, names, "human", capsys, monkeypatch)


@pytest.mark.parametrize("failure", PROCESSES.values(), ids=PROCESSES)
def test_a_process_that_fails_says_why(failure: Failure, names: dict[str, object]) -> None:
    """The same for real processes of an ordinary user: no library adds output."""
    done = python("-c", AS_ANYBODY, *argv_of(failure, names, "human"))

    check(failure, names, "human", done.returncode, done.stderr)


LOW = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(LOW <= 1, reason="every port is allowed for all users here")
def test_a_low_port_is_refused_by_the_kernel(names: dict[str, object]) -> None:
    """A port that only root may have is named, with the kernel's reason."""
    why = "--listen: cannot listen on 127.0.0.1:1: Permission denied"
    test_a_process_that_fails_says_why(
        Failure(f"{SERVICE} --engine-secret {{folder}}/secret --listen 127.0.0.1:1", 1, why), names
    )


def test_serve_lists_the_engines() -> None:
    """`ostinato serve`, and with it `make up`, lists the engines where it is given another."""
    done = python("-m", "ostinato.cli", "serve", "--engine", "vllm")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("'vllm' is not one of 'llama', 'turbomind', 'scripted'.")


def test_the_documented_file_is_one() -> None:
    """The settings file in docs/operations.md is taken by both programs, each its own table."""
    text = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(r"```toml\n(\[service\].*?)```", text, re.DOTALL)
    assert found is not None
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(found[1])
        file.flush()
        served = load(service.config.Settings, "service", ["--config", file.name], {})
        ordered = load(sidecar.config.Settings, "sidecar", ["--config", file.name], {})

    assert (served.runs, served.listen) == (16, ("unix:/run/ostinato/engine.sock",))
    assert (ordered.audit_rate, ordered.vllm_face) == (0.05, True)
