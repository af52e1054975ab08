"""The hop between sidecar and service: which end believes which."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ostinato.errors import Disconnected, InvalidRequest, Unauthenticated, from_rpc_error
from ostinato.v1 import engine_pb2, engine_pb2_grpc
from serving import hop
from serving.auth import Credentials
from serving.hop import METADATA, PEER_SUFFIX, ServiceEnd, SidecarEnd, read_secret
from serving.program import StartupError
from serving.server import Server, Unix

SECRET, OTHER = b"s" * 32, b"o" * 32


class Engine(engine_pb2_grpc.EngineServicer):
    """Counts what reaches it."""

    def __init__(self) -> None:
        self.calls = 0

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Any) -> engine_pb2.DescribeResponse:
        self.calls += 1
        return engine_pb2.DescribeResponse()

    Prepare: Any = Describe
    Tokenize: Any = Describe
    GetTokenizer: Any = Describe
    Execute: Any = Describe


@contextlib.asynccontextmanager
async def serving(address: str, end: ServiceEnd | None) -> AsyncIterator[tuple[Engine, str]]:
    """An engine behind this end of the hop, and its address."""
    engine, credentials = Engine(), Credentials(hop=end)
    server = Server([address], registry=CollectorRegistry(), credentials=credentials)
    server.add(engine_pb2_grpc.add_EngineServicer_to_server, engine, "ostinato.v1.Engine")
    await server.start()
    try:
        yield engine, server.addresses[0]
    finally:
        await server.stop(0)


async def described(address: str, metadata: tuple[tuple[str, str], ...], *, stream: bool = False) -> None:
    """Calls Describe, or opens a stream of runs. Raises the error that it has."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: engine_pb2_grpc.EngineAsyncStub = engine_pb2_grpc.EngineStub(channel)
        try:
            if stream:
                await stub.Execute(metadata=metadata).read()  # a write would race with the refusal
            else:
                await stub.Describe(engine_pb2.DescribeRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


async def introduced(address: str, secret: bytes = b"") -> tuple[tuple[str, str], ...]:
    async with grpc.aio.insecure_channel(address) as channel:
        return await SidecarEnd(address, secret).introduced(channel)


@pytest.mark.parametrize(("address", "secret"), [("unix", b""), ("unix", SECRET), ("127.0.0.1:0", SECRET)])
async def test_two_ends_that_belong_together(address: str, secret: bytes, tmp_path: Path) -> None:
    """Two ends of one user over a unix socket, or two that hold one secret, believe each other; a caller without proof, with a
    proof of another service or with two proofs reaches nothing, nor opens a stream of runs."""
    chosen = f"unix:{tmp_path}/engine.sock" if address == "unix" else address
    async with serving(chosen, ServiceEnd(secret)) as (engine, listening):
        proof = await introduced(listening, secret)
        await described(listening, proof)
        for wrong in ((), ((METADATA, "0" * 64),), (*proof, *proof), (("authorization", proof[0][1]),)):
            for stream in (False, True):
                with pytest.raises(Unauthenticated):
                    await described(listening, wrong, stream=stream)

        assert engine.calls == 1
    async with serving(chosen, ServiceEnd(secret)) as (engine, listening):
        with pytest.raises(Unauthenticated):
            await described(listening, proof)
        assert engine.calls == 0, "a proof ends with the service that it was made for"


async def test_another_secret(tmp_path: Path) -> None:
    """A sidecar refuses a service that holds another secret, or none, or does not know the question."""
    async with serving("127.0.0.1:0", ServiceEnd(OTHER)) as (_, listening):
        with pytest.raises(Unauthenticated, match=f"^what listens at {listening} does not hold the secret of --engine-secret$"):
            await introduced(listening, SECRET)
    async with serving(f"unix:{tmp_path}/engine.sock", ServiceEnd()) as (_, listening):
        with pytest.raises(Unauthenticated, match="does not hold the secret of --engine-secret"):
            await introduced(listening, SECRET)
    async with serving("127.0.0.1:0", None) as (_, listening):
        with pytest.raises(Unauthenticated, match="does not introduce itself"):
            await introduced(listening, SECRET)


async def test_a_process_beside_the_service_learns_no_proof(tmp_path: Path) -> None:
    """A process of the same user that listens at the service's path, but has not the key of the socket beside it, is refused
    before the sidecar sends anything but a nonce."""
    async with (
        serving(f"unix:{tmp_path}/real.sock", ServiceEnd()),
        serving(f"unix:{tmp_path}/e.sock", ServiceEnd()) as (engine, e),
    ):
        (tmp_path / f"e.sock{PEER_SUFFIX}").unlink()
        (tmp_path / f"real.sock{PEER_SUFFIX}").rename(tmp_path / f"e.sock{PEER_SUFFIX}")

        with pytest.raises(Unauthenticated, match="does not have the key of the socket beside it"):
            await introduced(e)
        assert engine.calls == 0


async def test_no_service(tmp_path: Path) -> None:
    """A missing service is an error that says so, with and without a socket that a killed one left."""
    with pytest.raises(Disconnected):
        await introduced(f"unix:{tmp_path}/engine.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/engine.sock{PEER_SUFFIX}")
    with pytest.raises(Disconnected):
        await introduced(f"unix:{tmp_path}/engine.sock")
    with pytest.raises(Disconnected):
        await introduced("127.0.0.1:1", SECRET)


AS_USER = """
import asyncio, os, socket, sys, encodings.idna
import grpc
from serving.hop import SidecarEnd
os.setgid(12345), os.setuid(12345)

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        print(await SidecarEnd(sys.argv[1]).introduced(channel))

try:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(sys.argv[1].removeprefix("unix:") + ".peer")
        print("the key:", raw.recv(64))
except OSError as error:
    print(type(error).__name__)
try:
    asyncio.run(main())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user() -> None:
    """A process of another user gets no key, because of the socket's mode, or, where that lets it in, of its user; and it does
    not believe a service of another user."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}

    async def said(address: str) -> str:
        line = [sys.executable, "-c", AS_USER, address]
        done = await asyncio.to_thread(subprocess.run, line, env=env, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240
        peer = Path(f"{folder}/engine.sock{PEER_SUFFIX}")
        async with serving(f"unix:{folder}/engine.sock", ServiceEnd()) as (_, address):
            mode = peer.stat().st_mode & 0o777  # noqa: ASYNC240
            by_mode = await said(address)
            peer.chmod(0o666)  # noqa: ASYNC240
            by_user = await said(address)
    assert mode == 0o600
    assert "PermissionError" in by_mode and "Unauthenticated" in by_mode and "is not for user 12345" in by_mode, by_mode
    assert "the key: b''" in by_user, by_user
    assert "Unauthenticated" in by_user and "belongs to a process of user 0, this one is of user 12345" in by_user, by_user


async def test_the_service_reads_its_callers_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service gives its key to callers of its own user only, as the kernel names them."""
    async with serving(f"unix:{tmp_path}/engine.sock", ServiceEnd()) as (_, listening):
        await introduced(listening)
        monkeypatch.setattr(hop, "peer_uid", lambda connection: os.geteuid() + (1 if _is_services(connection) else 0))
        with pytest.raises(Unauthenticated, match="gave no key"):
            await introduced(listening)


def _is_services(connection: Any) -> bool:
    return str(connection.getsockname()).endswith(PEER_SUFFIX)


@given(st.binary(max_size=64).filter(lambda nonce: len(nonce) != hop.NONCE_BYTES))
async def test_nonces_of_another_length(nonce: bytes) -> None:
    """The service answers a nonce of 32 bytes and no other: what it signs can be nothing else."""
    with pytest.raises(InvalidRequest, match="nonce"):
        await ServiceEnd(SECRET).Introduce(engine_pb2.IntroduceRequest(nonce=nonce), None)


def test_who_is_at_the_other_end() -> None:
    """The kernel names the user of the process at the other end."""
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert hop.peer_uid(one) == os.geteuid()
        assert struct.calcsize("3i") == hop._UCRED.size


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"short", 0o600, "has 5 bytes, at least 32 are needed"),
        (b"x" * 32, 0o604, "mode 0604 lets every user of this machine read it"),
        (None, 0o600, "No such file or directory"),
    ],
)
def test_a_bad_secret(content: bytes | None, mode: int, why: str, tmp_path: Path) -> None:
    """A secret that is short, public or missing stops the program; the error names flag and file, and quotes nothing of it."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(StartupError) as refused:
        read_secret(path)
    assert str(refused.value).startswith(f"--engine-secret: {path}: {why}")


def test_a_secret() -> None:
    """White space around it does not count; without a file there is none."""
    assert read_secret(None) == b""


def test_a_long_path(tmp_path: Path) -> None:
    """A path with no room for the second socket's name is refused, and the flag is named."""
    with pytest.raises(StartupError, match="^--listen: .*a socket's path is at most 107 bytes long"):
        Unix("--listen", Path("/" + "x" * 104)).beside(PEER_SUFFIX)
