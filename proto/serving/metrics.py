"""A registry of our own, and the page that Prometheus scrapes.

prometheus_client's default registry is not used: another library in the process may unregister what is in it. Its server is not
used either: it has a thread for each connection, and no bound of time or number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from serving.program import BAD_CONFIGURATION, StartupError

CONNECTIONS_MAX = 8
"""At once. One more takes the place of the oldest."""
BACKLOG = 128
CONNECTION_SECONDS = 5.0
"""For the whole request to arrive, and for the whole page to be taken."""
HEAD_BYTES_MAX = 8192
"""Of a request: its first line and its header fields."""

App = Callable[[dict[str, str], Callable[..., object]], Iterable[bytes]]


def registry() -> CollectorRegistry:
    """A new registry with the metrics of the process: CPU, memory, open files, interpreter, garbage collection."""
    made = CollectorRegistry(auto_describe=True)
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=made)
    return made


@dataclass(slots=True)
class MetricsServer:
    """The metrics page, on an event loop in a thread of its own: it answers while the program's loop is busy."""

    port: int
    """The real port; 0 where the page is off."""
    _loop: asyncio.AbstractEventLoop | None = None
    _stop: asyncio.Event | None = None
    _thread: threading.Thread | None = None

    def close(self) -> None:
        """Stops serving. May be called again."""
        if self._loop is not None and self._stop is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):  # it is closed already
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


def serve_metrics(registry: CollectorRegistry, address: str) -> MetricsServer:
    """Serves `registry` at `host:port` (port 0: any free one), as OpenMetrics with exemplars where the client accepts it.

    An empty address turns the page off. Raises StartupError that names flag and address, if it cannot listen there.
    """
    if not address:
        return MetricsServer(port=0)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartupError(f"--metrics: {address!r} is not host:port", exit_code=BAD_CONFIGURATION)
    try:
        family, *_, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(where[:2], family=family)
    except OSError as error:  # socket.create_server adds the address to the kernel's words
        why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        raise StartupError(f"--metrics: cannot listen on {address}: {why}") from error
    loop, stop, port_number = asyncio.new_event_loop(), asyncio.Event(), listening.getsockname()[1]

    def run() -> None:
        loop.run_until_complete(_serve(listening, make_wsgi_app(registry), stop))
        loop.close()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    return MetricsServer(port_number, loop, stop, thread)


async def _serve(listening: socket.socket, app: App, stop: asyncio.Event) -> None:
    loop, connections = asyncio.get_running_loop(), list[_Connection]()
    # asyncio accepts as many as its backlog at once, before it looks at the first. The kernel may keep more of them waiting.
    made = lambda: _Connection(loop, app, connections)  # noqa: E731
    server = await loop.create_server(made, sock=listening, backlog=CONNECTIONS_MAX)
    listening.listen(BACKLOG)
    await stop.wait()
    server.close()
    for connection in tuple(connections):
        connection.abort()
    await asyncio.sleep(0)  # the aborted ones close their sockets


class _Connection(asyncio.Protocol):
    """One request, one answer, and the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, app: App, others: list[_Connection]) -> None:
        self._app, self._others = app, others
        self._head = b""
        self._answered = False
        self._late = loop.call_later(CONNECTION_SECONDS, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._others.append(self)
        if len(self._others) > CONNECTIONS_MAX:
            self._others[0].abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        with contextlib.suppress(ValueError):
            self._others.remove(self)

    def abort(self) -> None:
        """Closes at once, whatever is not sent yet."""
        with contextlib.suppress(ValueError):
            self._others.remove(self)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return
        self._head += data
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if end:
            self._answered = True
            self._transport.write(_answer(self._app, head))
            self._transport.close()
        elif len(self._head) > HEAD_BYTES_MAX:
            self.abort()


def _answer(app: App, head: bytes) -> bytes:
    """The whole response to a request's first line and header fields."""
    line, *fields = head.decode("latin-1").split("\r\n")
    method, target, version, *_ = [*line.split(" "), "", ""]
    if not version.startswith("HTTP/1."):
        return b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    for name, _, value in (field.partition(":") for field in fields):
        if name.lower() in ("accept", "accept-encoding"):
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value.strip()
    said: list[Any] = []
    body = b"".join(app(environ, lambda status, headers: said.extend((status, headers))))
    status, headers = said
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
