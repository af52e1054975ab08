"""`ostinato verify`: verifies receipts, entries and signed heads from files alone, without a sidecar.

Three things are told apart:

    consistent  the content is what its digests say: token ids, text, logprobs, seed, grade, input
    chained     an entry follows the one before; a receipt's entry is in the signed head's tree
    signed      a key that was given has signed a head that covers it

Only what is all three is proved: anyone can write a file that is consistent. With a witness, one of its heads has to cover it
too. Messages have more than that. Where it repeats what a receipt says it is compared; the rest is named as not covered.

A verification reads the witness, then the file, and then judges what is said in several places. The computations are in other
modules: `chain` hashes and compares content, `signature` follows trees and checks signatures, `documents` parses JSON.
"""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError, Message

from ostinato import chain
from ostinato.cli import documents, show
from ostinato.cli.session import FAILED, UNJUDGED, Session, usage, wrong
from ostinato.signature import PublicKeys, head_fault, inclusion_fault
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

_SQLITE = b"SQLite format 3\0"
"""The first bytes of a SQLite file."""
WITNESS_SECONDS, WITNESS_BYTES_MAX = 30.0, 256 << 20
"""To read a witness's URL, and how much of it."""

CONSISTENT, CHAINED, SIGNED, WITNESSED = "consistent", "chained", "signed", "witnessed"
CODES = {CONSISTENT: FAILED, CHAINED: 4, SIGNED: 5, WITNESSED: 6}
"""Exit codes of faults, by what does not hold; the smallest one counts. UNJUDGED: no fault, and not proved."""
COVERED = {
    types_pb2.Result: {"sequence", "output", "receipt", "attempt"},
    types_pb2.Output: {"text", "token_ids", "finish_reason", "matched_stop", "seed", "logprobs", "grade", "parsed"},
    types_pb2.EntryHeader: {*chain.REPEATED, "kind"},
    types_pb2.Stamp: {"log_id", "first_sequence", "count"},
    sequencer_pb2.AdmittedPayload: {"token_ids", "parameters", "seed", "nonce"},
    sequencer_pb2.HeadResponse: {"log_id", "index", "entry_hash", "signed"},
}
"""The fields that a receipt or a signed head covers, or that are compared with it."""
ON_TRUST = "the entry before it is unknown, so its content is on trust"
"""The next entry names the hash of such an entry; nothing else about it can be verified."""
KINDS = {"receipt": "receipts", "entry": "entries", "head": "heads"}
"""Kinds of proofs, and how several are called."""


def verify(
    session: Session,
    file: Annotated[Path, typer.Argument(help="JSON or JSON lines; - is stdin.", show_default=False)],
    key: Annotated[
        list[Path] | None,
        typer.Option(metavar="PEM", help="The log's public key; may be repeated, for old keys.", show_default=False),
    ] = None,
    log: Annotated[str | None, typer.Option(metavar="ID", help="The log that it must be of.", show_default=False)] = None,
    witness: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Signed heads that a witness holds: its file, its URL, or the second log as tail --json --payloads prints it.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Verifies receipts, entries and heads offline. They are what generate, get, tail and head print with --json.

    Exit code 0: proved; 1: not consistent; 3: consistent, not proved; 4: not chained; 5: not signed by the key; 6: the witness
    holds something else.
    """
    verification = Verification(public_keys(key or ()), log)
    if witness is not None:
        verification.read_witness(*_fetched(witness))
    name, content = documents.content_of(file)
    verification.read(name, content)
    verification.finish()
    if session.json:
        show.as_json(verification.as_dict())
    else:
        show.lines(verification.lines())
    if not verification.proofs:
        show.note(f"error: nothing to verify in {file}: {_nothing(content)}")
    return verification.code


def public_keys(paths: Iterable[Path]) -> PublicKeys:
    """The keys in these files. Raises BadParameter that names the file."""
    keys = PublicKeys()
    for path in paths:
        with usage("--key"):
            pem = path.read_bytes()
        with usage(f"--key: {path}"):
            keys.add(pem)
    return keys


def _fetched(witness: str) -> tuple[str, bytes]:
    """The name and the content of a witness's file or URL."""
    if not witness.startswith(("http://", "https://")):
        with usage("--witness"):
            return witness, Path(witness).read_bytes()
    try:
        with urllib.request.urlopen(witness, timeout=WITNESS_SECONDS) as response:  # noqa: S310  # http and https alone
            return witness, response.read(WITNESS_BYTES_MAX)
    except (OSError, ValueError, HTTPException) as error:
        raise wrong(f"--witness: {witness}: {getattr(error, 'reason', error)}") from None


def _nothing(content: bytes) -> str:
    """Why there is nothing to verify."""
    if not content.strip():
        return "it has only blank lines" if content else "it is empty"
    return "it has no receipt, no signed head, and no entry whose previous entry is known"


Tree = tuple[str, int, int, bytes]
"""Log, first and last index, and root of a signed head."""


def _tree(head: types_pb2.SignedHead) -> Tree:
    return head.log_id, head.first_index, head.last_index, head.root


@dataclass
class Proof:
    """A receipt, an entry or a head, and what holds of it."""

    kind: str
    """"receipt", "entry" or "head"."""
    place: str
    log_id: str
    index: int
    entry_hash: bytes
    holds: set[str] = field(default_factory=set)
    text: bool | None = None
    """Whether a digest covers the output's text; None: there is no output."""
    tree: Tree | None = None
    """Of the head in a receipt, if the receipt's entry is in it."""
    unsigned: str = ""
    """Why it is not signed, if that is no fault."""

    def state(self, required: Iterable[str]) -> str:
        told = [each if each in self.holds else f"not {each}" for each in required]
        return ", ".join(told + ["the text is not covered"] * (self.text is False))


class Verification:
    """Collects proofs and faults: `read_witness` and `read`, then `finish`, then the results."""

    def __init__(self, keys: PublicKeys | None = None, log_id: str | None = None) -> None:
        self.proofs: list[Proof] = []
        self.faults: list[str] = []
        self._broken: set[str] = set()
        """What does not hold, by the faults."""
        self._beside = Counter[str]()
        """What the files have beside proofs that nothing proves."""
        self._uncovered: set[str] = set()
        """Fields that nothing covers."""
        self._keys, self._log_id = keys or PublicKeys(), log_id
        self._signatures: dict[bytes, bool] = {}
        """Whether a head's signature is valid, by the head."""
        self._signers: set[str] = set()
        self._hashes: dict[tuple[str, int], tuple[bytes, str, bool]] = {}
        """By log and index: an entry's hash, the place that says so, and whether that is the witness's."""
        self._trees: dict[Tree, tuple[str, bool]] = {}
        """The places that say so, and whether they are the witness's."""
        self._heads: dict[str, dict[tuple[str, int], bytes]] = {SIGNED: {}, WITNESSED: {}}
        """Entry hashes of the heads that a given key has signed, and of the witness's; by log and index."""
        self._required = [CONSISTENT, CHAINED, SIGNED]
        """What makes a proof."""
        self._previous: sequencer_pb2.Entry | None = None
        self._runs: list[list[Proof]] = []
        """Entries, each linked to the one before."""

    def _fault(self, place: str, what: str, *faults: str) -> None:
        """Notes faults of a kind: CONSISTENT, CHAINED, SIGNED or WITNESSED does not hold."""
        for fault in faults:
            self.faults.append(f"{place}: {fault}")
            self._broken.add(what)

    def _settle(self, proof: Proof, what: str, *faults: str) -> None:
        """Something holds of a proof, unless there are faults; empty ones are none."""
        if not any(faults):
            proof.holds.add(what)
        self._fault(proof.place, what, *filter(None, faults))

    # ---- reading: each message is judged by itself

    def read_witness(self, name: str, content: bytes) -> None:
        """What a witness holds: heads, or the WITNESSED entries of a second log. What is no valid head is passed over."""
        self._required.append(WITNESSED)
        passed_over = 0
        for line, value in documents.values(name, content):
            for place, _, message in documents.messages(line, value):
                head = _witnessed_head(message)
                if head is None:
                    continue
                if head_fault(head) or (self._keys and self._signed(head) is not None):
                    passed_over += 1
                    continue
                self._note_head(head, place, witness=True)
                for what in (SIGNED, WITNESSED) if self._keys else (WITNESSED,):
                    self._heads[what][head.log_id, head.last_index] = head.entry_hash
        if passed_over:
            show.note(f"passed over: {passed_over} heads of the witness, which no given key has signed")

    def read(self, name: str, content: bytes) -> None:
        """A file of one JSON value, or of one per line. A file without JSON is one fault, not one per line."""
        if content.startswith(_SQLITE):
            self._fault(name, CONSISTENT, "is a SQLite file: if it is a sidecar's journal, use `ostinato sidecar verify`")
            return
        values = list(documents.values(name, content))
        no_json = all(isinstance(value, Exception) for _, value in values)
        for line, value in values[:1] if no_json else values:
            for found in documents.messages(line, value):
                self._take(*found)
        if no_json and len(values) > 1:
            self._fault(name, CONSISTENT, f"the other {len(values) - 1} lines are not JSON either")

    def _take(self, place: str, value: Any, message: Message | Exception) -> None:
        """A message that contains proofs, and the JSON value that it was."""
        match message:
            case ParseError():
                self._fault(place, CONSISTENT, f"not a message of the contract: {message}")
            case Exception():
                self._fault(place, CONSISTENT, f"not JSON: {message}")
            case types_pb2.SignedHead():
                self._head(place, message)
            case sequencer_pb2.HeadResponse():
                self._head_response(place, message)
            case types_pb2.Receipt():
                self._receipt(place, message, chain.check_receipt(message), {})
            case sequencer_pb2.Entry():
                self._entry(place, message, value.get("decoded"))
            case generation_pb2.GenerateResponse():
                for result in message.results:
                    self._result(place, result)
                self._stamp(place, message)
            case sequencer_pb2.GetResponse():
                for record in message.items:
                    self._record(place, record)
            case sequencer_pb2.ItemRecord():
                self._record(place, message)
            case generation_pb2.GenerateEvent() if message.HasField("finished"):
                self._result(place, message.finished)
            case generation_pb2.GenerateEvent():
                self._beside["events other than finished have no receipt"] += 1
            case types_pb2.Result():
                self._result(place, message)
                self._uncovered |= value.keys() & documents.ADDED

    def _result(self, place: str, result: types_pb2.Result) -> None:
        place = f"{place}: sequence {result.sequence}"
        if result.HasField("receipt"):
            parts = {"": result, "output.": result.output}
            self._receipt(place, result.receipt, chain.check_result(result), parts)
        elif result.HasField("output"):
            self._fault(place, CONSISTENT, "receipt: missing")
        else:
            self._beside["a result without output has no receipt"] += 1

    def _record(self, place: str, record: sequencer_pb2.ItemRecord) -> None:
        place = f"{place}: sequence {record.admitted.sequence}"
        if record.result.HasField("receipt"):
            parts = {"": record.result, "output.": record.result.output, "admitted.": record.admitted, "input.": record.input}
            self._receipt(place, record.result.receipt, chain.check_record(record), parts)
        else:
            missing = ["receipt: missing"] if record.result.HasField("output") else []
            self._fault(place, CONSISTENT, *chain.check_record(record), *missing)
            self._beside["a record without output has no receipt"] += 1

    def _stamp(self, place: str, response: generation_pb2.GenerateResponse) -> None:
        stamp = response.stamp
        said = (stamp.log_id, stamp.first_sequence, stamp.count)
        headers = [each.receipt.header for each in response.results if each.HasField("receipt")]
        if response.HasField("stamp") and any(said != (each.log_id, each.first_sequence, each.count) for each in headers):
            self._fault(place, CONSISTENT, "stamp: is not that of the receipts")
        self._name_uncovered("stamp.", stamp)

    def _receipt(self, place: str, receipt: types_pb2.Receipt, faults: list[str], parts: Mapping[str, Message]) -> None:
        """`parts`: the messages that it covers, by the prefix of their fields."""
        header = receipt.header
        proof = self._proof("receipt", place, header.log_id, header.index, receipt.entry_hash)
        if parts:
            proof.text = header.form > 0
            for prefix, part in parts.items():
                self._name_uncovered(prefix, part)
        elif receipt.nonce:
            self._uncovered.add("nonce")
        self._settle(proof, CONSISTENT, *faults)
        self._note_hash(header.log_id, header.index - 1, receipt.previous_hash, place)
        if not receipt.HasField("head"):
            proof.unsigned = "it has no signature"
            return
        fault = inclusion_fault(receipt)
        self._settle(proof, CHAINED, fault)
        self._settle_signature(proof, receipt.head)
        if fault:
            proof.holds.discard(SIGNED)  # what is signed is another entry
        else:
            proof.tree = _tree(receipt.head)

    def _head(self, place: str, head: types_pb2.SignedHead) -> None:
        place = f"{place}: head of entry {head.last_index}"
        proof = self._proof("head", place, head.log_id, head.last_index, head.entry_hash)
        self._settle(proof, CONSISTENT, head_fault(head))
        self._settle(proof, CHAINED)
        self._settle_signature(proof, head)

    def _head_response(self, place: str, answer: sequencer_pb2.HeadResponse) -> None:
        """The head that it repeats may be older than the signed one or, by a moment, newer."""
        head = answer.signed
        if not answer.HasField("signed"):
            self._fault(place, CONSISTENT, "signed: missing, the log is not signed")
            return
        self._head(place, head)
        if answer.log_id != head.log_id:
            self._fault(place, CONSISTENT, "log_id: is not that of the signed head")
        if answer.index != head.last_index:
            self._beside["the signed head is not of the entry that index says"] += 1
        elif answer.entry_hash != head.entry_hash:
            self._fault(place, CONSISTENT, "entry_hash: is not that of the signed head")
        self._name_uncovered("", answer)

    def _entry(self, place: str, entry: sequencer_pb2.Entry, decoded: object) -> None:
        previous, self._previous = self._previous, entry
        place = f"{place}: index {entry.header.index}"
        faults = _payload_faults(entry, decoded)
        if previous is None and entry.header.index != 1:
            self._beside[ON_TRUST] += 1
            self._fault(place, CONSISTENT, *faults)
            self._note_hash(entry.header.log_id, entry.header.index, entry.entry_hash, place)
            self._runs.append([])
            return
        proof = self._proof("entry", place, entry.header.log_id, entry.header.index, entry.entry_hash)
        proof.unsigned = "no signed head follows it"
        links = [fault for fault in chain.check_link(previous, entry) if not fault.startswith("payload:")]
        self._settle(proof, CONSISTENT, *faults)
        self._settle(proof, CHAINED, *links)
        if links or previous is None:
            self._runs.append([])
        self._runs[-1].append(proof)

    def _name_uncovered(self, prefix: str, message: Message) -> None:
        """The fields of this message that are set, and that nothing covers."""
        self._uncovered |= {
            prefix + field.name for field, _ in message.ListFields() if field.name not in COVERED[type(message)]
        }

    def _proof(self, kind: str, place: str, log_id: str, index: int, entry_hash: bytes) -> Proof:
        proof = Proof(kind, place, log_id, index, entry_hash)
        self.proofs.append(proof)
        if self._log_id is not None and log_id != self._log_id:
            self._fault(place, CHAINED, f"is of log {log_id}")
        self._note_hash(log_id, index, entry_hash, place)
        return proof

    def _settle_signature(self, proof: Proof, head: types_pb2.SignedHead) -> None:
        self._note_head(head, proof.place)
        why = self._signed(head)
        if why is None:
            proof.holds.add(SIGNED)
            self._heads[SIGNED][head.log_id, head.last_index] = head.entry_hash
        elif why:
            proof.unsigned = why
        else:
            self._fault(proof.place, SIGNED, f"signature: is not by key {head.key_id}")

    def _signed(self, head: types_pb2.SignedHead) -> str | None:
        """None: a given key has signed it. Otherwise why that is not known, or empty: the signature is not valid."""
        if head.key_id not in self._keys:
            return f"it is signed with key {head.key_id}, which was not given" if self._keys else "no key was given"
        name = head.SerializeToString(deterministic=True)
        if name not in self._signatures:  # all receipts of a transaction have one head
            self._signatures[name] = self._keys.verify(head)
        if not self._signatures[name]:
            return ""
        self._signers.add(head.key_id)
        return None

    # ---- judging: what is said in several places

    def _note_hash(self, log_id: str, index: int, entry_hash: bytes, place: str, *, witness: bool = False) -> None:
        """An entry has one hash. Another one is a fork of the log, or invented."""
        known, other, by_witness = self._hashes.setdefault((log_id, index), (entry_hash, place, witness))
        if known != entry_hash and index > 0:
            self._fault(place, WITNESSED if by_witness else CHAINED, f"{other} has another entry {index} of this log")

    def _note_head(self, head: types_pb2.SignedHead, place: str, *, witness: bool = False) -> None:
        self._note_hash(head.log_id, head.last_index, head.entry_hash, place, witness=witness)
        self._trees.setdefault(_tree(head), (place, witness))

    def finish(self) -> None:
        """Once everything is read."""
        self._compare_trees()
        self._cover_entries()
        self._settle_elsewhere()
        self._compare_ends()

    def _compare_trees(self) -> None:
        """Each entry is in one tree. Another one is a fork inside a transaction, where the entries need not be here."""
        widest: Tree | None = None
        for tree in sorted(self._trees):
            place, by_witness = self._trees[tree]
            if widest is not None and tree[0] == widest[0] and tree[1] <= widest[2]:
                other, other_by_witness = self._trees[widest]
                what = WITNESSED if by_witness or other_by_witness else CHAINED
                self._fault(place, what, f"{other} has another tree with entry {tree[1]} of this log")
            if widest is None or tree[0] != widest[0] or tree[2] > widest[2]:
                widest = tree

    def _cover_entries(self) -> None:
        """A head covers its entry and, as each has the hash of the one before, all entries that lead to it."""
        for run in self._runs:
            for what, heads in self._heads.items():
                covered = [place for place, each in enumerate(run) if heads.get((each.log_id, each.index)) == each.entry_hash]
                for proof in run[: covered[-1] + 1 if covered else 0]:
                    proof.holds.add(what)

    def _settle_elsewhere(self) -> None:
        """What holds of an entry holds of a receipt or head of it, except that the content is another one."""
        entries = {(each.log_id, each.index, each.entry_hash): each.holds for run in self._runs for each in run}
        for proof in self.proofs:
            proof.holds |= entries.get((proof.log_id, proof.index, proof.entry_hash), set()) - {CONSISTENT}
            by_tree = proof.tree is not None and self._trees[proof.tree][1]
            if by_tree or self._heads[WITNESSED].get((proof.log_id, proof.index)) == proof.entry_hash:
                proof.holds.add(WITNESSED)

    def _compare_ends(self) -> None:
        """A log whose end was cut off has fewer entries than the witness has seen."""
        for end in {run[-1].log_id: run[-1] for run in self._runs if run}.values():
            newest = max((index for log_id, index in self._heads[WITNESSED] if log_id == end.log_id), default=0)
            if newest > end.index:
                self._fault(end.place, WITNESSED, f"is the last entry here, and the witness has a head of entry {newest}")

    # ---- results

    @property
    def code(self) -> int:
        """The exit code."""
        if self._broken or not self.proofs:
            return min((CODES[each] for each in self._broken), default=FAILED)
        return UNJUDGED if self._unproved else 0

    @property
    def verdict(self) -> str:
        if self._broken:
            return "not sound: " + ", ".join(f"not {each}" for each in CODES if each in self._broken)
        if why := self._unproved:
            return f"consistent, not proved: {'; '.join(why)}"
        logs = ", ".join(sorted({proof.log_id for proof in self.proofs}))
        return f"proved: log {logs}, key {', '.join(sorted(self._signers))}"

    @property
    def _unproved(self) -> list[str]:
        """Why not everything is proved."""
        why = set[str]()
        for proof in self.proofs:
            if SIGNED not in proof.holds:
                why.add(proof.unsigned)
            elif not proof.holds.issuperset(self._required):
                why.add("the witness has no head that covers it" if CHAINED in proof.holds else "it is not chained")
            if proof.text is False:
                why.add("the text is not covered by a digest (form 0)")
        why |= {f"{each} ({count} times)" if count > 1 else each for each, count in self._beside.items()}
        return sorted(why - {""})

    def count(self, kind: str, what: str) -> int:
        return sum(proof.kind == kind and what in proof.holds for proof in self.proofs)

    def _totals(self) -> Iterator[tuple[str, int]]:
        """The kinds of which there are proofs, and how many."""
        totals = Counter(proof.kind for proof in self.proofs)
        return ((kind, totals[kind]) for kind in KINDS if totals[kind])

    def as_dict(self) -> dict[str, Any]:
        counts = {
            KINDS[kind]: {"total": total} | {each: self.count(kind, each) for each in (*self._required, WITNESSED)}
            for kind, total in self._totals()
        }
        proofs = [
            {"place": each.place, "log_id": each.log_id, "index": str(each.index)}
            | {what: what in each.holds for what in self._required}
            | ({} if each.text is None else {"text": each.text})
            for each in self.proofs
        ]
        told = {"verdict": self.verdict, "entries_on_trust": self._beside[ON_TRUST], "faults": self.faults, "proofs": proofs}
        return counts | told | {"not_covered": sorted(self._uncovered)}

    def lines(self) -> Iterator[str]:
        """What is printed."""
        yield from self.faults
        for (kind, state), group in groupby(self.proofs, lambda proof: (proof.kind, proof.state(self._required))):
            first, *others = group
            if kind == "entry" and others:
                yield f"{first.place} to {others[-1].index}: {state}"
            else:
                yield from (f"{proof.place}: {state}" for proof in (first, *others))
        for kind, total in self._totals():
            counts = [f"{self.count(kind, each)} {each}" for each in self._required]
            trust = ["1 before them on trust"] if kind == "entry" and self._beside[ON_TRUST] else []
            yield f"{total} {kind if total == 1 else KINDS[kind]}: {', '.join(counts + trust)}"
        if self._uncovered and not self._broken:
            yield f"not covered: {', '.join(sorted(self._uncovered))}"
        if self.proofs:
            yield self.verdict


def _witnessed_head(message: Message | Exception) -> types_pb2.SignedHead | None:
    """The head in a line of a witness: a SignedHead, an envelope, a HeadResponse or a WITNESSED entry. None: there is none."""
    match message:
        case types_pb2.SignedHead():
            return message
        case sequencer_pb2.HeadResponse() if message.HasField("signed"):
            return message.signed
        case sequencer_pb2.Entry() if message.header.kind == types_pb2.ENTRY_KIND_WITNESSED and message.payload:
            with suppress(DecodeError):
                return sequencer_pb2.WitnessedPayload.FromString(message.payload).head
    return None


def _payload_faults(entry: sequencer_pb2.Entry, decoded: object) -> list[str]:
    """Faults of an entry's payload and of its decoded form."""
    if not entry.payload:
        return ["decoded: there is no payload"] if decoded else []
    if chain.payload_digest(entry.payload) != entry.header.payload_digest:
        return ["payload: does not match payload_digest"]
    try:
        said = show.entry(entry).get("decoded")
    except DecodeError:
        return ["payload: cannot be decoded"]
    return ["decoded: differs from the payload"] if decoded not in (None, said) else []
