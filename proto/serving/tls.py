"""A server's certificate, its key and the CAs of its clients, from PEM files that may change while it serves.

gRPC accepts any bytes and fails at the first handshake without an error; hence the checks. Only this module needs cryptography.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from serving.auth import Reloaded, Source, Unusable

CERTIFICATE, KEY, CLIENT_CA = "--tls-certificate", "--tls-key", "--tls-client-ca"


@dataclass(frozen=True, slots=True)
class Served:
    configuration: grpc.ServerCertificateConfiguration
    not_after: datetime
    """When the server's certificate expires."""


class ServerTls:
    """The TLS of a server. With a client CA, only clients with a certificate of that CA can connect."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Raises StartupError that names flag and file."""
        sources = [Source(CERTIFICATE, certificate), Source(KEY, key)]
        self.mutual = client_ca is not None
        if client_ca is not None:
            sources.append(Source(CLIENT_CA, client_ca))
        self.files = Reloaded(sources, lambda contents: parse_tls(contents, datetime.now(UTC)))

    def credentials(self) -> grpc.ServerCredentials:
        """For one port: each port is given a new certificate by itself. Open connections keep theirs."""
        given = self.files.value

        def changed() -> Any:  # None: nothing has changed
            nonlocal given
            if given is self.files.value:
                return None
            given = self.files.value
            return given.configuration

        return grpc.dynamic_ssl_server_credentials(given.configuration, changed, require_client_authentication=self.mutual)


def parse_tls(contents: Mapping[str, bytes], now: datetime) -> Served:
    """The files' contents by flag, as gRPC wants them. Raises Unusable."""
    certificate, key, authorities = contents[CERTIFICATE], contents[KEY], contents.get(CLIENT_CA)
    leaf = _certificates(CERTIFICATE, certificate)[0]
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        valid = f"{leaf.not_valid_before_utc:%Y-%m-%dT%H:%MZ} to {leaf.not_valid_after_utc:%Y-%m-%dT%H:%MZ}"
        raise Unusable(CERTIFICATE, f"the certificate is valid from {valid}, which is not now")
    _check_key(key, leaf)
    if authorities is not None and all(ca.not_valid_after_utc <= now for ca in _certificates(CLIENT_CA, authorities)):
        raise Unusable(CLIENT_CA, "every certificate in it has expired")
    return Served(grpc.ssl_server_certificate_configuration([(key, certificate)], authorities), leaf.not_valid_after_utc)


def _certificates(flag: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise Unusable(flag, "holds no certificate in PEM form") from None


def _check_key(pem: bytes, leaf: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise Unusable(KEY, "the key is encrypted; a program has no one to ask for its password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Unusable(KEY, "holds no private key in PEM form") from None
    try:
        certified = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise Unusable(CERTIFICATE, "the certificate's public key is of an unknown kind") from None
    if key.public_key() != certified:
        raise Unusable(KEY, "is not the key of the certificate")
