"""Who may call a server, and as whom.

A caller has an identity: a tenant and a role. Credentials decide it, in this order:

    tokens          `authorization: Bearer ...` names tenant and role; it wins over a certificate
    client CA       the certificate of the client names its tenant
    trusted tenant  a gateway in front has authenticated the caller, and passes its tenant as `ostinato-tenant`
    nothing         every caller is the admin of the tenant ""

The files of tokens and certificates are read again when they change, and then every running call is judged again. The handlers
guard sets the identity of each call; a handler reads it by `caller()`.

The tokens file has one secret a line:

    # tenant  role    secret                                                            comment
    acme      tenant  2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b  night batches
    ops       admin   certificate:spiffe://example/ops
    build     tenant  certificate:cn:build.example
    lost      denied  certificate:sha256:a4fdff46e2fb4c3c0b7dc1a1d8f0fd0f5b7e7e0f7b7f4f8e5d2c4a9b6c1d3e2f

A token is 32 random bytes, so its bare SHA-256 reveals nothing. The name of a certificate is its URI if it has one, else its
common name. A URI has a scheme, and a common name that looks as if it had one is no tenant's, so one cannot pass for the other.
A name that is not listed is the tenant of that name.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import hashlib
import logging
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from ostinato.errors import PermissionDenied, Unauthenticated, invalid
from serving.files import Reloaded, Source, Unusable
from serving.program import StartupError

if TYPE_CHECKING:
    from serving.hop import ServiceEnd
    from serving.settings import Common
    from serving.tls import Certificate, ServerTls

Context = grpc.aio.ServicerContext[Any, Any]
TENANT = re.compile(r"(?!#)[!-~]{1,128}")
"""The name of a tenant: printable ASCII without spaces, and not a comment."""


class Role(enum.StrEnum):
    TENANT = "tenant"
    """Generates, and sees its own items."""
    ADMIN = "admin"
    """Sees everything."""
    DENIED = "denied"
    """Is refused, whatever else it presents."""


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

_log = logging.getLogger(__name__)

CALLER: ContextVar[Identity] = ContextVar("caller", default=ANONYMOUS)


caller: Callable[[], Identity] = CALLER.get
"""The identity of the call that this task handles."""


TOKENS = "--tokens"
LINES_MAX = 1024

_CERTIFICATE = "certificate:"
_HASH = re.compile(r"[0-9a-f]{64}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""What every URI begins with."""

Tokens = Mapping[str, Identity]
"""Identities by secret: the SHA-256 of a token, or `uri:`, `cn:` or `sha256:` and what a certificate has there. A token is
looked up by its SHA-256, so how long that takes says nothing about any token."""


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
    if secret.startswith(_CERTIFICATE):
        secret = _certificates_key(secret.removeprefix(_CERTIFICATE))
    elif not _HASH.fullmatch(secret):
        raise ValueError("a secret is the SHA-256 of a token, in 64 lower-case hexadecimal digits, or certificate:URI")
    return Identity(tenant, Role(role)), secret


def _certificates_key(name: str) -> str:
    """What Tokens has for `certificate:` and this name. Raises ValueError."""
    if not name.isprintable():
        raise ValueError("a certificate's name has no control characters")
    if name.startswith("sha256:"):
        fingerprint = name.removeprefix("sha256:").replace(":", "").lower()
        if not _HASH.fullmatch(fingerprint):
            raise ValueError("a certificate's fingerprint is sha256: and 64 hexadecimal digits")
        return f"sha256:{fingerprint}"
    if name == "cn:" or not _SCHEME.match(name):
        raise ValueError("certificate: needs a URI, cn:NAME or sha256:FINGERPRINT")
    return name if name.startswith("cn:") else f"uri:{name}"


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
    roles = [Role.TENANT.value, Role.ADMIN.value]
    parser.add_argument("role", choices=roles, help="tenant: sees what is its own; admin: sees everything")
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
"""Between checks of the files, and between checks of the calls that run."""


class Presented(NamedTuple):
    """What a call has brought, to be judged at its begin and again while it runs."""

    token: str | None
    """Its SHA-256; empty: the authorization is of another scheme."""
    certificate: tuple[bytes, bytes] | None
    """The client's and those that it sent along, in PEM."""
    tenant: str | None
    """What the metadata claim."""


@dataclass(slots=True)
class _RunningCall:
    """A call."""

    given: Presented
    identity: Identity
    refused: Unauthenticated | None = None
    """Why it is being ended."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one server: what it shows to callers, and what it requires of them."""

    tls: ServerTls | None = None
    tokens: Reloaded[Tokens] | None = None
    trust_tenant_metadata: bool = False
    hop: ServiceEnd | None = None
    """Of the service: only the sidecar may call it."""
    _running: dict[asyncio.Task[Any], _RunningCall] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        """Whether callers prove who they are."""
        return self.tokens is not None or self.mutual or self.hop is not None

    @property
    def mutual(self) -> bool:
        """Whether clients have certificates."""
        return self.tls is not None and self.tls.mutual

    @property
    def required(self) -> bool:
        """Whether callers must say who they are."""
        return self.proven or self.trust_tenant_metadata

    def identify(self, context: Context) -> Identity:
        """Who calls, where callers must say so. From then on, until the task ends, `watch` ends it once it would be refused.
        Raises Unauthenticated."""
        assert self.required
        metadata = list(context.invocation_metadata() or ())
        certificate = self.tls.presented(context) if self.tls is not None and self.tls.mutual else None
        if self.hop is not None:
            if certificate is not None and self.tls is not None:
                self.tls.judge(certificate)
            if certificate is None or self.hop.shared:
                self.hop.check(metadata)
            return ANONYMOUS
        authorization, tenant = _only(metadata, "authorization"), _only(metadata, TENANT_METADATA)
        given = Presented(None if authorization is None else _bearer_hash(authorization), certificate, tenant)
        call, identity = asyncio.current_task(), self.judge(given)
        assert call is not None, "a handler runs in a task"
        self._running[call] = _RunningCall(given, identity)
        call.add_done_callback(self._running.pop)
        return identity

    def judge(self, given: Presented) -> Identity:
        """Who this is, by the files and the time of now. Raises Unauthenticated."""
        tokens: Tokens = self.tokens.value if self.tokens is not None else {}
        certificate = None
        if given.certificate is not None and self.tls is not None:
            certificate = self.tls.judge(given.certificate)
            if tokens and any(name in tokens and tokens[name].role is Role.DENIED for name in certificate.names):
                raise Unauthenticated("this client certificate is denied")
        if given.token is not None and self.tokens is not None:
            identity = tokens.get(given.token)
            if identity is None:
                raise Unauthenticated("this token is not valid here")
            if identity.role is Role.DENIED:
                raise Unauthenticated("this token is denied")
            return identity
        if certificate is not None:
            return certificate_identity(certificate, tokens)
        if self.trust_tenant_metadata:
            return _metadata_identity(given.tenant)
        asked = "authorization: Bearer TOKEN" if self.tokens is not None else "a client certificate over TLS"
        raise Unauthenticated(f"who calls? {asked} is missing")

    def refusal(self) -> Unauthenticated | None:
        """Why `watch` has cancelled the task that asks, if it has."""
        call = asyncio.current_task()
        running = self._running.get(call) if call is not None else None
        return running.refused if running is not None else None

    def _end_refused(self) -> int:
        """Cancels the calls that would be refused now, or made as another caller. How many."""
        ended = 0
        for call, running in self._running.items():
            if running.refused is not None:
                continue
            try:
                if self.judge(running.given) != running.identity:
                    running.refused = Unauthenticated("the tenant or role of these credentials has changed")
            except Unauthenticated as error:
                running.refused = error
            if running.refused is not None:
                call.cancel()
                ended += 1
        return ended

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
            judge_again = self.mutual  # a certificate expires without a change of the files
            for kind, refresh in kinds.items():
                try:
                    if refresh():
                        judge_again = True
                        reloads.labels(kind, "used").inc()
                        _log.info("credentials reloaded", extra={"kind": kind})
                except StartupError as error:
                    reloads.labels(kind, "unusable").inc()
                    _log.error("credentials not reloaded", extra={"kind": kind, "why": str(error)})
            if judge_again and (ended := self._end_refused()):
                _log.info("calls ended: their credentials are not valid any more", extra={"calls": ended})


NONE = Credentials()


def server_tls(settings: Common) -> ServerTls | None:
    """Raises StartupError that names the flag and the file."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    from serving.tls import ServerTls  # here: only with certificates is there a need for cryptography

    return ServerTls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)


def _only(metadata: list[tuple[str, str | bytes]], key: str) -> str | None:
    """The value of this key. Raises Unauthenticated if there are several: a proxy may have checked another one."""
    values = [value for name, value in metadata if name == key]
    if len(values) > 1:
        raise Unauthenticated(f"metadata {key} is there {len(values)} times")
    return str(values[0]) if values else None


def _bearer_hash(authorization: str) -> str:
    """The hash of a bearer's token; empty for another scheme."""
    scheme, _, token = authorization.partition(" ")
    return hash_of(token.strip()) if scheme.lower() == "bearer" else ""


def _metadata_identity(tenant: str | None) -> Identity:
    """The tenant that the gateway passes on, which is never an admin."""
    if tenant is None:
        raise Unauthenticated(f"who calls? metadata {TENANT_METADATA} is missing")
    if not TENANT.fullmatch(tenant):
        raise invalid(f"metadata.{TENANT_METADATA}", "must be 1 to 128 printable ASCII characters without spaces")
    return Identity(tenant, Role.TENANT)


def certificate_identity(certificate: Certificate, tokens: Tokens) -> Identity:
    """Whose certificate this is: by its fingerprint's line, else by its one name: its URI's line, or, without a URI, its common
    name's; else the tenant of that name. Raises Unauthenticated."""
    kind, names = ("uri", certificate.uris) if certificate.uris else ("cn", certificate.common_names)
    listed = tokens.get(f"sha256:{certificate.fingerprint}")
    if listed is None and len(names) != 1:
        raise Unauthenticated("the client certificate names no tenant: it needs one URI, or one common name and no URI")
    listed = listed or tokens.get(f"{kind}:{names[0]}")
    if listed is not None:
        return listed
    if not TENANT.fullmatch(names[0]):
        raise Unauthenticated("the client certificate's name cannot be a tenant's: 1 to 128 printable ASCII characters")
    if (kind == "uri") != (_SCHEME.match(names[0]) is not None):
        raise Unauthenticated("the client certificate's name cannot be a tenant's: a URI has a scheme, a common name has none")
    return Identity(names[0], Role.TENANT)
