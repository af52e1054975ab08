"""Who may call, from a file: bearer tokens by their hash, and what certificates stand for. One a line:

    # tenant  role    secret                                                            comment
    acme      tenant  2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b  night batches
    ops       admin   certificate:spiffe://example/ops

A token is 32 random bytes, so its bare SHA-256 gives nothing away. A certificate's name is its URI if it has one, else its
common name; one that is not listed is the tenant of that name.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ostinato.serving.files import Reloaded, Source, Unusable
from ostinato.serving.identity import TENANT, Identity, Role

TOKENS = "--tokens"
LINES_MAX = 1024
"""Every call is compared with every token: about 0.1 ms for so many."""

_CERTIFICATE = "certificate:"


class Tokens:
    """What the file says: identities by secret."""

    def __init__(self, secrets: Mapping[str, Identity]) -> None:
        self._secrets = secrets
        self._hashes = {secret: identity for secret, identity in secrets.items() if not secret.startswith(_CERTIFICATE)}

    def bearer(self, token: str) -> Identity | None:
        """Whose token this is; as slow for one that is nobody's."""
        given, found = hash_of(token), None
        for known, identity in self._hashes.items():
            if hmac.compare_digest(known, given):
                found = identity
        return found

    def certificate(self, name: str) -> Identity | None:
        """What the certificate with this name stands for, where the file says so."""
        return self._secrets.get(_CERTIFICATE + name)


def parse(contents: Mapping[str, bytes]) -> Tokens:
    """Raises Unusable that names the line, and never quotes it."""
    try:
        lines = contents[TOKENS].decode().splitlines()
    except UnicodeDecodeError:
        raise Unusable(TOKENS, "is no UTF-8 text") from None
    if len(lines) > LINES_MAX:
        raise Unusable(TOKENS, f"has {len(lines)} lines, at most {LINES_MAX} are allowed")
    found: dict[str, Identity] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            identity, secret = _line(line)
            if secret in found:
                raise ValueError("an earlier line has the same secret")
        except ValueError as error:
            raise Unusable(TOKENS, f"line {number}: {error}") from None
        found[secret] = identity
    return Tokens(found)


def _line(line: str) -> tuple[Identity, str]:
    tenant, role, secret, *_ = [*line.split(maxsplit=3), "", ""]
    if not TENANT.fullmatch(tenant):
        raise ValueError("a tenant is 1 to 128 printable ASCII characters")
    if role not in list(Role):
        raise ValueError(f"a role is one of {', '.join(Role)}")
    if not (secret.startswith(_CERTIFICATE) or re.fullmatch(r"[0-9a-f]{64}", secret)):
        raise ValueError("a secret is the SHA-256 of a token, in 64 lower-case hexadecimal digits, or certificate:NAME")
    return Identity(tenant, Role(role)), secret


def hash_of(token: str) -> str:
    """What the file keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def new(tenant: str, role: Role, comment: str = "") -> tuple[str, str]:
    """A token, and its line."""
    token = secrets.token_urlsafe(32)
    return token, f"{tenant} {role} {hash_of(token)} {comment}".rstrip()


def listed(path: Path) -> Reloaded[Tokens]:
    """The file's tokens, now and whenever it changes. Raises StartupError."""
    return Reloaded([Source(TOKENS, path, private=True)], parse)


def main(program: str, argv: Sequence[str]) -> int:
    """`… token TENANT ROLE [COMMENT]`: the line for the file on stdout, and the token, for this once, on stderr."""
    parser = argparse.ArgumentParser(prog=program, description="Makes a token: its line on stdout, itself on stderr.")
    parser.add_argument("tenant", help="whose: 1 to 128 printable ASCII characters without spaces")
    parser.add_argument("role", choices=list(Role), help="tenant: sees what is its own; admin: sees everything")
    parser.add_argument("comment", nargs="?", default="", help="for those who read the file")
    given = parser.parse_args(argv)
    if not TENANT.fullmatch(given.tenant):
        parser.error("a tenant is 1 to 128 printable ASCII characters without spaces")
    token, line = new(given.tenant, Role(given.role), " ".join(given.comment.split()))
    sys.stderr.write(f"{token}\n")
    sys.stdout.write(f"{line}\n")
    return 0
