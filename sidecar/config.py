"""The sidecar's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from serving import intake
from serving.server import check_target
from serving.settings import Common, field

from sidecar.core.window import Bounds
from sidecar.held import COPIES
from sidecar.held import Bounds as HeldBounds

_KEYWORDS = re.compile(
    r"(^|[\s\"'])(host|hostaddr|port|dbname|user|password|passfile|service|servicefile|options|ssl\w+|target_session_attrs)\s*=",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"[\s\"'<]*([a-z][a-z0-9+.:-]*:/|postgres(ql)?:)", re.IGNORECASE)
_HOSTS = r"(?:[\w.,-]|%2F|\[[\da-fA-F:.]+\]|:\d+(?=[,/?]|$))*"
_SOUND = re.compile(rf"postgres(?:ql)?://(?:[^?]*@)?({_HOSTS}(?:/[\w-]*)?)(?:\?[^@]*)?")
"""A URL whose host and name cannot be parts of a password."""


def is_shared(journal: str) -> bool:
    """Whether the journal is in PostgreSQL."""
    return journal.startswith(("postgresql://", "postgres://"))


def journal_fault(journal: str) -> str:
    """Why the text names neither a file nor a database; empty: it does. The text is not quoted: it may hold a password."""
    if not journal:
        return "needs a file, or the URL of a database"
    if not is_shared(journal) and (_SCHEME.match(journal) or _KEYWORDS.search(journal)):
        return "a database is named by a URL, postgresql://USER@HOST/NAME; a file whose name looks like one, by ./NAME"
    return ""


def shown(journal: str) -> str:
    """The journal's name for the log: of a database, its host and name."""
    if not is_shared(journal):
        return "***" if journal_fault(journal) else journal
    sound = _SOUND.fullmatch(journal)
    return f"postgresql://{sound[1] if sound else '***'}"


HOP_REMEDY = "use unix:/path, --engine-secret on both programs, or --engine-ca, --engine-certificate and --engine-key"


@dataclass(frozen=True, slots=True)
class Settings(intake.Bounds, Common):
    """Flags of `python -m sidecar`, and environment variables OSTINATO_SIDECAR_…"""

    listen: tuple[str, ...] = field(("127.0.0.1:7001",), "addresses to listen on, host:port or unix:/path")
    engine: str = field("unix:.run/engine.sock", "address of the service")
    engine_secret: Path | None = field(
        None, "file of at least 32 random bytes that the service has too; over a unix socket the same user suffices"
    )
    engine_ca: Path | None = field(None, "PEM file of the CA that certifies the service, for a TCP address")
    engine_certificate: Path | None = field(None, "PEM file of the certificate chain for the service")
    engine_key: Path | None = field(None, "PEM file of its private key")
    journal: str = field(".run/journal.sqlite", "file of the journal, or postgresql://… of a shared one", shown=shown)
    allow_unverified_database: bool = field(False, "allow PostgreSQL on the network with an sslmode below verify-full")
    high_water: Path | None = field(None, "file of the journal's high-water mark", applies="the journal's file, with .mark")
    writer: str = field("ostinato-0", "name of this sidecar, unique on its journal; written into each entry")
    metrics: str = field("127.0.0.1:9400", "address of /metrics, host:port; empty: none")
    health_listen: str = field("", "plain-text address that serves only health, for probes; empty: none")
    open: bool = field(False, "allow addresses beyond loopback without credentials; every caller there is an admin")
    # credentials: files are read again when they change
    tokens: Path | None = field(None, "file of callers: lines of tenant, role and a token's SHA-256")
    allow_plaintext_tokens: bool = field(False, "allow tokens over plain TCP beyond loopback, where they can be read")
    trust_tenant_metadata: bool = field(False, "trust ostinato-tenant in metadata, set by a gateway in front")
    joined_tenants: tuple[str, ...] = field((), "tenants of one owner, as a+b, whose equal prompts are compared")
    # OpenAI gateways, on the same addresses; needs the extra gateway
    vllm_face: bool = field(False, "serve vllm.grpc.engine.VllmEngine beside Generation")
    vllm_timeout_seconds: float = field(600.0, "deadline of its calls that have no earlier one", minimum=0.001)
    # bounds of a request
    max_response_bytes: int = field(
        4 << 20, "size of a worst-case answer, unless the client's metadata raises it", minimum=1024
    )
    response_bytes_ceiling: int = field(32 << 20, "the most that a client's metadata may raise it to", minimum=1024)
    idempotency_key_bytes_max: int = field(256, "size of an idempotency key", minimum=1)
    request_id_bytes_max: int = field(256, "size of a request id", minimum=1)
    # order and queues
    prepares_max: int = field(2, "long requests that the service prepares at once: its --prepare-threads", minimum=1)
    tenant_prepare_queue_max: int = field(64, "long requests of one tenant that wait to be prepared", minimum=1)
    queue_items_max: int = field(4096, "items that wait for a sequence, the journal or the engine", minimum=1)
    tenant_queue_items_max: int = field(1024, "items of one tenant that wait for a sequence", minimum=1)
    numbered_items_max: int = field(64, "items that have one and wait for the engine, with tenants", minimum=1)
    tenant_engine_share: float = field(
        0.875,
        "share of the engine that one tenant's items may hold, with tenants; 1: no room is kept for others",
        minimum=0.01,
        maximum=1.0,
    )
    window_runs_max: int = field(
        0, "runs submitted to the engine at once; 0: twice what it runs, with tenants what it runs", minimum=0
    )
    attempts_max: int = field(3, "engines lost under an item before it fails", minimum=1)
    item_timeout_seconds: float = field(600.0, "timeout of one attempt", minimum=0.001)
    idempotency_ttl_seconds: float = field(86400.0, "how long a key is kept after its outcome", minimum=0.0)
    followers_max: int = field(64, "calls that follow the journal at once", minimum=1)
    tails_max: int = field(64, "calls that read the journal to its end at once", minimum=1)
    replays_max: int = field(8, "replays at once", minimum=1)
    tenant_replays_max: int = field(2, "replays of one tenant at once, with tenants", minimum=1)
    # bytes held for callers
    held_call_bytes_max: int = field(16 << 20, "waiting for one stream's reader; above it the call is lost", minimum=1024)
    held_tenant_bytes_max: int = field(64 << 20, "held for the callers of one tenant, with tenants", minimum=1024)
    held_bytes_max: int = field(128 << 20, "held for all callers; above it the call that holds most is lost", minimum=1024)
    unread_seconds_max: float = field(60.0, "how long a message of Tail or Replay waits for its reader", minimum=0.01)
    # second runs
    reruns_share: float = field(0.25, "share of the engine for second runs; one is always allowed", minimum=0.0, maximum=1.0)
    audit_rate: float = field(0.01, "sampled share of completed items that are run again", minimum=0.0, maximum=1.0)
    audit_tokens_per_second: float = field(0.0, "token budget of audits, prompts included; 0: no limit", minimum=0.0)
    audit_backlog_max: int = field(1024, "sampled items that wait to be run again", minimum=1)
    audit_patience_seconds: float = field(60.0, "how long the audit of an item that ran alone waits", minimum=0.0)
    canaries: Path | None = field(
        None, "TOML file of prompts whose answers are learned and watched", applies="the sidecar's own"
    )
    canary_seconds: float = field(300.0, "between two rounds of canaries; 0 disables them", minimum=0.0)
    # journal
    journal_bytes_max: int = field(0, "size of the journal; 0: no bound but the disk", minimum=0)
    tenant_journal_bytes_max: int = field(
        0, "size of one tenant's entries, with tenants; 0: half of --journal-bytes-max, if that is set", minimum=0
    )
    journal_reserve_bytes: int = field(16 << 20, "room kept free for outcomes", minimum=0)
    lease_seconds: float = field(10.0, "after which others take over a silent sidecar's items; PostgreSQL", minimum=0.5)
    payloads: str = field(
        "full", "what the journal keeps; digests: payloads only until the outcome", choices=("full", "digests")
    )
    signing_key: Path | None = field(None, "PEM file of the Ed25519 key that signs every transaction of the journal")
    # witnesses
    witness: str = field("", "where signed heads are kept too: a file, http(s)://…, or host:port of another sidecar")
    witness_entries: int = field(1000, "new entries after which it gets a head", minimum=1)
    witness_seconds: float = field(60.0, "after which it gets a head if there are new entries", minimum=0.1)
    witness_token: Path | None = field(None, "file of the bearer token for the witness")
    witness_ca: Path | None = field(None, "PEM file of CAs for the witness's certificate; turns TLS on for another sidecar")
    witness_keys: Path | None = field(None, "file of other logs whose heads are recorded here: lines of log id and public key")
    # time
    reconnect_seconds: float = field(0.2, "pause before the engine stream is opened again", minimum=0.01)
    tick_seconds: float = field(0.1, "interval of checks for deadlines", minimum=0.01)

    def __post_init__(self) -> None:
        intake.Bounds.__post_init__(self)
        if not self.writer.isprintable() or not 1 <= len(self.writer.encode()) <= 128:
            raise ValueError("--writer: 1 to 128 bytes, and no control characters")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate, --tls-key: one needs the other")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        if self.trust_tenant_metadata and self.tls_client_ca is not None:
            raise ValueError("--trust-tenant-metadata: tenants come from --tls-client-ca already")
        joined = [name for group in self.joined_tenants for name in group.split("+")]
        if any("+" not in group for group in self.joined_tenants) or len(set(joined)) < len(joined) or "" in joined:
            raise ValueError("--joined-tenants: groups of two tenants or more, as a+b,c+d, and no tenant twice")
        if not self.listen:
            raise ValueError("--listen: needs at least one address")
        if self.witness and self.signing_key is None:
            raise ValueError("--witness needs --signing-key: only signed heads are given to a witness")
        if re.match(r"https?://[^/]*@", self.witness):
            raise ValueError("--witness: a URL has no user and no password here: use --witness-token")
        if not self.witness and (self.witness_token is not None or self.witness_ca is not None):
            raise ValueError("--witness-token, --witness-ca: need --witness")
        if self.witness_token is not None and not (self.witness_is_log or self.witness.startswith("https://")):
            raise ValueError("--witness-token: is for https:// and for another sidecar")
        if fault := journal_fault(self.journal):
            raise ValueError(f"--journal: {fault}")
        check_target("--engine", self.engine)
        if len({self.engine_ca is None, self.engine_certificate is None, self.engine_key is None}) > 1:
            raise ValueError("--engine-ca, --engine-certificate, --engine-key: none of them goes without the others")
        if self.engine.startswith("unix:") and self.engine_ca is not None:
            raise ValueError("--engine-ca is for a TCP address of the service")
        if not (self.engine.startswith("unix:") or self.engine_secret or self.engine_ca):
            raise ValueError(f"--engine: {self.engine}: there both programs must prove themselves: {HOP_REMEDY}")
        if self.response_bytes_ceiling < self.max_response_bytes:
            raise ValueError("--response-bytes-ceiling is below --max-response-bytes")
        if COPIES * self.response_bytes_ceiling > self.held.tenant:
            raise ValueError(f"--held-bytes-max, --held-tenant-bytes-max: at least {COPIES} times --response-bytes-ceiling")
        if self.held_call_bytes_max > self.held.tenant:
            raise ValueError(
                "--held-call-bytes-max is above --held-bytes-max or --held-tenant-bytes-max: no stream could reach it"
            )
        if self.journal_bytes_max and self.journal_bytes_max <= 2 * self.journal_reserve_bytes:
            raise ValueError("--journal-bytes-max must be more than twice --journal-reserve-bytes")
        if self.journal_bytes_max and is_shared(self.journal):
            raise ValueError("--journal-bytes-max bounds a file; a PostgreSQL server has bounds of its own")

    @property
    def mark(self) -> Path | None:
        """The high-water mark's file, if there is one."""
        return self.high_water or mark_of(self.journal)

    @property
    def witness_is_log(self) -> bool:
        """Whether the witness is another sidecar: an address, not a file or a URL."""
        return bool(re.match(r"unix:|[^/]+:\d+$", self.witness))

    @property
    def tenants(self) -> bool:
        """Whether there are tenants other than ""."""
        return self.trust_tenant_metadata or self.tokens is not None or self.tls_client_ca is not None

    def group_of(self, tenant: str) -> str:
        """The tenants with whose items this one's are compared have the same group."""
        groups = [group.split("+") for group in self.joined_tenants]
        return next((names[0] for names in groups if tenant in names), tenant)

    @property
    def tenant_journal_bytes(self) -> int:
        """Of the journal, for one tenant's entries. 0: no bound."""
        return (self.tenant_journal_bytes_max or self.journal_bytes_max // 2) if self.tenants else 0

    @property
    def tenant_prepares_max(self) -> int:
        """Long requests of one tenant that are prepared at once."""
        return max(1, self.prepares_max // 2) if self.tenants else self.prepares_max

    @property
    def held(self) -> HeldBounds:
        """The bounds of `Held`."""
        tenant = min(self.held_tenant_bytes_max, self.held_bytes_max) if self.tenants else self.held_bytes_max
        return HeldBounds(self.held_call_bytes_max, tenant, self.held_bytes_max)

    @property
    def bounds(self) -> Bounds:
        """The core's bounds."""
        return Bounds(
            queue_items_max=self.queue_items_max,
            window_runs_max=self.window_runs_max,
            tenant_queue_items_max=self.tenant_queue_items_max if self.tenants else self.queue_items_max,
            numbered_items_max=min(self.queue_items_max, self.numbered_items_max) if self.tenants else self.queue_items_max,
            tenant_share=self.tenant_engine_share if self.tenants else 1.0,
            attempts_max=self.attempts_max,
            item_timeout_seconds=self.item_timeout_seconds,
            reruns_share=self.reruns_share,
        )


def mark_of(journal: str) -> Path | None:
    """The default file of a journal's high-water mark. On another disk it would protect more."""
    return None if is_shared(journal) else Path(f"{journal}.mark")
