"""What a client needs to trust a sidecar, and to be trusted by it: from PEM files."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

File = str | os.PathLike[str]


def tls(ca: File | None = None, *, certificate: File | None = None, key: File | None = None) -> grpc.ChannelCredentials:
    """Credentials for a client. `ca`: whose servers to trust; None: those that everybody trusts. `certificate` and `key`: for a
    sidecar that asks for one. Raises ValueError that names the argument and the file."""
    if (certificate is None) != (key is None):
        raise ValueError("certificate, key: one needs the other")
    return grpc.ssl_channel_credentials(_pem("ca", ca), _pem("key", key), _pem("certificate", certificate))


def _pem(name: str, file: File | None) -> bytes | None:
    if file is None:
        return None
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {file}: {error.strerror}") from None
    if b"-----BEGIN" not in data:  # gRPC would only say that it cannot connect
        raise ValueError(f"{name}: {file}: holds nothing in PEM form")
    return data
