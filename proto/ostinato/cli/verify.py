"""`ostinato verify`: verifies receipts, entries and signed heads from files alone, without a sidecar.

Three things are told apart:

    consistent  the content is what its digests say: token ids, text, logprobs, seed, grade, input
    chained     an entry follows the one before; a receipt's entry is in the signed head's tree
    signed      a key that was given has signed a head that covers it

Only what is all three is proved: anyone can write a file that is consistent. With a witness, one of its heads has to cover it
too. Messages have more than that. Where it repeats what a receipt says it is compared; the rest is named as not covered.
"""

from __future__ import annotations

import json
import struct
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from ostinato import chain
from ostinato.cli import show
from ostinato.cli.session import FAILED, STDIN, UNJUDGED, Session, wrong
from ostinato.signature import PublicKeys, head_fault, inclusion_fault, opened
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
KINDS = {"receipt": "receipts", "entry": "entries", "head": "heads"}
"""Kinds of proofs, and how several are called."""

Keys = Annotated[
    list[Path] | None,
    typer.Option("--key", metavar="PEM", help="The log's public key; may be repeated, for old keys.", show_default=False),
]
Log = Annotated[str | None, typer.Option("--log", metavar="ID", help="The log that it must be of.", show_default=False)]
Witness = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Signed heads that a witness holds: its file, its URL, or the second log as tail --json --payloads prints it.",
        show_default=False,
    ),
]


def verify(
    session: Session,
    file: Annotated[Path, typer.Argument(help="JSON or JSON lines; - is stdin.", show_default=False)],
    key: Keys = None,
    log: Log = None,
    witness: Witness = None,
) -> bool:
    """Verifies receipts, entries and heads offline: what generate, get, tail and head print with --json.

    Exit code 0: proved; 1: not consistent; 3: consistent, not proved; 4: not chained; 5: not signed by the key; 6: the witness
    holds something else.
    """
    checks = Checks(public_keys(key or ()), log)
    if witness is not None:
        checks.read_witness(*_fetched(witness))
    name, content = content_of(file)
    checks.read(name, content)
    checks.finish()
    if session.json:
        show.as_json(checks.as_dict())
    else:
        for line in checks.lines() if checks.proofs else checks.faults:
            show.line(show.visible(line))
    if not checks.proofs:
        show.note(f"error: nothing to verify in {file}: {_nothing(content)}")
    if code := checks.code:
        raise typer.Exit(code)
    return True


def public_keys(paths: Iterable[Path]) -> PublicKeys:
    """The keys in these files. Raises BadParameter that names the file."""
    keys = PublicKeys()
    for path in paths:
        try:
            keys.add(path.read_bytes())
        except OSError as error:
            raise wrong(f"--key: {path}: {error.strerror}") from None
        except (ValueError, ImportError) as error:
            raise wrong(f"--key: {path}: {error}") from None
    return keys


def content_of(path: Path) -> tuple[str, bytes]:
    """The file's name for messages, and its content."""
    if str(path) == STDIN:
        return "stdin", sys.stdin.buffer.read()
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        raise wrong(f"{path}: {error.strerror}") from None


def _fetched(witness: str) -> tuple[str, bytes]:
    """As `content_of`, also of a URL."""
    if not witness.startswith(("http://", "https://")):
        return content_of(Path(witness))
    try:
        with urllib.request.urlopen(witness, timeout=WITNESS_SECONDS) as response:  # noqa: S310  # http and https alone
            return witness, response.read(WITNESS_BYTES_MAX)
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise wrong(f"--witness: {witness}: {why}") from None


def _lines(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Place and content of each line that is not blank. Only a line feed ends a line: texts contain other separators."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{name}:{number}", line.removesuffix(b"\r")


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
    """Of the valid receipt's head."""
    unsigned: str = ""
    """Why it is not signed, if that is no fault."""

    def state(self, required: Iterable[str]) -> str:
        told = [each if each in self.holds else f"not {each}" for each in required]
        return ", ".join(told + ["the text is not covered"] * (self.text is False))


class Checks:
    """Collects proofs and faults from JSON documents."""

    def __init__(self, keys: PublicKeys | None = None, log_id: str | None = None) -> None:
        self.proofs: list[Proof] = []
        self.faults: list[str] = []
        self.on_trust = 0
        """Entries whose previous entry is unknown. The next entry names them; nothing else about them can be verified."""
        self.beside = Counter[str]()
        """What the files have beside proofs that nothing proves."""
        self.uncovered: set[str] = set()
        """Fields that nothing covers."""
        self.signers: set[str] = set()
        """Key ids of valid signatures."""
        self._broken: set[str] = set()
        self._keys, self._log_id = keys or PublicKeys(), log_id
        self._claims: dict[tuple[str, int], tuple[bytes, str, bool]] = {}
        """By log and index: an entry's hash, the place that says so, and whether that is the witness's."""
        self._judged: dict[bytes, str | None] = {}
        self._heads: dict[str, dict[tuple[str, int], bytes]] = {SIGNED: {}, WITNESSED: {}}
        """The entry hashes of valid heads, by log and index."""
        self._trees: dict[Tree, tuple[str, bool]] = {}
        """The places that say so, and whether they are the witness's."""
        self._has_witness = False
        self._previous: sequencer_pb2.Entry | None = None
        self._runs: list[list[Proof]] = []
        """Entries, each linked to the one before."""

    # ---- reading

    def read(self, name: str, content: bytes) -> None:
        """A file of one JSON value, or of one per line. A file without JSON is one fault, not one per line."""
        if content.startswith(_SQLITE):
            self._fault(name, CONSISTENT, ["is a SQLite file: if it is a sidecar's journal, use `ostinato sidecar verify`"])
            return
        values = list(json_values(name, content))
        wrong = [value for _, value in values if isinstance(value, Exception)]
        for place, value in values:
            if not isinstance(value, Exception):
                self.take(place, value)
            elif value is wrong[0] or len(wrong) < len(values):
                self._fault(place, CONSISTENT, [f"not JSON: {value}"])
        if len(values) == len(wrong) > 1:
            self._fault(name, CONSISTENT, [f"the other {len(wrong) - 1} lines are not JSON either"])

    def read_witness(self, name: str, content: bytes) -> None:
        """What a witness holds, before the files that are compared with it. What is no valid head is passed over."""
        self._has_witness, passed_over = True, 0
        for place, value in json_values(name, content):
            for each in value if isinstance(value, list) else [value]:
                head = _witnessed_head(each) if isinstance(each, dict) else None
                if head is None or head_fault(head) or (len(self._keys) and self._judge(head) is not None):
                    passed_over += head is not None
                    continue
                self._claim_head(head, place, witness=True)
                for what in (SIGNED, WITNESSED) if len(self._keys) else (WITNESSED,):
                    self._heads[what][head.log_id, head.last_index] = head.entry_hash
        if passed_over:
            show.note(f"passed over: {passed_over} heads of the witness, which no given key has signed")

    def take(self, place: str, given: Any) -> None:
        """One JSON value: a message that contains proofs, or a list of messages."""
        if isinstance(given, list):
            for position, each in enumerate(given):
                self.take(f"{place}[{position}]", each)
            return
        try:
            self._take(place, given if isinstance(given, dict) else {})
        except (json_format.ParseError, RecursionError) as error:
            self._fault(place, CONSISTENT, [f"not a message of the contract: {error}"])
        except (AssertionError, struct.error):
            self._fault(place, CONSISTENT, ["has no digest: it contains NaN or a negative number"])

    def _take(self, place: str, given: dict[str, Any]) -> None:
        if (head := _head(given)) is not None:
            self._take_head(place, head)
            if "signed" in given:
                self._answer(place, json_format.ParseDict(given, sequencer_pb2.HeadResponse()))
        elif "header" in given and "previous_hash" in given:
            receipt = json_format.ParseDict(given, types_pb2.Receipt())
            self._receipt(place, receipt, chain.check_receipt(receipt))
        elif "header" in given:
            decoded = given.pop("decoded", None)
            self._entry(place, json_format.ParseDict(given, sequencer_pb2.Entry()), decoded)
        elif "results" in given:
            response = json_format.ParseDict(given, generation_pb2.GenerateResponse())
            for result in response.results:
                self._result(place, result)
            self._stamp(place, response)
        elif "items" in given:
            for record in json_format.ParseDict(given, sequencer_pb2.GetResponse()).items:
                self._record(place, record)
        elif given.keys() & {"finished", "failed", "tokens", "restarted"} or _is_event(given):
            event = json_format.ParseDict(given, generation_pb2.GenerateEvent())
            if event.HasField("finished"):
                self._result(place, event.finished)
            else:
                self.beside["events other than finished have no receipt"] += 1
        elif "admitted" in given:
            self._record(place, json_format.ParseDict(given, sequencer_pb2.ItemRecord()))
        elif given.keys() & {"output", "status", "receipt"}:
            added = given.keys() & {"line", "key"}  # by generate --output
            given = {name: value for name, value in given.items() if name not in added}
            self._result(place, json_format.ParseDict(given, types_pb2.Result()))
            self.uncovered |= added
        else:
            kinds = "Result, GenerateResponse, GenerateEvent, ItemRecord, Receipt, Entry, SignedHead or DSSE envelope"
            self._fault(place, CONSISTENT, [f"is not a {kinds}"])

    # ---- proofs

    def _result(self, place: str, result: types_pb2.Result) -> None:
        place = f"{place}: sequence {result.sequence}"
        if result.HasField("receipt"):
            self._receipt(place, result.receipt, chain.check_result(result), output=True)
            self._name_uncovered(result, output=result.output)
        elif result.HasField("output"):
            self._fault(place, CONSISTENT, ["receipt: missing"])
        else:
            self.beside["a result without output has no receipt"] += 1

    def _record(self, place: str, record: sequencer_pb2.ItemRecord) -> None:
        place = f"{place}: sequence {record.admitted.sequence}"
        if record.result.HasField("receipt"):
            self._receipt(place, record.result.receipt, chain.check_record(record), output=True)
            self._name_uncovered(record.result, output=record.result.output, admitted=record.admitted, input=record.input)
        else:
            missing = ["receipt: missing"] if record.result.HasField("output") else []
            self._fault(place, CONSISTENT, [*chain.check_record(record), *missing])
            self.beside["a record without output has no receipt"] += 1

    def _stamp(self, place: str, response: generation_pb2.GenerateResponse) -> None:
        stamp = response.stamp
        said = (stamp.log_id, stamp.first_sequence, stamp.count)
        headers = [each.receipt.header for each in response.results if each.HasField("receipt")]
        if response.HasField("stamp") and any(said != (each.log_id, each.first_sequence, each.count) for each in headers):
            self._fault(place, CONSISTENT, ["stamp: is not that of the receipts"])
        self._name_uncovered(stamp=stamp)

    def _answer(self, place: str, answer: sequencer_pb2.HeadResponse) -> None:
        """A HeadResponse beside its signed head, which may be older or, by a moment, newer."""
        head = answer.signed
        if answer.log_id != head.log_id:
            self._fault(place, CONSISTENT, ["log_id: is not that of the signed head"])
        if answer.index != head.last_index:
            self.beside["the signed head is not of the entry that index says"] += 1
        elif answer.entry_hash != head.entry_hash:
            self._fault(place, CONSISTENT, ["entry_hash: is not that of the signed head"])
        self._name_uncovered(answer)

    def _name_uncovered(self, *messages: Message, **parts: Message) -> None:
        """The fields of these that are set, and that nothing covers."""
        for prefix, message in [*(("", each) for each in messages), *((f"{name}.", part) for name, part in parts.items())]:
            names = {field.name for field, _ in message.ListFields()} - COVERED[type(message)]
            self.uncovered |= {prefix + name for name in names}

    def _receipt(self, place: str, receipt: types_pb2.Receipt, faults: list[str], *, output: bool = False) -> None:
        header = receipt.header
        proof = self._proof("receipt", place, header, receipt.entry_hash)
        proof.text = header.form > 0 if output else None
        self.uncovered |= {"nonce"} if receipt.nonce and not output else set()
        self._settle(proof, CONSISTENT, faults)
        self._claim(header.log_id, header.index - 1, receipt.previous_hash, place)
        if receipt.HasField("head"):
            fault = inclusion_fault(receipt)
            self._settle(proof, CHAINED, [fault] if fault else [])
            proof.tree = None if fault else _tree(receipt.head)
            self._judge_proof(proof, receipt.head)
            proof.holds -= {SIGNED} if fault else set()
        else:
            proof.unsigned = "it has no signature"

    def _take_head(self, place: str, head: types_pb2.SignedHead) -> None:
        proof = Proof("head", f"{place}: head of entry {head.last_index}", head.log_id, head.last_index, head.entry_hash)
        self._add(proof)
        fault = head_fault(head)
        self._settle(proof, CONSISTENT, [fault] if fault else [])
        self._settle(proof, CHAINED, [])
        self._judge_proof(proof, head)

    def _entry(self, place: str, entry: sequencer_pb2.Entry, decoded: object) -> None:
        previous, self._previous = self._previous, entry
        place = f"{place}: index {entry.header.index}"
        faults = _payload_faults(entry, decoded)
        if previous is None and entry.header.index != 1:
            self.on_trust += 1
            self.beside["the entry before it is unknown, so its content is on trust"] += 1
            self._fault(place, CONSISTENT, faults)
            self._claim(entry.header.log_id, entry.header.index, entry.entry_hash, place)
            self._runs.append([])
            return
        proof = self._proof("entry", place, entry.header, entry.entry_hash)
        proof.unsigned = "no signed head follows it"
        links = [fault for fault in chain.check_link(previous, entry) if not fault.startswith("payload:")]
        self._settle(proof, CONSISTENT, faults)
        self._settle(proof, CHAINED, links)
        if links or previous is None:
            self._runs.append([])
        self._runs[-1].append(proof)

    def _proof(self, kind: str, place: str, header: types_pb2.EntryHeader, entry_hash: bytes) -> Proof:
        proof = Proof(kind, place, header.log_id, header.index, entry_hash)
        self._add(proof)
        return proof

    def _add(self, proof: Proof) -> None:
        self.proofs.append(proof)
        if self._log_id is not None and proof.log_id != self._log_id:
            self._fault(proof.place, CHAINED, [f"is of log {proof.log_id}"])
        self._claim(proof.log_id, proof.index, proof.entry_hash, proof.place)

    def _claim(self, log_id: str, index: int, entry_hash: bytes, place: str, *, witness: bool = False) -> None:
        """An entry has one hash. Another one is a fork of the log, or invented."""
        known, other, by_witness = self._claims.setdefault((log_id, index), (entry_hash, place, witness))
        if known != entry_hash and index > 0:
            self._fault(place, WITNESSED if by_witness else CHAINED, [f"{other} has another entry {index} of this log"])

    def _claim_head(self, head: types_pb2.SignedHead, place: str, *, witness: bool = False) -> None:
        self._claim(head.log_id, head.last_index, head.entry_hash, place, witness=witness)
        self._trees.setdefault(_tree(head), (place, witness))

    def _judge_trees(self) -> None:
        """Each entry is in one tree. Another one is a fork inside a transaction, where the entries need not be here."""
        widest: Tree | None = None
        for tree in sorted(self._trees):
            place, by_witness = self._trees[tree]
            if widest is not None and tree[0] == widest[0] and tree[1] <= widest[2]:
                other, other_by_witness = self._trees[widest]
                what = WITNESSED if by_witness or other_by_witness else CHAINED
                self._fault(place, what, [f"{other} has another tree with entry {tree[1]} of this log"])
            if widest is None or tree[0] != widest[0] or tree[2] > widest[2]:
                widest = tree

    def _judge_proof(self, proof: Proof, head: types_pb2.SignedHead) -> None:
        self._claim_head(head, proof.place)
        why = self._judge(head)
        if why is None:
            proof.holds.add(SIGNED)
            self._heads[SIGNED][head.log_id, head.last_index] = head.entry_hash
        elif why:
            proof.unsigned = why
        else:
            self._fault(proof.place, SIGNED, [f"signature: is not by key {head.key_id}"])

    def _judge(self, head: types_pb2.SignedHead) -> str | None:
        """None: a given key has signed it. Otherwise why that is not known, or empty: the signature is not valid."""
        if head.key_id not in self._keys:
            return f"it is signed with key {head.key_id}, which was not given" if len(self._keys) else "no key was given"
        name = head.SerializeToString(deterministic=True)
        if name not in self._judged:
            self._judged[name] = None if self._keys.verify(head) else ""
            self.signers |= {head.key_id} if self._judged[name] is None else set()
        return self._judged[name]

    def _settle(self, proof: Proof, what: str, faults: list[str]) -> None:
        if not faults:
            proof.holds.add(what)
        self._fault(proof.place, what, faults)

    def _fault(self, place: str, what: str, faults: Iterable[str]) -> None:
        for fault in faults:
            self.faults.append(f"{place}: {fault}")
            self._broken.add(what)

    # ---- the sum

    def finish(self) -> None:
        """Once everything is read: what the heads cover, and whether the witness holds more."""
        self._judge_trees()
        entries = dict[tuple[str, int, bytes], set[str]]()
        for run in self._runs:
            for what, heads in self._heads.items():
                covered = [place for place, each in enumerate(run) if heads.get((each.log_id, each.index)) == each.entry_hash]
                for proof in run[: covered[-1] + 1 if covered else 0]:
                    proof.holds.add(what)
            entries |= {(proof.log_id, proof.index, proof.entry_hash): proof.holds for proof in run}
        for proof in self.proofs:
            proof.holds |= entries.get((proof.log_id, proof.index, proof.entry_hash), set()) - {CONSISTENT}
            by_tree = proof.tree is not None and self._trees[proof.tree][1]
            if by_tree or self._heads[WITNESSED].get((proof.log_id, proof.index)) == proof.entry_hash:
                proof.holds.add(WITNESSED)
        for end in {run[-1].log_id: run[-1] for run in self._runs if run}.values():
            newest = max((index for log_id, index in self._heads[WITNESSED] if log_id == end.log_id), default=0)
            if newest > end.index:
                self._fault(end.place, WITNESSED, [f"is the last entry here, and the witness has a head of entry {newest}"])

    @property
    def required(self) -> tuple[str, ...]:
        """What makes a proof."""
        return (CONSISTENT, CHAINED, SIGNED, WITNESSED) if self._has_witness else (CONSISTENT, CHAINED, SIGNED)

    @property
    def unproved(self) -> list[str]:
        """Why not everything is proved."""
        why = set[str]()
        for proof in self.proofs:
            if SIGNED not in proof.holds:
                why.add(proof.unsigned)
            elif not proof.holds.issuperset(self.required):
                why.add("the witness has no head that covers it" if CHAINED in proof.holds else "it is not chained")
            if proof.text is False:
                why.add("the text is not covered by a digest (form 0)")
        why |= {f"{each} ({count} times)" if count > 1 else each for each, count in self.beside.items()}
        return sorted(why - {""})

    @property
    def code(self) -> int:
        """The exit code."""
        if self._broken or not self.proofs:
            return min((CODES[each] for each in self._broken), default=FAILED)
        return UNJUDGED if self.unproved else 0

    @property
    def verdict(self) -> str:
        if self._broken:
            return "not sound: " + ", ".join(f"not {each}" for each in CODES if each in self._broken)
        if self.unproved:
            return f"consistent, not proved: {'; '.join(self.unproved)}"
        logs = ", ".join(sorted({proof.log_id for proof in self.proofs}))
        return f"proved: log {logs}, key {', '.join(sorted(self.signers))}"

    def count(self, kind: str, what: str) -> int:
        return sum(proof.kind == kind and what in proof.holds for proof in self.proofs)

    def as_dict(self) -> dict[str, Any]:
        counts = {
            plural: {"total": total} | {each: self.count(kind, each) for each in (*self.required, WITNESSED)}
            for kind, plural in KINDS.items()
            if (total := sum(proof.kind == kind for proof in self.proofs))
        }
        proofs = [
            {"place": each.place, "log_id": each.log_id, "index": str(each.index)}
            | {what: what in each.holds for what in self.required}
            | ({} if each.text is None else {"text": each.text})
            for each in self.proofs
        ]
        told = {"verdict": self.verdict, "entries_on_trust": self.on_trust, "faults": self.faults, "proofs": proofs}
        return counts | told | {"not_covered": sorted(self.uncovered)}

    def lines(self) -> Iterator[str]:
        """What is printed."""
        yield from self.faults
        for (kind, state), group in groupby(self.proofs, lambda proof: (proof.kind, proof.state(self.required))):
            same = list(group)
            if kind == "entry" and len(same) > 1:
                yield f"{same[0].place} to {same[-1].index}: {state}"
            else:
                yield from (f"{proof.place}: {state}" for proof in same)
        for kind, plural in KINDS.items():
            if total := sum(proof.kind == kind for proof in self.proofs):
                counts = [f"{self.count(kind, each)} {each}" for each in self.required]
                trust = ["1 before them on trust"] if kind == "entry" and self.on_trust else []
                yield f"{total} {kind if total == 1 else plural}: {', '.join(counts + trust)}"
        if self.uncovered and not self._broken:
            yield f"not covered: {', '.join(sorted(self.uncovered))}"
        yield self.verdict


def json_values(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Places and JSON values of a file of one value, or of one per line. A line that is no JSON is its exception; so is one
    with a name twice in an object, of which readers take different ones."""
    try:
        yield name, json.loads(content, object_pairs_hook=_named_once)
    except (ValueError, RecursionError):
        for place, line in _lines(name, content):
            try:
                value = json.loads(line, object_pairs_hook=_named_once)
            except (ValueError, RecursionError) as error:
                value = error
            yield place, value


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is in one object twice")
    return named


def _head(given: dict[str, Any]) -> types_pb2.SignedHead | None:
    """The head in an envelope, a SignedHead or a HeadResponse; None: it is something else. Raises ParseError."""
    if "payloadType" in given:
        try:
            return opened(given)
        except ValueError as error:
            raise json_format.ParseError(str(error)) from None
    if "root" in given:
        return json_format.ParseDict(given, types_pb2.SignedHead())
    if "index" in given and "entry_hash" in given:
        answer = json_format.ParseDict(given, sequencer_pb2.HeadResponse())
        if not answer.HasField("signed"):
            raise json_format.ParseError("a head without a signature")
        return answer.signed
    return None


def _witnessed_head(given: dict[str, Any]) -> types_pb2.SignedHead | None:
    """As `_head`, also of a WITNESSED entry; None: there is none."""
    try:
        if "header" not in given:
            return _head(given)
        entry = json_format.ParseDict(given, sequencer_pb2.Entry(), ignore_unknown_fields=True)
        witnessed = entry.header.kind == types_pb2.ENTRY_KIND_WITNESSED and entry.payload
        return sequencer_pb2.WitnessedPayload.FromString(entry.payload).head if witnessed else None
    except (json_format.ParseError, DecodeError, RecursionError):
        return None


def _is_event(given: dict[str, Any]) -> bool:
    """Admitted events and ItemRecords both have the field `admitted`; only an event's has a stamp."""
    return isinstance(given.get("admitted"), dict) and "stamp" in given["admitted"]


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
