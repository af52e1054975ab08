"""A server's credentials: what it shows, and what it asks of callers. Read again when their files change.

nothing         everybody is the admin of the tenant ""
client CA       a client's certificate names its tenant
tokens          `authorization: Bearer …` names tenant and role; it wins over a certificate
trusted tenant  a gateway in front has looked, and says in `ostinato-tenant` who it is
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from ostinato.errors import Unauthenticated, invalid
from ostinato.serving.files import Reloaded
from ostinato.serving.handlers import Context
from ostinato.serving.identity import ANYBODY, TENANT, Identity, Role
from ostinato.serving.program import StartupError
from ostinato.serving.tokens import Tokens

if TYPE_CHECKING:
    from ostinato.serving.tls import ServerTls

TENANT_METADATA = "ostinato-tenant"
RELOAD_SECONDS = 1.0
"""Between looks at the files."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one server."""

    tls: ServerTls | None = None
    tokens: Reloaded[Tokens] | None = None
    trust_tenant_metadata: bool = False

    @property
    def asked(self) -> bool:
        """Whether callers have to say who they are."""
        return self.tokens is not None or (self.tls is not None and self.tls.mutual)

    def port_credentials(self) -> grpc.ServerCredentials | None:
        """For one more port; None: plain text."""
        return self.tls.credentials() if self.tls is not None else None

    def identify(self, context: Context) -> Identity:
        """Who calls. Raises Unauthenticated."""
        metadata = list(context.invocation_metadata() or ())
        if not self.asked:
            return _tenant_of(_only(metadata, TENANT_METADATA)) if self.trust_tenant_metadata else ANYBODY
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
        identity = tokens.bearer(token.strip()) if scheme.lower() == "bearer" else None
        if identity is None:
            raise Unauthenticated("this token is not valid here")
        return identity

    def _certificate(self, name: str) -> Identity:
        listed = self.tokens.value.certificate(name) if self.tokens is not None else None
        if listed is None and not TENANT.fullmatch(name):
            raise Unauthenticated("the client certificate's name cannot be a tenant's: 1 to 128 printable ASCII characters")
        return listed or Identity(name, Role.TENANT)

    async def watch(self, registry: CollectorRegistry) -> None:
        """Reads changed files for ever. What cannot be used is logged and counted, and what was there before goes on."""
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
    """The one value of this key. Raises Unauthenticated where there are several: which one would a proxy have looked at?"""
    values = [value for name, value in metadata if name == key]
    if len(values) > 1:
        raise Unauthenticated(f"metadata {key} is there {len(values)} times")
    return str(values[0]) if values else None


def _tenant_of(tenant: str | None) -> Identity:
    """Whom the gateway speaks for; without a word, for itself."""
    if tenant is None:
        return ANYBODY
    if not TENANT.fullmatch(tenant):
        raise invalid(f"metadata.{TENANT_METADATA}", "must be 1 to 128 printable ASCII characters without spaces")
    return Identity(tenant, Role.TENANT)


def _certificate_name(context: Context) -> str | None:
    """The URI of the client's certificate if it has one, else its common name; None: there is no certificate."""
    seen = context.auth_context()
    for key in ("peer_uri", "x509_common_name"):
        names = [name.decode(errors="replace") for name in seen.get(key, ())]
        if names:
            return names[0] if len(names) == 1 else ""
    return "" if "x509_pem_cert" in seen else None
