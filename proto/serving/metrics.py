"""A registry of our own, and the page that Prometheus scrapes.

prometheus_client's default registry is not used: another library in the process may unregister what is in it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server

from serving.program import BAD_CONFIGURATION, StartupError


def registry() -> CollectorRegistry:
    """A new registry with the metrics of the process: CPU, memory, open files, interpreter, garbage collection."""
    made = CollectorRegistry(auto_describe=True)
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=made)
    return made


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """The metrics page, served by threads of its own."""

    port: int
    """The real port; 0 where the page is off."""
    _server: WSGIServer | None = None
    _thread: threading.Thread | None = None

    def close(self) -> None:
        """Stops serving. May be called again."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
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
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise StartupError(f"--metrics: cannot listen on {address}: {error.strerror or error}") from error
    return MetricsServer(server.server_port, server, thread)
