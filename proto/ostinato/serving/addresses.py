"""Where a server listens, and why it cannot.

`unix:/absolute/path`, or `host:port` where host is an IP address or `localhost`, which is 127.0.0.1: a name with two addresses
could be bound to only one of them, in silence.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from ostinato.serving.program import StartupError

_PATH_BYTES_MAX = 107  # of a socket's path, by the kernel


@dataclass(frozen=True, slots=True)
class Tcp:
    """A port."""

    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def local(self) -> bool:
        return self.host.is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.host.version == 6 else f"{self.host}:{self.port}"

    def bind(self, server: grpc.aio.Server, _mode: int, tls: grpc.ServerCredentials | None = None) -> str:
        """Binds and returns the address with its real port. Raises StartupError."""
        try:
            port = server.add_insecure_port(str(self)) if tls is None else server.add_secure_port(str(self), tls)
            return str(Tcp(self.host, port))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self}: {self._why() or error}") from error

    def _why(self) -> str:
        """What the kernel has against this address; gRPC does not say."""
        with socket.socket(socket.AF_INET6 if self.host.version == 6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((str(self.host), self.port))
            except OSError as error:
                return os.strerror(error.errno or 0)
        return ""


@dataclass(frozen=True, slots=True)
class Unix:
    """A socket file."""

    path: Path
    local = True

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def bind(self, server: grpc.aio.Server, mode: int, _tls: grpc.ServerCredentials | None = None) -> str:
        """Binds in plain text, with this mode on the file. Raises StartupError."""
        try:
            self._check_folder()
            self._clear()
            before = os.umask(0o777 & ~mode)  # closed from the first moment, not from chmod on
            try:
                server.add_insecure_port(str(self))
            finally:
                os.umask(before)
            self.path.chmod(mode)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "the directory must be writable"
            raise StartupError(f"cannot listen on {self}: {why}") from error
        return str(self)

    def _check_folder(self) -> None:
        """Whoever may write there can put a socket of their own in the place of ours. Makes a folder that is missing."""
        folder = self.path.parent
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o002:
            raise StartupError(f"cannot listen on {self}: everybody may write in {folder}; use one below it, or chmod o-w")

    def _clear(self) -> None:
        """Removes what a killed process left. gRPC itself would take the path from under a living one, or from a file."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise StartupError(f"cannot listen on {self}: the file is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
        raise StartupError(f"cannot listen on {self}: Address already in use")


Address = Tcp | Unix


def parse(text: str, allow_remote: bool) -> Address:
    """Raises StartupError for what is no address, or is remote and not allowed."""
    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:"))
        if not path.is_absolute() or len(os.fsencode(path)) > _PATH_BYTES_MAX:
            raise StartupError(f"{text}: a socket's path is absolute and at most {_PATH_BYTES_MAX} bytes long")
        return Unix(path)
    host, _, port = text.rpartition(":")
    try:
        parsed = Tcp(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]")), int(port))
    except ValueError:
        raise StartupError(f"{text!r} is no address: unix:/path, or an IP address (or localhost) and a port") from None
    if not 0 <= parsed.port <= 65535:
        raise StartupError(f"{text!r}: a port is 0 to 65535")
    if not parsed.local and not allow_remote:
        what = "anyone on the network could use this; allow it, turn TLS on, or listen on loopback or a unix socket"
        raise StartupError(f"{text}: {what}")
    return parsed
