"""A registry of our own, and the page that Prometheus scrapes.

prometheus_client's default registry is not used: another library in the process may unregister what is in it. Of its server
only the page is used: the rest has a thread for each connection, and no bound of time or number.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import sys
import threading
from collections.abc import Iterator
from wsgiref.handlers import SimpleHandler
from wsgiref.types import WSGIApplication

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from serving.program import BAD_CONFIGURATION, StartupError

CONNECTIONS_MAX = 8
"""At once. One more takes the place of the oldest."""
BACKLOG = 128
CONNECTION_SECONDS = 5.0
"""For the whole request to arrive, and for the whole page to be taken."""
HEAD_BYTES_MAX = 8192
"""Of a request: its first line and its header fields."""


def registry() -> CollectorRegistry:
    """A new registry with the metrics of the process: CPU, memory, open files, interpreter, garbage collection."""
    made = CollectorRegistry(auto_describe=True)
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=made)
    return made


@contextlib.contextmanager
def serve_metrics(registry: CollectorRegistry, address: str) -> Iterator[int]:
    """Serves `registry` at `host:port` (port 0: any free one) until the context ends, as OpenMetrics with exemplars where the
    client accepts it. The event loop has a thread of its own: it answers while the program's loop is busy. The value is the
    real port.

    An empty address turns the page off, and the value is 0. Raises StartupError that names flag and address, if it cannot
    listen there.
    """
    if not address:
        yield 0
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartupError(f"--metrics: {address!r} is not host:port", exit_code=BAD_CONFIGURATION)
    try:
        family, *_, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(where[:2], family=family)
    except OSError as error:  # socket.create_server adds the address to the kernel's words
        why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        raise StartupError(f"--metrics: cannot listen on {address}: {why}") from error
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        loop.run_until_complete(_serve(listening, make_wsgi_app(registry), stop))
        loop.close()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    real_port = listening.getsockname()[1]
    thread.start()
    try:
        yield real_port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _serve(listening: socket.socket, app: WSGIApplication, stop: asyncio.Event) -> None:
    """One request a connection, until `stop`."""
    connections = list[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) > CONNECTIONS_MAX:
            connections.pop(0).transport.abort()
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                writer.write(_answer(app, await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # at once, whatever is not sent yet
        finally:
            if writer in connections:
                connections.remove(writer)

    # asyncio accepts as many as its backlog at once, before it looks at the first. The kernel may keep more of them waiting.
    server = await asyncio.start_server(answer, sock=listening, limit=HEAD_BYTES_MAX, backlog=CONNECTIONS_MAX)
    listening.listen(BACKLOG)
    await stop.wait()
    server.close()
    for connection in connections:
        connection.transport.abort()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def _answer(app: WSGIApplication, head: bytes) -> bytes:
    """The whole response to a request's first line and header fields."""
    line, *fields = head.decode("latin-1").split("\r\n")
    method, target, version, *_ = [*line.split(" "), "", ""]
    if not version.startswith("HTTP/1."):
        return b"HTTP/1.0 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "SERVER_PROTOCOL": version}
    for name, _, value in (field.partition(":") for field in fields):
        environ[f"HTTP_{name.upper().replace('-', '_')}"] = value.strip()
    response = io.BytesIO()
    SimpleHandler(io.BytesIO(), response, sys.stderr, environ).run(app)
    return response.getvalue()
