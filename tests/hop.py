"""A test's end of the hop between sidecar and service."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc

from ostinato import errors
from ostinato.v1 import engine_pb2_grpc
from serving.hop import SidecarEnd


class Engine:
    """A stub of Engine whose calls bring the sidecar's proof."""

    def __init__(self, channel: Any, proof: tuple[tuple[str, str], ...]) -> None:
        self._stub, self._proof = engine_pb2_grpc.EngineStub(channel), proof

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=self._proof)


async def proved(channel: grpc.aio.Channel, address: str, secret: bytes = b"") -> Any:
    """A stub over this channel to the service at this address, once it listens."""
    while True:
        try:
            return Engine(channel, await SidecarEnd(address, secret).introduced(channel))
        except errors.Disconnected:
            await asyncio.sleep(0.05)


def proof(address: str) -> tuple[tuple[str, str], ...]:
    """For a stub of a test without an event loop."""

    async def introduced() -> tuple[tuple[str, str], ...]:
        async with grpc.aio.insecure_channel(address) as channel:
            return await SidecarEnd(address).introduced(channel)

    return asyncio.run(introduced())
