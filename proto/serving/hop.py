"""The hop between sidecar and service: each end makes sure of the other before it sends anything.

Both ends hold a key. It is the content of a file that both are given (`--engine-secret`). Without one, the service makes a key
at its start and hands it out over a second unix socket beside its first, `….peer`. There the kernel tells each end the user of
the other (SO_PEERCRED), and both accept only their own user. gRPC does not let a program see the sockets of its connections.

    sidecar   Introduce(nonce)    32 random bytes
    service   salt, proof         salt: 32 random bytes of this start; proof: HMAC(key, "service", nonce, salt)
    sidecar   ostinato-hop: …     metadata of every other call: HMAC(key, "sidecar", salt)

So a process that poses as the service gets a nonce and no work. One that poses as a sidecar gets a proof, from which a key of
32 bytes cannot be found, and its other calls are refused. The metadata are of no use once the service has been restarted.
Without TLS, a process on the way between the two can still read and change what they send.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from ostinato.errors import Disconnected, Unauthenticated, from_rpc_error, invalid
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from serving.files import Reloaded, Source, Unusable

METADATA = "ostinato-hop"
PEER_SUFFIX = ".peer"
"""Of the socket that hands the key out."""
NONCE_BYTES = KEY_BYTES = 32
FLAG = "--engine-secret"
ANSWER_SECONDS = 5.0
"""For the service's answer to an introduction."""
SHORT_BYTES, ITEM_BYTES, MESSAGE_BYTES = 4096, 40, 128
"""A longer request to prepare has a call of its own, and a thread in the service; a shorter one takes its event loop 1.5 ms at
most. An item, which takes about 16 us, and a message of a chat, which takes up to 30 us, count as that many bytes more."""

Metadata = tuple[tuple[str, str], ...]
_UCRED = struct.Struct("=iII")
"""Process, user, group."""
_REMEDY = f"run both programs as one user, or give both {FLAG}"
_log = logging.getLogger(__name__)


def text_cost(request: engine_pb2.PrepareRequest | generation_pb2.TokenizeRequest) -> int:
    """What it costs to prepare a request, without its grammars, in bytes of text."""
    messages = sum(len(item.chat.messages) for item in request.items if item.HasField("chat"))
    return request.ByteSize() + ITEM_BYTES * len(request.items) + MESSAGE_BYTES * messages


def is_short(request: engine_pb2.PrepareRequest | generation_pb2.TokenizeRequest) -> bool:
    """Whether preparing it delays no other request: few items with little text, and no grammar to compile."""
    if isinstance(request, engine_pb2.PrepareRequest) and request.parameters.HasField("response_format"):
        return False
    return text_cost(request) <= SHORT_BYTES and not any(item.parameters.HasField("response_format") for item in request.items)


def read_secret(path: Path | None) -> bytes:
    """The content of the secret's file, without white space around it; empty: there is no file. Raises StartupError."""

    def parse(contents: Mapping[str, bytes]) -> bytes:
        secret = contents[FLAG].strip()
        if len(secret) < KEY_BYTES:
            raise Unusable(FLAG, f"has {len(secret)} bytes, at least {KEY_BYTES} are needed: openssl rand -hex 32")
        return secret

    return Reloaded([Source(FLAG, path, private=True)], parse).value if path is not None else b""


def peer_uid(connection: Any) -> int:
    """The user at the other end of a unix socket, from the kernel."""
    return int(_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def _proof(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"\0".join((b"ostinato hop 1", *parts)), "sha256")


class ServiceEnd(engine_pb2_grpc.HopServicer):
    """The service's end, for one run of the process."""

    def __init__(self, secret: bytes = b"") -> None:
        """`secret`: as of `read_secret`; empty: callers over unix sockets get a key that is made here."""
        self.shared = bool(secret)
        """Whether the key is that of a file."""
        self._key = secret or secrets.token_bytes(KEY_BYTES)
        self._salt = secrets.token_bytes(NONCE_BYTES)
        self._expected = _proof(self._key, b"sidecar", self._salt).hex().encode()
        self._peers: list[asyncio.Server] = []
        self._refused: set[int] = set()
        """Users that were refused; each is logged once."""

    async def Introduce(self, request: engine_pb2.IntroduceRequest, context: Any) -> engine_pb2.IntroduceResponse:  # noqa: N802
        if len(request.nonce) != NONCE_BYTES:
            raise invalid("nonce", f"must have {NONCE_BYTES} bytes")
        return engine_pb2.IntroduceResponse(salt=self._salt, proof=_proof(self._key, b"service", request.nonce, self._salt))

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raises Unauthenticated for a call that does not come from the sidecar."""
        given = [value for name, value in metadata if name == METADATA]
        if len(given) != 1 or not hmac.compare_digest(str(given[0]).encode(), self._expected):
            raise Unauthenticated("only the sidecar may call the service, and this caller has not shown that it holds the key")

    async def hand_out(self, listening: socket.socket) -> None:
        """Hands the key out over this listening unix socket, to callers of this process's user, until `close`."""
        self._peers.append(await asyncio.start_unix_server(self._give, sock=listening))

    async def _give(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = peer_uid(writer.get_extra_info("socket"))
        if uid == os.geteuid():
            writer.write(self._key)
        elif uid not in self._refused:
            self._refused.add(uid)
            _log.warning("another user's process was refused", extra={"uid": uid, "own_uid": os.geteuid()})
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def close(self) -> None:
        for server in self._peers:
            server.close()


class SidecarEnd:
    """The sidecar's end."""

    def __init__(self, target: str, secret: bytes = b"") -> None:
        """`target`: the service's address; `secret`: as of `read_secret`, needed unless the address is a unix socket."""
        self._target, self._secret = target, secret
        assert secret or target.startswith("unix:"), "checked by the settings"

    async def introduced(self, channel: grpc.aio.Channel) -> Metadata:
        """The metadata of every other call over this channel, once the service has proved itself. Raises Disconnected if there
        is no service, Unauthenticated for a process that is not it."""
        key, nonce = self._secret or await self._key(), secrets.token_bytes(NONCE_BYTES)
        try:
            stub: engine_pb2_grpc.HopAsyncStub = engine_pb2_grpc.HopStub(channel)
            request = engine_pb2.IntroduceRequest(nonce=nonce)
            answer: engine_pb2.IntroduceResponse | None = await stub.Introduce(request, timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            if isinstance(error, Disconnected):
                raise error from None
            raise Unauthenticated(f"what listens at {self._target} does not introduce itself: {error.message}") from None
        salt, proof = (answer.salt, answer.proof) if answer is not None else (b"", b"")  # None: gRPC could not parse it
        if len(salt) != NONCE_BYTES or not hmac.compare_digest(proof, _proof(key, b"service", nonce, salt)):
            why = f"hold the secret of {FLAG}" if self._secret else "have the key of the socket beside it"
            raise Unauthenticated(f"what listens at {self._target} does not {why}")
        return ((METADATA, _proof(key, b"sidecar", salt).hex()),)

    async def _key(self) -> bytes:
        """From the socket beside the service's."""
        path = f"{self._target.removeprefix('unix:')}{PEER_SUFFIX}"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    uid = peer_uid(writer.get_extra_info("socket"))
                    if uid != os.geteuid():
                        owner = f"{path} belongs to a process of user {uid}, this one is of user {os.geteuid()}"
                        raise Unauthenticated(f"{owner}; {_REMEDY}")
                    return await reader.readexactly(KEY_BYTES)
                finally:
                    writer.close()
        except asyncio.IncompleteReadError:
            raise Unauthenticated(f"{path} gave no key: it sees this process as another user; {_REMEDY}") from None
        except PermissionError:
            raise Unauthenticated(f"{path} is not for user {os.geteuid()}; {_REMEDY}") from None
        except (OSError, TimeoutError):
            raise Disconnected("the service cannot be reached") from None
