"""Stands between a journal and its server, and cuts the line at the worst moment."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from enum import Enum, auto
from pathlib import Path

from tests.postgres import Postgres

SOCKET = ".s.PGSQL.5432"
IDLE = b"Z\x00\x00\x00\x05I"
"""ReadyForQuery outside a transaction: what was begun is over."""


class Cut(Enum):
    NEVER = auto()
    BEFORE = auto()
    """The next thing that the client says is not passed on."""
    AFTER = auto()
    """The end of a transaction is reached, and its answer not passed on."""


class Proxy:
    """One line after the other, each through this socket's folder. The cut is made once."""

    def __init__(self, server: Postgres) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="px", dir="/var/tmp"))
        self.cut = Cut.NEVER
        self.closed = False
        """Whether new connections are refused."""
        self._server = str(server.root / SOCKET)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / SOCKET))
        self._listener.listen()
        self._lines: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.closed:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                self._lines += [client, server]
                server.connect(self._server)
                for one, other, moment in ((client, server, Cut.BEFORE), (server, client, Cut.AFTER)):
                    self._run(self._pump, one, other, moment)

    def _run(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _pump(self, one: socket.socket, other: socket.socket, moment: Cut) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if self.cut is moment and (moment is Cut.BEFORE or IDLE in data):
                    self.cut = Cut.NEVER
                    break
                other.sendall(data)
        for line in (one, other):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def sever(self) -> None:
        """Cut every line now, and refuse new ones until `closed` is taken back."""
        self.closed = True
        for line in self._lines[1:]:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for line in self._lines:
            line.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def proxy(server: Postgres) -> Iterator[Proxy]:
    """A proxy in front of it."""
    made = Proxy(server)
    try:
        yield made
    finally:
        made.close()
