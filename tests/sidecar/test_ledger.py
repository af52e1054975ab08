"""The ledger: from drafts and what is known to entries, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ostinato.chain import GENESIS, entry_hash
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.ledger import NUMBER_MAX, Known, Ledger, Needs, needs, twins_tag
from sidecar.journal.model import Binding, Draft, Head, Outcome, Sealed, Witnessed
from tests.sidecar.journal_kit import ABOUT_AN_ITEM, LOG_ID, SECRET, admission, audit, checked, completed, ended, item

EMPTY = Head(LOG_ID, "writer", 1, 0, GENESIS, 0)


def admitted(count: int = 1) -> tuple[Head, tuple[Sealed, ...]]:
    """A head after OPENED and a batch, and the batch."""
    ledger = Ledger(EMPTY, Known(), 1, SECRET)
    ledger.open("1.0")
    entries = ledger.append(admission(*(item(n) for n in range(1, count + 1)))).entries
    return ledger.head, entries


def test_head_follows() -> None:
    """The head is always the newest entry's index and hash and the newest sequence; the log and the epoch stay."""
    ledger = Ledger(EMPTY, Known(), 1, SECRET)
    for entry in (ledger.open("1.0"), *ledger.append(admission(item(), item())).entries):
        assert entry.entry_hash == entry_hash(entry.previous_hash, entry.header)
    last = ledger.entries[-1]
    assert ledger.head == structs.replace(EMPTY, index=3, entry_hash=last.entry_hash, last_sequence=2)


def test_dropped_ledger_leaves_nothing() -> None:
    """Nothing that goes in is changed, so a transaction that fails has never been."""
    head, (entry,) = admitted()
    known = Known({}, frozenset({1}), {})
    drafts: list[Draft] = [admission(item(9), key="k"), completed(entry), audit(entry)]
    before = repr((head, known, drafts))
    first, second = Ledger(head, known, 5, SECRET), Ledger(head, known, 5, SECRET)

    assert [first.append(draft) for draft in drafts] == [second.append(draft) for draft in drafts]
    assert repr((head, known, drafts)) == before
    assert first.head == second.head != head


def test_needs() -> None:
    """Only keyed admissions, outcomes, inputs that completed, and heads of other logs have to be looked up."""
    _, entries = admitted(2)
    drafts: list[Draft] = [
        admission(),
        admission(key="k", tenant="t"),
        completed(entries[0]),
        ended(entries[1]),
        audit(entries[1]),
        Witnessed(types_pb2.SignedHead(log_id="b" * 32)),
    ]

    outcome = completed(entries[0])
    assert needs(drafts, SECRET) == Needs(
        frozenset({("t", "k")}),
        frozenset({1, 2}),
        frozenset({twins_tag(SECRET, outcome.twins)}),
        frozenset({outcome.fingerprint_digest}),
        frozenset({"b" * 32}),
    )


def test_known_binding() -> None:
    """A key that the journal knows to be bound is answered with its binding, and its number is not burned."""
    binding = Binding(b"r" * 32, 1, 1)
    ledger = Ledger(structs.replace(EMPTY, last_sequence=7), Known({("t", "k"): binding}), 1, SECRET)
    answers = [ledger.append(admission(key="k", tenant=tenant)) for tenant in ("t", "")]

    assert answers[0].binding is binding
    assert answers[1].entries[0].header.sequence == 8
    assert [(a.tenant, b.first_sequence) for a, b in ledger.bound] == [("", 8)]


def test_payload_is_complete() -> None:
    """The batch's key and request digest, and the seed in effect, are filled into every item's payload."""
    ledger = Ledger(EMPTY, Known(), 1, SECRET)
    entries = ledger.append(admission(item(1, request_id="r"), item(2, seed=5), key="k", digest=b"q" * 32)).entries

    for entry in entries:
        payload = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
        assert (payload.idempotency_key, payload.request_digest, payload.seed) == ("k", b"q" * 32, entry.header.seed)
    assert sequencer_pb2.AdmittedPayload.FromString(entries[0].payload).request_id == "r"


@settings(deadline=None)
@given(st.data())
def test_any_drafts_make_a_sound_chain(data: st.DataObject) -> None:
    """Whatever is appended, every invariant of the chain holds, and each item has at most one outcome."""
    ledger = Ledger(EMPTY, Known(), 1, SECRET)
    ledger.open("1.0")
    items: list[Sealed] = []
    for _ in range(data.draw(st.integers(0, 20))):
        if not items or data.draw(st.booleans()):
            key = data.draw(st.sampled_from(["", "a", "b"]))
            items += ledger.append(admission(*(item(n) for n in range(1, data.draw(st.integers(2, 4)))), key=key)).entries
        else:
            make = ABOUT_AN_ITEM[data.draw(st.sampled_from(sorted(ABOUT_AN_ITEM)))]
            known = Known({}, frozenset(checked(ledger.entries).unfinished))
            later = Ledger(ledger.head, known, 2, SECRET)
            later.append(make(data.draw(st.sampled_from(items))))
            later.entries[:0] = ledger.entries
            ledger = later

    assert checked(ledger.entries).last_sequence == len(items) == ledger.head.last_sequence


def wrong_drafts() -> list[tuple[str, Draft]]:
    _, (entry,) = admitted()
    good, failed = completed(entry), ended(entry)
    foreign, later = types_pb2.EntryHeader(), types_pb2.EntryHeader()
    foreign.CopyFrom(entry.header)
    foreign.log_id = "f" * 32
    later.CopyFrom(entry.header)
    later.sequence = 2
    seedless = sequencer_pb2.CompletedPayload(output=types_pb2.Output(seed=1))
    return [
        ("a batch without items", structs.replace(admission(), items=())),
        ("a kind that is not an outcome", structs.replace(failed, kind=types_pb2.ENTRY_KIND_AUDITED)),
        ("COMPLETED without an output", structs.replace(failed, kind=types_pb2.ENTRY_KIND_COMPLETED)),
        ("FAILED with an output", structs.replace(good, kind=types_pb2.ENTRY_KIND_FAILED)),
        ("attempt 0", structs.replace(good, attempt=0)),
        ("another log's item", structs.replace(good, admitted=foreign)),
        ("an item to come", structs.replace(good, admitted=later)),
        ("another seed than the item's", structs.replace(good, payload=seedless)),
        ("about an outcome", structs.replace(good, admitted=types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_FAILED))),
        ("a verdict about another item", dataclasses.replace(audit(entry), comparison=types_pb2.Comparison(sequence=9))),
    ]


@pytest.mark.parametrize("draft", [pytest.param(draft, id=name) for name, draft in wrong_drafts()])
def test_our_own_bugs(draft: Draft) -> None:
    """A draft that cannot be meant stops the ledger instead of being recorded for ever."""
    head, _ = admitted()
    unfinished = frozenset({draft.admitted.sequence} if isinstance(draft, Outcome) else ())
    with pytest.raises(AssertionError):
        Ledger(head, Known({}, unfinished), 1, SECRET).append(draft)


def test_numbers_end() -> None:
    """A journal ends at the databases' largest number; it does not wrap around."""
    full = structs.replace(EMPTY, index=NUMBER_MAX)
    with pytest.raises(AssertionError):
        Ledger(full, Known(), 1, SECRET).append(admission())
