"""The metrics page."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import Counter

from serving.metrics import CONNECTIONS_MAX, HEAD_BYTES_MAX, registry, serve_metrics
from serving.program import StartupError


def page(port: int, accept: str = "") -> tuple[str, str]:
    """Content type and text of the page."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_page_shows_its_registry() -> None:
    """The page has our metrics and those of the process, and no metrics of another registry."""
    mine, other = registry(), registry()
    Counter("ostinato_here", "here", registry=mine).inc()
    Counter("ostinato_there", "there", registry=other).inc()
    with serve_metrics(mine, "127.0.0.1:0") as port:
        _, text = page(port)

    assert "ostinato_here_total 1.0" in text
    assert "process_resident_memory_bytes" in text
    assert "ostinato_there" not in text


def test_exemplars_go_to_those_who_ask_for_openmetrics() -> None:
    """Sequences are exemplars, never labels; only OpenMetrics can carry them."""
    mine = registry()
    Counter("ostinato_here", "here", registry=mine).inc(exemplar={"sequence": "7"})
    with serve_metrics(mine, "127.0.0.1:0") as port:
        kind, text = page(port, "application/openmetrics-text; version=1.0.0")
        _, plain = page(port)

    assert kind.startswith("application/openmetrics-text")
    assert 'sequence="7"' in text
    assert "sequence" not in plain


def test_a_closed_page_frees_its_port() -> None:
    """Another page can be served there at once. An empty address serves none."""
    with serve_metrics(registry(), "") as off:
        assert off == 0
    with serve_metrics(registry(), "127.0.0.1:0") as port:
        pass
    with serve_metrics(registry(), f"127.0.0.1:{port}") as again:
        assert again == port


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("9090", "is not host:port"),
        (":9090", "is not host:port"),
        ("127.0.0.1:http", "is not host:port"),
        ("127.0.0.1:70000", "is not host:port"),
        ("127.0.0.1:{taken}", "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ("no.such.host.invalid:1", "cannot listen on no.such.host.invalid:1: "),
    ],
)
def test_an_address_that_cannot_be_had(address: str, why: str) -> None:
    """It stops the program before it serves, with its flag and the reason of the kernel or the resolver."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with (
            pytest.raises(StartupError, match=f"^--metrics: .*{why.format(taken=taken)}"),
            serve_metrics(registry(), address.format(taken=taken)),
        ):
            pass


def half(port: int, said: bytes = b"GET /metrics HTTP/1.1\r\nHost: ") -> socket.socket:
    """A connection that has sent half a request."""
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.sendall(said)
    return made


def closed(connection: socket.socket) -> bool:
    """Whether the server closes the connection without an answer."""
    with connection, contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def sockets() -> int:
    """Open sockets of this process."""
    with os.scandir("/proc/self/fd") as entries:
        return sum(Path(entry.path).is_socket() for entry in entries)


def test_idle_half_requests_take_no_more_than_the_bound() -> None:
    """Of many half requests only the newest CONNECTIONS_MAX have a descriptor, none has a thread, and a scrape gets its page
    meanwhile."""
    with serve_metrics(registry(), "127.0.0.1:0") as port:
        page(port)
        before, threads = sockets(), threading.active_count()
        halves = [half(port) for _ in range(100)]
        _, text = page(port)

        assert "process_open_fds" in text
        assert sockets() - before - len(halves) <= CONNECTIONS_MAX
        assert threading.active_count() <= threads
        assert all(closed(each) for each in halves[:-CONNECTIONS_MAX])
        for each in halves[-CONNECTIONS_MAX:]:
            each.close()


def test_a_half_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not arrive in time, or has no end, is dropped; so is a page that is not taken."""
    monkeypatch.setattr("serving.metrics.CONNECTION_SECONDS", 0.2)
    with serve_metrics(registry(), "127.0.0.1:0") as port:
        assert closed(half(port))
        assert closed(half(port, b"x" * (HEAD_BYTES_MAX + 1)))


@pytest.mark.parametrize("said", [b"GET\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\xff\r\n\r\n"])
def test_another_protocol(said: bytes) -> None:
    """What is no request of HTTP/1 is answered with 400."""
    with serve_metrics(registry(), "127.0.0.1:0") as port, half(port, said) as connection:
        assert connection.makefile("rb").readline() == b"HTTP/1.0 400 Bad Request\r\n"


def test_the_page_is_for_reading() -> None:
    """Another method is 405; a page may be compressed and restricted to some names."""
    mine = registry()
    Counter("ostinato_here", "here", registry=mine).inc()
    with serve_metrics(mine, "127.0.0.1:0") as port:
        with half(port, b"POST /metrics HTTP/1.1\r\n\r\n") as connection:
            assert connection.makefile("rb").readline() == b"HTTP/1.0 405 Method Not Allowed\r\n"
        said = b"GET /metrics?name[]=ostinato_here_total HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
        with half(port, said) as connection:
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert gzip.decompress(body).decode().splitlines()[-1] == "ostinato_here_total 1.0"
