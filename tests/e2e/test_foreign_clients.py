"""Clients in other languages: the examples in Node and C++, and buf with reflection only."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from tests.pair import ROOT, Pair, running_pair

EXAMPLES = ROOT / "docs" / "examples"
BUILD = ROOT / "build" / "examples"
"""Where npm's packages and compiled stubs are kept from one run to the next."""
BUF = Path(sys.executable).parent / "buf"
SEED_MAX = 2**64 - 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One with two addresses: a port and a socket file."""
    socket = tmp_path_factory.mktemp("door") / "door.sock"
    with running_pair(service=["--self-test", "off"], sidecar=["--listen", f"127.0.0.1:0,unix:{socket}"]) as pair:
        yield pair


def targets(pair: Pair) -> list[str]:
    return str(pair.sidecar.wait_for("listening")["addresses"]).split(",")


@pytest.fixture(params=[0, 1], ids=["tcp", "unix"])
def target(request: pytest.FixtureRequest, pair: Pair) -> str:
    number: int = request.param
    return targets(pair)[number]


def run(*command: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=seconds, cwd=ROOT)


# ---- docs/examples


@pytest.fixture(scope="module")
def node() -> list[str | Path]:
    """The example's command line; skips, and says why, where Node or its packages cannot be had."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip(f"{'node' if program is None else 'npm'} is not installed")
    modules = BUILD / "node"
    modules.mkdir(parents=True, exist_ok=True)
    wanted, had = EXAMPLES / "node" / "package.json", modules / "package.json"
    if not had.is_file() or had.read_text() != wanted.read_text() or not (modules / "node_modules").is_dir():
        shutil.rmtree(modules / "node_modules", ignore_errors=True)
        install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
        shutil.copy(wanted, had)
        try:
            subprocess.run(install, cwd=modules, capture_output=True, text=True, timeout=40, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            had.unlink()
            pytest.skip(f"npm cannot install the packages: {error}: {error.stderr!r}"[:500])
    return ["env", f"NODE_PATH={modules / 'node_modules'}", program, EXAMPLES / "node" / "client.js", ROOT / "proto"]


@pytest.fixture(scope="module")
def cpp() -> list[str | Path]:
    """The same in C++, its stubs generated and compiled; skips, and says why, where the tools for that are not."""
    for program in ("make", "g++", "protoc", "grpc_cpp_plugin", "pkg-config"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode:
        pytest.skip("the headers of gRPC and protobuf for C++ are not installed")
    built = run("make", "-j2", "-C", EXAMPLES / "cpp", f"PROTO={ROOT / 'proto'}", f"BUILD={BUILD / 'cpp'}", seconds=240)
    assert built.returncode == 0, built.stderr
    return [BUILD / "cpp" / "client"]


@pytest.fixture(scope="module", params=["node", "cpp"])
def said(request: pytest.FixtureRequest, pair: Pair) -> list[dict[str, Any]]:
    """What an example received, over each address."""
    command = request.getfixturevalue(request.param)
    answers = []
    for target in targets(pair):
        done = run(*command, target)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    return answers


@pytest.mark.timeout(300)  # of the first, which may have to compile
def test_an_example_generates(pair: Pair, said: list[dict[str, Any]]) -> None:
    """A batch is answered, in order; the largest seed and seed 0 come back exact, digests whole, enums by name."""
    for answer in said:
        results = answer["unary"]["results"]

        assert [result["output"]["seed"] for result in results] == [str(SEED_MAX), "0"]
        assert [result["receipt"]["header"]["seed"] for result in results] == [str(SEED_MAX), "0"]
        for result in results:
            output = result["output"]
            assert output["finish_reason"] == "FINISH_REASON_LENGTH"
            assert len(output["token_ids"]) == len(output["logprobs"]) == 8
            assert output["text"] == bytes(output["token_ids"]).decode()
            assert len(base64.b64decode(result["receipt"]["entry_hash"])) == 32


def test_an_example_streams(pair: Pair, said: list[dict[str, Any]]) -> None:
    """Admitted, tokens, and an end for each item; the tokens are those of the unary answer to the same request."""
    for answer in said:
        events = answer["events"]
        kinds = [next(kind for kind in ("admitted", "tokens", "finished") if event.get(kind)) for event in events]

        assert kinds[0] == "admitted" and kinds.count("finished") == 2
        first = int(events[0]["admitted"]["stamp"]["first_sequence"])
        runs = [run for event, kind in zip(events, kinds, strict=True) if kind == "tokens" for run in event["tokens"]["runs"]]
        for sequence, result in enumerate(answer["unary"]["results"], first):
            streamed = [token for run in runs if run["sequence"] == str(sequence) for token in run["token_ids"]]
            assert streamed == result["output"]["token_ids"]


def test_an_example_reads_a_refusal(pair: Pair, said: list[dict[str, Any]]) -> None:
    """The standard details have code, reason and the bad field."""
    for answer in said:
        assert answer["refused"] == {"code": 3, "reason": "INVALID_REQUEST", "fields": ["parameters.top_p"]}


# ---- buf


def curl(target: str, *args: str, method: str = "") -> subprocess.CompletedProcess[str]:
    """`buf curl` with what the server says of itself."""
    if not BUF.exists():
        pytest.skip("buf is not installed")
    where: Sequence[str] = [f"http://{target}/{method}"]
    if target.startswith("unix:"):
        where = ["--unix-socket", target.removeprefix("unix:"), f"http://localhost/{method}"]
    return run(BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *args, *where)


def generate(target: str, request: object) -> subprocess.CompletedProcess[str]:
    return curl(target, "-d", json.dumps(request), method="ostinato.v1.Generation/Generate")


def test_buf_generates(pair: Pair, target: str) -> None:
    """JSON in, JSON out, uint64 as text."""
    answered = generate(target, {"items": [{"text": "Shanghai is"}], "parameters": {"seed": str(SEED_MAX), "maxNewTokens": 4}})

    assert answered.returncode == 0, answered.stderr
    (result,) = json.loads(answered.stdout)["results"]
    assert result["output"]["seed"] == str(SEED_MAX)
    assert 1 <= len(result["output"]["tokenIds"]) <= 4


def test_buf_shows_a_refusal(pair: Pair, target: str) -> None:
    """The status with its details on stderr as JSON, and 8 times its code as the exit code."""
    refused = generate(target, {"items": [{"text": ""}]})

    assert refused.returncode == 8 * 3, refused
    status = json.loads(refused.stderr)
    assert status["code"] == "invalid_argument"
    assert status["message"] == "items[0].text: is empty"
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for message, detail in zip((info, bad), status["details"], strict=True):
        assert detail["type"] == message.DESCRIPTOR.full_name
        message.ParseFromString(base64.b64decode(detail["value"] + "=="))
    assert info.reason == "INVALID_REQUEST"
    assert [each.field for each in bad.field_violations] == ["items[0].text"]
