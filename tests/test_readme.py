"""README, tried: its commands in the order in which they stand, in a clean copy, and what they print against what it shows."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pair import PROOFS, ROOT, held_port
from tests.waiting import until

pytestmark = [pytest.mark.llama, pytest.mark.timeout(400)]
STAMPS = (".programs", ".gateway", ".installed")
"""What the Makefile takes for installed."""
NOT_TRIED = re.compile(r"^(make test\b|pip install\b|make gpu-check\b|make up ENGINE=turbomind\b|ostinato serve\b)")
"""Commands that install, that need a GPU, or that test all of this."""
SERVES = re.compile(r"^make up\b")
SERVING = "Ctrl-C stops it all"
SECONDS = 240.0


@dataclass
class Reader:
    """Someone who types what README says, in two terminals."""

    home: Path
    environment: dict[str, str]
    replaced: dict[str, str]
    """Addresses that README names, and those that are free here."""
    serving: subprocess.Popen[bytes] | None = None

    def types(self, text: str, interpreter: str = "bash") -> str:
        """What a block prints; it must succeed."""
        for ours, theirs in self.replaced.items():
            text = text.replace(ours, theirs)
        command = ["bash", "-euo", "pipefail", "-c", text] if interpreter == "bash" else ["python", "-c", text]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    @property
    def served(self) -> str:
        """What the first terminal shows."""
        return (self.home / "served").read_text()

    def serves(self, text: str) -> None:
        """The same for what runs until Ctrl-C; it goes on when it says that it serves."""
        self.interrupts()
        with (self.home / "served").open("w") as out:
            serving = self.serving = subprocess.Popen(
                ["bash", "-c", text], cwd=self.home, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        until(lambda: SERVING in self.served or serving.poll() is not None, SERVING, SECONDS)
        assert SERVING in self.served, self.served

    def interrupts(self) -> None:
        """Ctrl-C in the first terminal: all in it gets the signal."""
        if self.serving is not None:
            os.killpg(self.serving.pid, signal.SIGINT)
            self.serving.wait(SECONDS)
            assert "Traceback" not in self.served
            self.serving = None


@pytest.fixture(name="reader")
def _reader(tmp_path: Path) -> Iterator[Reader]:
    home = tmp_path / "a checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, home / name)
    _install(home)
    (home / ".run" / "service").mkdir(parents=True)
    (home / ".run" / "service" / "proofs").symlink_to(PROOFS)
    with held_port() as door, held_port() as gateway:
        target, openai = (f"127.0.0.1:{held.getsockname()[1]}" for held in (door, gateway))
        mine = {
            "LISTEN": target,
            "OSTINATO_TARGET": target,
            "METRICS": "127.0.0.1:0",
            "SERVICE_METRICS": "127.0.0.1:0",
            "GATEWAY_PORT": openai.rpartition(":")[2],
            "PATH": f"{home}/.venv/bin:{os.environ['PATH']}",
        }
        foreign = ("OSTINATO_", "PYTHON", "MAKE", "MFLAGS")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        reader = Reader(home, inherited | mine, {"127.0.0.1:7001": target, "127.0.0.1:8000": openai})
        try:
            yield reader
        finally:
            reader.interrupts()


def _install(home: Path) -> None:
    """What the Makefile would: an environment with this checkout, and the packages of the present one."""
    folder = home / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "all.pth").write_text(f"{home}\n{home}/proto\n{sysconfig.get_path('purelib')}\n")
    command = folder / "bin" / "ostinato"
    command.write_text(f"#!/bin/sh\nexec '{folder}/bin/python' -c 'from ostinato.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    (folder / "bin" / "buf").symlink_to(Path(sys.executable).with_name("buf"))
    for stamp in STAMPS:
        (folder / stamp).touch()


def blocks() -> list[tuple[str, str]]:
    """Language and text of each of README's blocks, in order."""
    text = (ROOT / "README.md").read_text()
    return [(language, body) for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def tried(body: str) -> str:
    """The block without what is not tried."""
    return "".join(line for line in body.splitlines(keepends=True) if not NOT_TRIED.match(line))


def masked(text: str) -> list[str]:
    """Lines without what may differ from machine to machine: digests, times, derived seeds, and the model's words."""
    lines = []
    for line in text.splitlines():
        kept = re.sub(r"\b[0-9a-f]{12,32}\b", "DIGEST", line)
        kept = re.sub(r"(?<= )\d+\.\d (?! *s)\s*.*", "MS", kept)  # and the text behind it
        kept = re.sub(r"\d+\.\d s", "SECONDS", kept)
        kept = re.sub(r"│ +\d{16,20} │", "│ SEED │", kept)
        kept = re.sub(r"(DIGEST │).*", r"\1", kept)
        lines.append(re.sub(r"[ ─━]+", " ", kept).strip())
    return lines


def test_readme_does_what_it_says(reader: Reader) -> None:
    """Every command of README that needs no GPU works as it stands there and prints what README shows below it; what an OpenAI
    client was answered is what `ostinato get --last` shows next."""
    output: str | None = None
    compared = 0
    for language, body in blocks():
        if language == "sh" and SERVES.match(tried(body)):
            reader.serves(tried(body))
        elif language == "sh" and tried(body):
            output = reader.types(tried(body))
            if "get --last" in body:
                assert f"request id     {json.loads(output.splitlines()[0])['id']}" in output
                compared += 1
        elif language == "python":
            assert len(ast.literal_eval(reader.types(body, "python"))) == 3
        elif not language and output is not None:
            printed = masked(output)
            shown = [line for line in masked(body) if re.match(r"\w|✓|│ (seed|no seed)", line)]
            assert shown
            assert [line for line in shown if line not in printed] == [], output
            output, compared = None, compared + 1
    assert compared == 5
