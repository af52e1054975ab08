"""What has to be read before drafts can be appended, and what was: between a backend and a ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ostinato.v1 import types_pb2

from sidecar.journal import Admission, Binding, Draft, Outcome, Sealed


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be known before a group of drafts can be appended."""

    keys: frozenset[tuple[str, str]]
    """Tenant and key of each keyed admission."""
    sequences: frozenset[int]
    """Of the items that outcomes are about."""
    input_digests: frozenset[bytes]
    """Of the items that have completed."""
    fingerprint_digests: frozenset[bytes]
    """Of what they were made on."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the journal holds of that, read in the transaction that appends."""

    bindings: Mapping[tuple[str, str], Binding] = field(default_factory=dict)
    """By tenant and key, without those that have expired."""
    unfinished: frozenset[int] = frozenset()
    """Those of the sequences that have no outcome."""
    twins: Mapping[bytes, tuple[Sealed, ...]] = field(default_factory=dict)
    """By input digest, the first COMPLETED entry of every fingerprint, ascending."""
    fingerprints: Mapping[bytes, Mapping[str, str]] = field(default_factory=dict)
    """By digest, the fields of those that may have to be compared, as far as they were noted."""


def needs(drafts: Iterable[Draft]) -> Needs:
    """What a ledger for these drafts must be told."""
    drafts = tuple(drafts)
    outcomes = [draft for draft in drafts if isinstance(draft, Outcome)]
    completed = [outcome for outcome in outcomes if outcome.kind == types_pb2.ENTRY_KIND_COMPLETED]
    return Needs(
        frozenset((draft.tenant, draft.key) for draft in drafts if isinstance(draft, Admission) and draft.key),
        frozenset(outcome.admitted.sequence for outcome in outcomes),
        frozenset(outcome.admitted.input_digest for outcome in completed),
        frozenset(outcome.fingerprint_digest for outcome in completed),
    )
