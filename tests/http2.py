"""An HTTP/2 client that does what gRPC's own clients do not: it grants no window, resets a stream, breaks a connection off."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable

FRAME_BYTES = 16384
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE, WINDOW_MAX, CANCEL = 4, (1 << 31) - 1, 8


class Peer:
    """One connection. `window`: bytes that the server may send on a stream before the peer grants more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader, self._writer = reader, writer
        self._last = -1
        self._initial_room = 65535
        self._room: defaultdict[int, int] = defaultdict(lambda: self._initial_room, {0: self._initial_room})
        """Bytes that the server lets us send, by stream; 0 is the connection."""
        self._granted = asyncio.Event()
        self.data: defaultdict[int, bytearray] = defaultdict(bytearray)
        """What came as DATA, by stream."""
        self.headers: defaultdict[int, bytearray] = defaultdict(bytearray)
        """HPACK blocks as they came, by stream. gRPC writes new names and values in plain text."""
        self.ended: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        """Set when the server has ended or reset a stream."""
        writer.write(PREFACE)
        self._send(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        self._send(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW_MAX - 65535))
        self.greeted = asyncio.Event()
        """Set when the server has taken the connection up: it has sent its settings."""
        self._reading = asyncio.create_task(self._read())

    def call(self, path: str, message: bytes, metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Begins a gRPC call with one message, and minds no window. Its stream."""
        stream = self.begin(path, metadata)
        self._send(DATA, END_STREAM, stream, framed(message))
        return stream

    def begin(self, path: str, metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Begins a gRPC call: the headers alone. Its stream."""
        self._last = stream = self._last + 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"), ("te", "trailers")]
        block = b"".join(_literal(*field) for field in [*fields, ("content-type", "application/grpc"), *metadata])
        self._send(HEADERS, END_HEADERS, stream, block)
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Bytes of a call, as the server's windows let them through; fewer if the call ends meanwhile."""
        while data and not self.ended[stream].is_set() and not self.over:
            room = min(self._room[0], self._room[stream], FRAME_BYTES)
            if room <= 0:
                self._granted.clear()
                await self._granted.wait()
                continue
            part, data = data[:room], data[room:]
            self._room[0] -= len(part)
            self._room[stream] -= len(part)
            self._send(DATA, END_STREAM if end and not data else 0, stream, part)
            await self.drain()

    async def drain(self) -> None:
        """Until the kernel has taken most of what was sent."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    @property
    def over(self) -> bool:
        """Whether the server has closed the connection."""
        return self._reading.done()

    def grant(self, stream: int, count: int = WINDOW_MAX // 2) -> None:
        """Allow the server to send this many more bytes on the stream."""
        self._send(WINDOW_UPDATE, 0, stream, struct.pack(">I", count))

    def reset(self, stream: int) -> None:
        """Ends a call as a client does that cancels it."""
        self._send(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))

    def vanish(self) -> None:
        """Ends the connection by a TCP reset, without a word of HTTP/2."""
        given: socket.socket = self._writer.get_extra_info("socket")
        given.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._reading
            await self._writer.wait_closed()

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self._writer.write(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await self._reader.readexactly(9)
                length, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
                payload = await self._reader.readexactly(length)
                if kind in (SETTINGS, PING) and not flags & ACK:
                    self._send(kind, ACK, 0, payload if kind == PING else b"")
                    if kind == SETTINGS:
                        self._settings(payload)
                elif kind == WINDOW_UPDATE:
                    self._room[stream] += int.from_bytes(payload)
                    self._granted.set()
                elif kind == DATA:
                    self.data[stream] += payload
                elif kind == HEADERS:
                    self.headers[stream] += payload
                if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                    self.ended[stream].set()
                    self._granted.set()
        self._granted.set()

    def _settings(self, payload: bytes) -> None:
        self.greeted.set()
        for name, value in struct.iter_unpack(">HI", payload):
            if name == INITIAL_WINDOW_SIZE:
                for stream in self._room.keys() - {0}:
                    self._room[stream] += value - self._initial_room
                self._initial_room = value
                self._granted.set()


@contextlib.asynccontextmanager
async def connected(target: str, window: int = 0) -> AsyncIterator[Peer]:
    """A peer of the server at this address: host:port or unix:/path."""
    if target.startswith("unix:"):
        opened = await asyncio.open_unix_connection(target.removeprefix("unix:"))
    else:
        host, _, port = target.rpartition(":")
        opened = await asyncio.open_connection(host, int(port))
    peer = Peer(*opened, window)
    try:
        yield peer
    finally:
        await peer.close()


def framed(message: bytes, length: int | None = None) -> bytes:
    """As gRPC has it in DATA; `length`: announced, where the message is only a part."""
    return struct.pack(">BI", 0, len(message) if length is None else length) + message


def _literal(name: str, value: str) -> bytes:
    """A header field, not indexed and not Huffman coded."""
    assert len(name) < 127 and len(value) < 127, "one byte of length each"
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
