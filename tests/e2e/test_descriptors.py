"""A sidecar with few descriptors, and callers that take what they can get."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostinato.client import Client

from tests.pair import Pair

HALVES = {"metrics": b"GET /metrics HTTP/1.1\r\nHost: ", "door": b"PRI * HTTP/2.0\r\n"}


@contextlib.contextmanager
def idle(port: int, count: int, said: bytes) -> Iterator[None]:
    """This many connections that have sent half a request."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):  # the server may close it
                made = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                made.sendall(said)
        yield


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("where", "limit"), [("metrics", 256), ("door", 64)])
async def test_half_requests_leave_descriptors(where: str, limit: int) -> None:
    """With `ulimit -n` of 64 or 256, more idle half requests than that, to the metrics page or to the door, leave the sidecar
    descriptors for its journal and for a service that has been restarted, and take no processor time. A caller that was
    connected is served meanwhile, and so is a scrape of the page."""
    pair = Pair(sidecar=["--reconnect-seconds", "0.05"])
    pair.descriptors = limit
    with pair:
        pair.start()
        pid = pair.sidecar.pid
        port = pair.sidecar.metrics_port if where == "metrics" else int(pair.target.rpartition(":")[2])
        async with Client(pair.target) as client:
            await client.generate("before", max_new_tokens=1)
            with idle(port, limit + 40, HALVES[where]):
                began, used = time.monotonic(), processor_seconds(pid)
                await asyncio.sleep(1)
                busy = (processor_seconds(pid) - used) / (time.monotonic() - began)
                taken = descriptors(pid)
                pair.service.kill()
                pair.start_service()

                await client.generate("meanwhile", key="until the restarted service is connected", max_new_tokens=1, timeout=60)
                scraped = pair.metrics()["process_open_fds"]
        assert taken <= limit - 16
        assert busy < 0.5
        assert scraped <= limit
        assert pair.sidecar.running
    assert not [record for record in pair.sidecar.records() if record["level"] in ("ERROR", "CRITICAL")]
