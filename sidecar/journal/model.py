"""The types of the journal: drafts that are to be appended, entries that are recorded, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from google.protobuf.message import Message

from ostinato.errors import Disconnected
from ostinato.signature import SignedTree
from ostinato.v1 import sequencer_pb2, types_pb2

M = TypeVar("M", bound=Message)


class Admission(msgspec.Struct, frozen=True):
    """A batch to be numbered."""

    items: tuple[sequencer_pb2.AdmittedPayload, ...]
    """In the request's order, each with its nonce. The ledger fills in key, request digest, tenant, and the seed where
    seed_derived is set."""
    request_digest: bytes
    key: str = ""
    """Empty: none. With a key that is bound already nothing is appended."""
    tenant: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """The end of an item; the first one that is durable wins."""

    admitted: types_pb2.EntryHeader
    kind: types_pb2.EntryKind.ValueType
    attempt: int
    payload: sequencer_pb2.CompletedPayload | sequencer_pb2.EndedPayload
    """With the item's nonce. Of a COMPLETED one, the twin's comparison is filled in from here."""
    fingerprint_digest: bytes = b""
    twins: bytes = b""
    """Of a COMPLETED one: what its twins have in common (`ledger.twins_of`); empty: it is compared with none."""


@dataclass(frozen=True, slots=True)
class Audit:
    """A comparison's verdict about an item. One of kind VERIFY belongs to the item's answer: `ItemEntries.verified`."""

    admitted: types_pb2.EntryHeader
    """Of a canary, which was never admitted: only form, seed and input_digest are set."""
    comparison: types_pb2.Comparison
    """With bare digests. The entry has them sealed, so that nothing of a redacted item is left in it."""
    nonce: bytes
    """The item's."""
    fingerprint_digest: bytes = b""
    """Of the second run."""
    grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED
    """What was promised: that of the item's COMPLETED entry, unless the second run's was lower."""
    canary: str = ""
    """Its name; empty: it is about an item."""


@dataclass(frozen=True, slots=True)
class Note:
    """A value by name, beside the chain: not an entry, and not hashed. A later note of the same name replaces it."""

    name: str
    """A path, `kind/…`: notes are read by a common prefix."""
    value: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a journal ended, recorded outside of it."""

    log_id: str
    index: int
    entry_hash: bytes
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Loss:
    """The journal's end was lost, and sequences with it. They are not given out again."""

    through: int
    """The newest sequence that may have been given out; not below the journal's own."""
    mark: Mark | None = None
    """The mark that shows the loss."""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A signed head of another log, whose signature was verified. Nothing is appended unless it is newer than the last one."""

    head: types_pb2.SignedHead


USAGE = "usage/"
"""Prefix of the notes that hold a writer's bytes by tenant."""
FINGERPRINTS = "fingerprint/"
"""Prefix of the notes that hold a Fingerprint; its digest follows, in hexadecimal."""

WITNESSED = "witnessed/"
"""Prefix of the notes that hold the newest WITNESSED entry of another log, as an Entry; the log's id follows."""

Draft = Admission | Outcome | Audit | Note | Loss | Witnessed


class Sealed(msgspec.Struct, frozen=True, eq=False):
    """An entry with its hashes."""

    header: types_pb2.EntryHeader
    previous_hash: bytes
    entry_hash: bytes
    payload: bytes
    """As recorded; empty if it was dropped."""
    signed: SignedTree | None = None
    """Of an outcome whose transaction was signed."""
    made: Message | None = None
    """What was serialised as the payload, if the entry was made here."""

    def read(self, kind: type[M]) -> M:
        """The payload as a message, which must not be changed. Raises DecodeError."""
        return self.made if isinstance(self.made, kind) else kind.FromString(self.payload)

    def __eq__(self, other: object) -> bool:
        """As entries: `signed` and `made` are beside them."""
        if not isinstance(other, Sealed):
            return NotImplemented
        ours, theirs = ((e.header, e.previous_hash, e.entry_hash, e.payload) for e in (self, other))
        return ours == theirs


@dataclass(frozen=True, slots=True)
class Twin:
    """A COMPLETED entry with which later ones are compared."""

    entry: Sealed
    output_tag: bytes = b""
    """Of its output, as `Ledger.output_tag`, if its payload may be dropped at any time; otherwise empty."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What an idempotency key stands for."""

    request_digest: bytes
    """Empty: not known any more, since all of the batch was redacted."""
    first_sequence: int
    count: int


class Appended(msgspec.Struct, frozen=True):
    """The result of appending a draft."""

    entries: tuple[Sealed, ...]
    """Empty for a Note, and where the key was bound or another outcome came first."""
    binding: Binding | None = None
    """Of an Admission whose key was bound before."""
    inputs: tuple[bytes, ...] = ()
    """Of an Admission: the bare input digest of each item."""
    damaged: str = ""
    """Of an Outcome: why an entry was not compared with it as its twin, if that is damaged."""


class ItemEntries(msgspec.Struct, frozen=True):
    """What is recorded of one item."""

    admitted: Sealed
    outcome: Sealed | None = None
    verified: Sealed | None = None
    """The AUDITED entry of kind VERIFY."""
    unsigned: str = ""
    """Why the outcome has no signed head, although its epoch signs."""


class Head(msgspec.Struct, frozen=True):
    """The end of the journal, as a writer knows it."""

    log_id: str
    writer: str
    epoch: int
    index: int
    entry_hash: bytes
    last_sequence: int

    @property
    def mark(self) -> Mark:
        return Mark(self.log_id, self.index, self.entry_hash, self.last_sequence)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An item without an outcome that this writer has to finish."""

    admitted: Sealed
    attempt: int
    """Of its next submission: higher than any before."""


Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""As a database holds it."""


@dataclass(frozen=True, slots=True)
class Log:
    """The identity of a journal, and where it ends."""

    log_id: str
    writers: Mapping[str, Number]
    """The newest epoch of each, by name."""
    index: Number
    entry_hash: bytes
    last_sequence: Number


@dataclass(frozen=True, slots=True)
class Key:
    """An idempotency key that is bound."""

    tenant: str
    key: str
    request_digest: bytes
    first_sequence: Number
    count: Number
    expires_millis: Number | None
    """None: an item of its batch has not ended, or it is bound for good."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What is stored of a signed head. The entries from first to last say the rest."""

    last_index: Number
    first_index: Number
    key_id: str
    signature: bytes


class JournalBroken(Disconnected):
    """It is not known what is durable, or this writer was fenced: the process must end and recover.

    Callers are told that their call is lost; only the log says why.
    """

    def __init__(self, why: str) -> None:
        super().__init__("the sidecar has to recover", retry_after=1.0)
        self.args = (why,)


class CommitUnknown(Exception):
    """The connection was lost during a commit. Appending the same drafts again returns the result of that commit."""


class JournalUnusable(Exception):
    """The journal cannot be opened; the message says why and what to do."""
