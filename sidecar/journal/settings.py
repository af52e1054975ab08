"""What an operator says about a journal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteSettings:
    """How much a journal may hold, and for how long."""

    idempotency_ttl_seconds: int = 86_400
    """From the outcome of a batch's last item."""
    journal_bytes_max: int = 0
    """Of the file, the write-ahead log not counted; 0: no bound but the disk."""
    reserve_bytes: int = 64 << 20
    """Held back for outcomes, of the disk and of journal_bytes_max; 0: nothing."""
    digests_only: bool = False
    """Drop an item's payloads with its outcome; with a key, when that would expire, and then it stays bound for good."""

    def __post_init__(self) -> None:
        if min(self.idempotency_ttl_seconds, self.journal_bytes_max, self.reserve_bytes) < 0:
            raise ValueError("idempotency_ttl_seconds, journal_bytes_max and reserve_bytes must not be negative")
        if self.journal_bytes_max and self.journal_bytes_max <= 2 * self.reserve_bytes:
            raise ValueError("journal_bytes_max must be more than twice reserve_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresSettings:
    """For how long a journal holds what."""

    idempotency_ttl_seconds: int = 86_400
    """From the outcome of a batch's last item."""
    lease_seconds: float = 10.0
    """After so long without a sign of life another writer may take over a writer's items."""

    digests_only: bool = False
    """As in SqliteSettings."""

    def __post_init__(self) -> None:
        if self.idempotency_ttl_seconds < 0 or self.lease_seconds <= 0:
            raise ValueError("idempotency_ttl_seconds must not be negative, and lease_seconds must be positive")
