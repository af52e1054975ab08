"""A server's certificate, its key and the CAs of its clients, from PEM files that may change while it serves; and the
certificates of its clients.

gRPC accepts any bytes and fails at the first handshake without an error; hence the checks. It verifies a client's certificate
at the handshake only, and cuts names at a NUL byte; hence each call's certificate is parsed and judged here. Only this module
needs cryptography.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from ostinato.errors import Unauthenticated
from serving.auth import Context
from serving.files import Reloaded, Source, Unusable

CERTIFICATE, KEY, CLIENT_CA = "--tls-certificate", "--tls-key", "--tls-client-ca"


CERTIFICATES_CACHED = 1024
UNREADABLE = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
CHAIN_MAX = 8
"""Certificates that a client sends along and that are looked at."""


@dataclass(frozen=True, eq=False)
class Served:
    configuration: grpc.ServerCertificateConfiguration
    not_after: datetime
    """When the server's certificate expires."""
    authorities: tuple[x509.Certificate, ...]
    """The CAs of clients."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A client's."""

    uris: tuple[str, ...]
    common_names: tuple[str, ...]
    fingerprint: str
    """SHA-256, in hexadecimal digits."""
    expires: float
    """Unix time."""
    trusted_until: float
    """When the last chain from it to a CA expires; 0: there is none."""

    @property
    def names(self) -> Iterator[str]:
        """As `auth.Tokens` has them."""
        yield f"sha256:{self.fingerprint}"
        yield from (f"uri:{name}" for name in self.uris)
        yield from (f"cn:{name}" for name in self.common_names)


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

    def presented(self, context: Context) -> tuple[bytes, bytes] | None:
        """The certificate of a call's client, and those that it sent along, in PEM; None: the connection is without TLS."""
        seen = context.auth_context()
        leaf = b"".join(seen.get("x509_pem_cert", ()))
        return (leaf, b"".join(seen.get("x509_pem_cert_chain", ()))) if leaf else None

    def judge(self, presented: tuple[bytes, bytes]) -> Certificate:
        """The certificate, if it would be accepted now. Raises Unauthenticated."""
        certificate, now = _parsed(*presented, self.files.value), time.time()
        if certificate.expires <= now:
            raise Unauthenticated("the client certificate has expired")
        if certificate.trusted_until <= now:
            raise Unauthenticated("the client certificate's CA is not trusted here, or has expired")
        return certificate


@functools.lru_cache(CERTIFICATES_CACHED)
def _parsed(leaf: bytes, sent: bytes, served: Served) -> Certificate:
    """Raises Unauthenticated for a certificate that cannot be read, or with control characters in a name."""
    try:
        certificate = x509.load_pem_x509_certificate(leaf)
        chain = x509.load_pem_x509_certificates(sent)[:CHAIN_MAX] if sent else []
        common = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        uris = [
            uri
            for extension in certificate.extensions
            if isinstance(extension.value, x509.SubjectAlternativeName)
            for uri in extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        ]
    except UNREADABLE as error:
        raise Unauthenticated("the client certificate cannot be read") from error
    if not all(name.isprintable() for name in (*uris, *common)):
        raise Unauthenticated("the client certificate has control characters in a name")
    expires, until = _expires(certificate), trusted_until(certificate, chain, served.authorities)
    return Certificate(tuple(uris), tuple(common), certificate.fingerprint(SHA256()).hex(), expires, until)


def trusted_until(leaf: x509.Certificate, chain: list[x509.Certificate], authorities: Sequence[x509.Certificate]) -> float:
    """When the last chain from the leaf to an authority expires. The handshake has verified one, by the CAs of then."""
    issuers = [*chain, *authorities]
    links = [(one, issuer) for one in (leaf, *chain) for issuer in issuers if one != issuer and _issued(one, issuer)]
    until = {leaf: _expires(leaf)}
    for _ in issuers:  # in whatever order they were sent
        for one, issuer in links:
            until[issuer] = max(until.get(issuer, 0.0), min(until.get(one, 0.0), _expires(issuer)))
    return max((until.get(authority, 0.0) for authority in authorities), default=0.0)


def _expires(certificate: x509.Certificate) -> float:
    """Unix time."""
    return certificate.not_valid_after_utc.timestamp()


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def client_credentials(ca: Path, certificate: Path, key: Path) -> grpc.ChannelCredentials:
    """Of the sidecar, for the service. Read once. Raises StartupError that names flag and file."""
    ca_flag, certificate_flag, key_flag = "--engine-ca", "--engine-certificate", "--engine-key"

    def parse(contents: Mapping[str, bytes]) -> grpc.ChannelCredentials:
        _certificates(ca_flag, contents[ca_flag])
        _check_key(
            contents[key_flag], _certificates(certificate_flag, contents[certificate_flag])[0], key_flag, certificate_flag
        )
        return grpc.ssl_channel_credentials(contents[ca_flag], contents[key_flag], contents[certificate_flag])

    sources = [Source(ca_flag, ca), Source(certificate_flag, certificate), Source(key_flag, key)]
    return Reloaded(sources, parse).value


def parse_tls(contents: Mapping[str, bytes], now: datetime) -> Served:
    """The files' contents by flag, as gRPC wants them. Raises Unusable."""
    certificate, key, authorities = contents[CERTIFICATE], contents[KEY], contents.get(CLIENT_CA)
    leaf = _certificates(CERTIFICATE, certificate)[0]
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        valid = f"{leaf.not_valid_before_utc:%Y-%m-%dT%H:%MZ} to {leaf.not_valid_after_utc:%Y-%m-%dT%H:%MZ}"
        raise Unusable(CERTIFICATE, f"the certificate is valid from {valid}, which is not now")
    _check_key(key, leaf)
    trusted = tuple(_certificates(CLIENT_CA, authorities)) if authorities is not None else ()
    if authorities is not None and all(ca.not_valid_after_utc <= now for ca in trusted):
        raise Unusable(CLIENT_CA, "every certificate in it has expired")
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)
    return Served(configuration, leaf.not_valid_after_utc, trusted)


def _certificates(flag: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise Unusable(flag, "holds no certificate in PEM form") from None


def _check_key(pem: bytes, leaf: x509.Certificate, key_flag: str = KEY, certificate_flag: str = CERTIFICATE) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise Unusable(key_flag, "the key is encrypted; a program has no one to ask for its password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Unusable(key_flag, "holds no private key in PEM form") from None
    try:
        certified = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise Unusable(certificate_flag, "the certificate's public key is of an unknown kind") from None
    if key.public_key() != certified:
        raise Unusable(key_flag, "is not the key of the certificate")
