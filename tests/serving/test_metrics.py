"""The metrics page."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client import Counter

from serving.metrics import registry, serve_metrics
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
    served = serve_metrics(mine, "127.0.0.1:0")
    _, text = page(served.port)
    served.close()

    assert "ostinato_here_total 1.0" in text
    assert "process_resident_memory_bytes" in text
    assert "ostinato_there" not in text


def test_exemplars_go_to_those_who_ask_for_openmetrics() -> None:
    """Sequences are exemplars, never labels; only OpenMetrics can carry them."""
    mine = registry()
    Counter("ostinato_here", "here", registry=mine).inc(exemplar={"sequence": "7"})
    served = serve_metrics(mine, "127.0.0.1:0")
    kind, text = page(served.port, "application/openmetrics-text; version=1.0.0")
    _, plain = page(served.port)
    served.close()

    assert kind.startswith("application/openmetrics-text")
    assert 'sequence="7"' in text
    assert "sequence" not in plain


def test_an_empty_address_turns_the_page_off() -> None:
    """Off is a setting, not an error, and can be closed like the rest."""
    served = serve_metrics(registry(), "")
    served.close()

    assert served.port == 0


def test_a_closed_page_frees_its_port() -> None:
    """It may be closed twice, and then the port is free."""
    served = serve_metrics(registry(), "127.0.0.1:0")
    served.close()
    served.close()
    again = serve_metrics(registry(), f"127.0.0.1:{served.port}")
    again.close()

    assert again.port == served.port


def test_a_port_in_use_is_named() -> None:
    """The program stops with the address that it could not have."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}: Address already in use"):
            serve_metrics(registry(), f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["9090", ":9090", "127.0.0.1:http", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    """A bad address stops the program before it serves."""
    with pytest.raises(StartupError):
        serve_metrics(registry(), address)
