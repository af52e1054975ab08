"""Certificates for tests: authorities that exist for one test, and what they sign."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = dt.timedelta(days=1)


class Authority:
    """A CA. Its files, and those of what it signs, lie in `folder`."""

    def __init__(self, folder: Path, name: str = "authority", parent: Authority | None = None) -> None:
        """`parent`: the authority that signs this one, which else signs itself."""
        self._folder, self.key, self._name = folder, ec.generate_private_key(ec.SECP256R1()), _name(name)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes((parent or self)._signed(self._name, self.key.public_key(), days=30, authority=True))

    def sign(self, name: str, *, file: str = "", days: float = 30, uris: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Files of a certificate with this common name, for servers on this machine and for clients, and of its key. With
        negative `days` it expired so long ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        names += [x509.UniformResourceIdentifier(uri) for uri in uris]
        paths = self._folder / f"{file or name}.pem", self._folder / f"{file or name}.key"
        paths[0].write_bytes(self._signed(_name(name), key.public_key(), days=days, names=names))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths

    def authority(self, name: str, key: ec.EllipticCurvePrivateKey, days: float) -> x509.Certificate:
        """The certificate of an authority of this name and key."""
        return x509.load_pem_x509_certificate(self._signed(_name(name), key.public_key(), days=days, authority=True))

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        days: float,
        authority: bool = False,
        names: list[x509.GeneralName] | None = None,
    ) -> bytes:
        now = dt.datetime.now(dt.UTC)
        made = x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=key)
        made = (
            made.not_valid_before(now - 60 * DAY).not_valid_after(now + days * DAY).serial_number(x509.random_serial_number())
        )
        made = made.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(self.key, SHA256()).public_bytes(Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
