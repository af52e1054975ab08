"""Where a server listens, and why it cannot.

`unix:/absolute/path`, or `host:port` where host is an IP address or `localhost`, which is 127.0.0.1: a name with two addresses
could be bound to only one of them, in silence.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from ostinato.serving.program import BAD_CONFIGURATION, StartupError

PATH_BYTES_MAX = 107
"""Of a socket's path, by the kernel."""


@dataclass(frozen=True, slots=True)
class Tcp:
    """A port."""

    flag: str
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
            return str(replace(self, port=port))
        except RuntimeError as error:
            raise StartupError(f"{self.flag}: cannot listen on {self}: {self._why() or error}") from error

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

    flag: str
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
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        except RuntimeError as error:
            raise self._error(self._why() or str(error)) from error
        return str(self)

    def _error(self, why: str) -> StartupError:
        return StartupError(f"{self.flag}: cannot listen on {self}: {why}")

    def _why(self) -> str:
        """What the kernel has against this path; gRPC does not say."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.bind(str(self.path))
            except OSError as error:
                return os.strerror(error.errno or 0)
        self.path.unlink(missing_ok=True)
        return ""

    def _check_folder(self) -> None:
        """Whoever may write there can put a socket of their own in the place of ours. Makes a folder that is missing."""
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        except FileExistsError:
            raise self._error(f"{folder} is no directory") from None
        except OSError as error:
            raise self._error(f"{folder} cannot be made: {error.strerror}") from error
        if folder.stat().st_mode & 0o002:
            raise self._error(f"everybody may write in {folder}; use one below it, or chmod o-w")

    def _clear(self) -> None:
        """Removes what a killed process left. gRPC itself would take the path from under a living one, or from a file."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise self._error("the file is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
        raise self._error("Address already in use")


Address = Tcp | Unix


def parse(flag: str, text: str, allow_remote: bool) -> Address:
    """Raises StartupError that names the flag, for what is no address, or is remote and not allowed."""

    def wrong(why: str) -> StartupError:
        return StartupError(f"{flag}: {text!r}: {why}", exit_code=BAD_CONFIGURATION)

    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:"))
        if not path.is_absolute():
            raise wrong("a socket's path is absolute")
        if (size := len(os.fsencode(path))) > PATH_BYTES_MAX:
            raise wrong(f"a socket's path is at most {PATH_BYTES_MAX} bytes long, this one is {size}")
        return Unix(flag, path)
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        parsed = Tcp(flag, address, int(port))
    except ValueError:
        raise wrong("is no address: unix:/path, or an IP address (or localhost) and a port") from None
    if not 0 <= parsed.port <= 65535:
        raise wrong("a port is 0 to 65535")
    if not parsed.local and not allow_remote:
        raise wrong("anyone on the network could use this; allow it, turn TLS on, or listen on loopback or a unix socket")
    return parsed


def check_target(flag: str, text: str) -> None:
    """Raises ValueError for what gRPC would try to reach for ever: no address of a server."""
    path = text.removeprefix("unix:")
    if path == text:
        if not re.fullmatch(r"\S+:\d{1,5}|unix-abstract:\S+", text):
            raise ValueError(f"{flag}: {text!r} is no address: unix:path or host:port")
    elif not path or len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ValueError(f"{flag}: {text!r}: a socket's path is 1 to {PATH_BYTES_MAX} bytes long")
