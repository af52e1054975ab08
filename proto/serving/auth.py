"""Who may call a server, and as whom.

A caller has an identity: a tenant and a role. Credentials decide it, in this order:

    tokens          `authorization: Bearer ...` names tenant and role; it wins over a certificate
    client CA       the certificate of the client names its tenant
    trusted tenant  a gateway in front has authenticated the caller, and passes its tenant as `ostinato-tenant`
    nothing         every caller is the admin of the tenant ""

The files of tokens and certificates are read again when they change. The handlers guard sets the identity of each call; a
handler reads it by `caller()`.

The tokens file has one secret a line:

    # tenant  role    secret                                                            comment
    acme      tenant  2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b  night batches
    ops       admin   certificate:spiffe://example/ops

A token is 32 random bytes, so its bare SHA-256 reveals nothing. The name of a certificate is its URI if it has one, else its
common name. A name that is not listed is the tenant of that name.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import hashlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from ostinato.errors import PermissionDenied, Unauthenticated, invalid
from serving import files
from serving.program import BAD_CONFIGURATION, StartupError

if TYPE_CHECKING:
    from serving.tls import ServerTls

Context = grpc.aio.ServicerContext[Any, Any]
TENANT = re.compile(r"(?!#)[!-~]{1,128}")
"""The name of a tenant: printable ASCII without spaces, and not a comment."""


class Role(enum.StrEnum):
    TENANT = "tenant"
    """Generates, and sees its own items."""
    ADMIN = "admin"
    """Sees everything."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller."""

    tenant: str = ""
    role: Role = Role.ADMIN

    @property
    def admin(self) -> bool:
        return self.role is Role.ADMIN

    def may_see(self, tenant: str) -> bool:
        """Whether the caller may see the items of this tenant."""
        return self.admin or tenant == self.tenant

    def require_admin(self, what: str) -> None:
        """Raises PermissionDenied for a tenant."""
        if not self.admin:
            raise PermissionDenied(f"{what} is for the role admin, not for tenants")


ANONYMOUS = Identity()
"""Every caller, where there are no credentials."""

CALLER: ContextVar[Identity] = ContextVar("caller", default=ANONYMOUS)


def caller() -> Identity:
    """The identity of the call that this task handles."""
    return CALLER.get()


BYTES_MAX = 1 << 20
"""Of one file."""

T = TypeVar("T")


class Unusable(ValueError):
    """The file of a flag cannot be used, and the message says why."""

    def __init__(self, flag: str, why: str) -> None:
        super().__init__(why)
        self.flag = flag


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a flag names. A `private` one must not be readable by all users of the machine."""

    flag: str
    path: Path
    private: bool = False

    def state(self) -> tuple[int, ...]:
        """Differs after a change. Follows links, so that a mounted folder may be replaced as a whole."""
        try:
            found = self.path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)

    def read(self) -> bytes:
        """Raises Unusable."""
        try:
            with os.fdopen(files.opened(self.path), "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(BYTES_MAX + 1)
        except OSError as error:
            raise Unusable(self.flag, error.strerror or str(error).removeprefix(f"{self.path}: ")) from error
        if len(data) > BYTES_MAX:
            raise Unusable(self.flag, f"is larger than {BYTES_MAX} bytes")
        if self.private and mode & 0o007:
            raise Unusable(self.flag, f"mode {mode & 0o777:04o} lets every user of this machine read it; make it 0640 or 0600")
        return data


class Reloaded(Generic[T]):
    """The parsed content of some files. While a change makes them unusable, `value` is the content before it."""

    def __init__(self, sources: Sequence[Source], parse: Callable[[Mapping[str, bytes]], T]) -> None:
        """`parse` is given the contents by flag, and raises Unusable. Raises StartupError that names flag and file."""
        self._sources, self._parse = sources, parse
        self._states = self._current_states()
        self.value = self._read()

    def refresh(self) -> bool:
        """Whether `value` is new. Raises StartupError if the files have changed and cannot be used."""
        states = self._current_states()
        if states == self._states:
            return False
        self._states = states
        self.value = self._read()
        return True

    def _current_states(self) -> list[tuple[int, ...]]:
        return [source.state() for source in self._sources]

    def _read(self) -> T:
        try:
            return self._parse({source.flag: source.read() for source in self._sources})
        except Unusable as error:
            path = next(source.path for source in self._sources if source.flag == error.flag)
            raise StartupError(f"{error.flag}: {path}: {error}", exit_code=BAD_CONFIGURATION) from error


TOKENS = "--tokens"
LINES_MAX = 1024

_CERTIFICATE = "certificate:"


Tokens = Mapping[str, Identity]
"""Identities by secret. A token is looked up by its SHA-256, so how long that takes says nothing about any token."""


def parse_tokens(contents: Mapping[str, bytes]) -> Tokens:
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
    return found


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
    """A token, as the file has it."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token(tenant: str, role: Role, comment: str = "") -> tuple[str, str]:
    """A token, and its line for the file."""
    token = secrets.token_urlsafe(32)
    return token, f"{tenant} {role} {hash_of(token)} {comment}".rstrip()


def load_tokens(path: Path) -> Reloaded[Tokens]:
    """The tokens of a file. Raises StartupError."""
    return Reloaded([Source(TOKENS, path, private=True)], parse_tokens)


def token_command(program: str, argv: Sequence[str]) -> int:
    """`python -m sidecar token TENANT ROLE [COMMENT]`: prints the line for the file on stdout, and the token on stderr."""
    parser = argparse.ArgumentParser(prog=program, description="Makes a token: its line on stdout, itself on stderr.")
    parser.add_argument("tenant", help="whose: 1 to 128 printable ASCII characters without spaces")
    parser.add_argument("role", choices=list(Role), help="tenant: sees what is its own; admin: sees everything")
    parser.add_argument("comment", nargs="?", default="", help="for those who read the file")
    given = parser.parse_args(argv)
    if not TENANT.fullmatch(given.tenant):
        parser.error("a tenant is 1 to 128 printable ASCII characters without spaces")
    token, line = new_token(given.tenant, Role(given.role), " ".join(given.comment.split()))
    sys.stderr.write(f"{token}\n")
    sys.stdout.write(f"{line}\n")
    return 0


TENANT_METADATA = "ostinato-tenant"
RELOAD_SECONDS = 1.0
"""Between checks of the files."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one server: what it shows to callers, and what it requires of them."""

    tls: ServerTls | None = None
    tokens: Reloaded[Tokens] | None = None
    trust_tenant_metadata: bool = False

    @property
    def required(self) -> bool:
        """Whether callers must identify themselves."""
        return self.tokens is not None or (self.tls is not None and self.tls.mutual)

    def port_credentials(self) -> grpc.ServerCredentials | None:
        """For one port; None: plain text."""
        return self.tls.credentials() if self.tls is not None else None

    def identify(self, context: Context) -> Identity:
        """Who calls. Raises Unauthenticated."""
        if not (self.required or self.trust_tenant_metadata):
            return ANONYMOUS
        metadata = list(context.invocation_metadata() or ())
        if not self.required:
            return _tenant_of(_only(metadata, TENANT_METADATA))
        authorization = _only(metadata, "authorization")
        if authorization is not None and self.tokens is not None:
            return self._bearer(self.tokens.value, authorization)
        name = _certificate_name(context)
        if name is None:
            asked = "authorization: Bearer TOKEN" if self.tokens is not None else "a client certificate over TLS"
            raise Unauthenticated(f"who calls? {asked} is missing")
        return self._certificate(name)

    def _bearer(self, tokens: Tokens, authorization: str) -> Identity:
        scheme, _, token = authorization.partition(" ")
        identity = tokens.get(hash_of(token.strip())) if scheme.lower() == "bearer" else None
        if identity is None:
            raise Unauthenticated("this token is not valid here")
        return identity

    def _certificate(self, name: str) -> Identity:
        listed = self.tokens.value.get(_CERTIFICATE + name) if self.tokens is not None else None
        if listed is None and not TENANT.fullmatch(name):
            raise Unauthenticated("the client certificate's name cannot be a tenant's: 1 to 128 printable ASCII characters")
        return listed or Identity(name, Role.TENANT)

    async def watch(self, registry: CollectorRegistry) -> None:
        """Reads changed files, until cancelled. A file that cannot be used is logged and counted, and the one before stays."""
        reloads = Counter("ostinato_credential_reloads", "Changed credential files.", ["kind", "outcome"], registry=registry)
        expiry = Gauge(
            "ostinato_tls_certificate_expiry_timestamp_seconds", "When the server's certificate expires.", registry=registry
        )
        kinds: dict[str, Callable[[], bool]] = {}
        if self.tls is not None:
            kinds["tls"] = self.tls.files.refresh
        if self.tokens is not None:
            kinds["tokens"] = self.tokens.refresh
        for kind in kinds:
            for outcome in ("used", "unusable"):
                reloads.labels(kind, outcome)
        while True:
            if self.tls is not None:
                expiry.set(self.tls.files.value.not_after.timestamp())
            await asyncio.sleep(RELOAD_SECONDS)
            for kind, refresh in kinds.items():
                try:
                    if refresh():
                        reloads.labels(kind, "used").inc()
                        _log.info("credentials reloaded", extra={"kind": kind})
                except StartupError as error:
                    reloads.labels(kind, "unusable").inc()
                    _log.error("credentials not reloaded", extra={"kind": kind, "why": str(error)})


NONE = Credentials()


def _only(metadata: list[tuple[str, str | bytes]], key: str) -> str | None:
    """The value of this key. Raises Unauthenticated if there are several: a proxy may have checked another one."""
    values = [value for name, value in metadata if name == key]
    if len(values) > 1:
        raise Unauthenticated(f"metadata {key} is there {len(values)} times")
    return str(values[0]) if values else None


def _tenant_of(tenant: str | None) -> Identity:
    """The tenant that the gateway passes on; None: the gateway itself."""
    if tenant is None:
        return ANONYMOUS
    if not TENANT.fullmatch(tenant):
        raise invalid(f"metadata.{TENANT_METADATA}", "must be 1 to 128 printable ASCII characters without spaces")
    return Identity(tenant, Role.TENANT)


def _certificate_name(context: Context) -> str | None:
    """The URI of the client's certificate, else its common name, else an empty text; None: there is no certificate."""
    seen = context.auth_context()
    for key in ("peer_uri", "x509_common_name"):
        names = [name.decode(errors="replace") for name in seen.get(key, ())]
        if names:
            return names[0] if len(names) == 1 else ""
    return "" if "x509_pem_cert" in seen else None
