"""Receipts, entries and heads of a real journal, and forgeries of each, as `ostinato verify` judges them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from typer.testing import CliRunner

from ostinato.cli import show
from ostinato.cli.app import app
from ostinato.signature import Signer, envelope, new_key, pae, signer_of, statement
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from sidecar.answers import result_of
from sidecar.journal import ledger
from tests.sidecar.journal_kit import SqliteKit, admission, completed, item

PROVED, INCONSISTENT, UNPROVED, UNCHAINED, UNSIGNED, CONTRADICTED = 0, 1, 3, 4, 5, 6
SIGNER, OTHER = signer_of(new_key()), signer_of(new_key())


@dataclass
class Log:
    """What a log shows: results with receipts, entries, and its signed heads."""

    results: list[types_pb2.Result] = field(default_factory=list)
    entries: list[sequencer_pb2.Entry] = field(default_factory=list)
    heads: list[types_pb2.SignedHead] = field(default_factory=list)


def log_of(folder: Path, signer: Signer | None = SIGNER, *, log_id: str = "a" * 32, items: int = 3, text: str = "") -> Log:
    """A log of two batches, each admitted and ended in one transaction, which `text` makes another one."""
    folder.mkdir()
    kit, log = SqliteKit(folder / "journal.db"), Log()
    kit.configure(signer=signer)
    journal = kit.open(log_id=log_id)
    for _ in range(2):
        newest = journal.newest_signed()
        log.heads += [newest] if newest is not None else []
        batch = [item(n, seed=n) for n in range(1, items + 1)]
        for each in batch:
            each.nonce = each.nonce if vars(ledger)["FORM"] else b""
        (admitted,) = journal.append_many([admission(*batch)], kit.clock.millis)
        ends = journal.append_many([completed(each, text=text or "answer") for each in admitted.entries], kit.clock.millis)
        log.results += [result_of(each.entries[0]) for each in ends]
    newest = journal.newest_signed()
    log.heads += [newest] if newest is not None else []
    for sealed in journal.entries(1, 100, payloads=True):
        log.entries.append(sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload))
    journal.close()
    return log


@pytest.fixture(name="log")
def _log(tmp_path: Path) -> Log:
    return log_of(tmp_path / "log")


class Verifier:
    """Runs `ostinato verify`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = ""
        self.keys: list[Signer] = [SIGNER]

    def __call__(self, *shown: Any, witness: Sequence[Any] | None = None, options: Sequence[str] = ()) -> int:
        """The exit code. `shown` and `witness`: messages, or their JSON."""
        arguments = list(options)
        for key in self.keys:
            (self.folder / key.key_id).write_text(key.public_pem)
            arguments += ["--key", str(self.folder / key.key_id)]
        if witness is not None:
            (self.folder / "witness").write_text(lines(witness))
            arguments += ["--witness", str(self.folder / "witness")]
        ran = CliRunner().invoke(app, ["verify", "-", *arguments], input=lines(shown))
        self.said = ran.output
        return ran.exit_code


def lines(shown: Sequence[Any]) -> str:
    return "\n".join(json.dumps(each if isinstance(each, dict) else show.as_dict(each)) for each in shown) + "\n"


@pytest.fixture(name="verify")
def _verify(tmp_path: Path) -> Verifier:
    return Verifier(tmp_path)


def test_what_is_signed_is_proved(log: Log, verify: Verifier) -> None:
    """Receipts, heads, and entries up to a signed head are proved under the log's key, and under no other."""
    for shown in (log.results, log.heads, [envelope(each) for each in log.heads], [*log.entries, log.heads[-1]]):
        assert verify(*shown) == PROVED, verify.said
        verify.keys = [OTHER]
        assert verify(*shown) == UNPROVED
        assert f"key {SIGNER.key_id}, which was not given" in verify.said
        verify.keys = []
        assert verify(*shown) == UNPROVED
        assert "consistent, not proved: no key was given" in verify.said
        verify.keys = [OTHER, SIGNER]
        assert verify(*shown) == PROVED
        verify.keys = [SIGNER]


def test_entries_behind_the_newest_head_are_not_proved(log: Log, verify: Verifier) -> None:
    """A head proves the entries up to its own, in their order, and says nothing about those that follow."""
    assert verify(*reversed(log.entries), *log.heads) == UNCHAINED
    assert verify(*log.entries, log.heads[0]) == UNPROVED
    assert "no signed head follows it" in verify.said
    total, covered = len(log.entries), log.heads[0].last_index
    assert f"{total} entries: {total} consistent, {total} chained, {covered} signed" in verify.said


def test_an_entry_left_out_or_doubled_is_seen(log: Log, verify: Verifier) -> None:
    """Entries of which one in between is missing, or one stands twice, are no chain, whether or not heads come with them."""
    for at in range(1, len(log.entries) - 1):
        for heads in ([], log.heads):
            assert verify(*log.entries[:at], *log.entries[at + 1 :], *heads) == UNCHAINED, at
            assert verify(*log.entries[: at + 1], *log.entries[at:], *heads) == UNCHAINED, at


def test_a_replaced_text_is_seen(log: Log, verify: Verifier) -> None:
    """A receipt does not hold for another text."""
    log.results[1].output.text = "another"

    assert verify(*log.results) == INCONSISTENT
    assert "text_digest: does not belong to this output" in verify.said


def test_a_text_of_form_0_is_never_proved(tmp_path: Path, verify: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an entry of form 0 no digest covers the text: a signed receipt without its output is proved, and with it, whatever the
    text is, it is said that the text is not."""
    monkeypatch.setattr("sidecar.journal.ledger.FORM", 0)
    log = log_of(tmp_path / "old", items=1)
    assert {entry.header.form for entry in log.entries} == {0}

    assert verify(log.results[0].receipt) == PROVED
    for text in (log.results[0].output.text, "another"):
        log.results[0].output.text = text
        assert verify(log.results[0]) == UNPROVED
        assert "consistent, chained, signed, the text is not covered" in verify.said
        assert "not proved: the text is not covered by a digest (form 0)" in verify.said


def test_an_invented_receipt_is_not_proved(log: Log, verify: Verifier, tmp_path: Path) -> None:
    """A log that an attacker makes with these very programs, under the id of another log, is not proved: without a signature,
    with its own, with its own under the right key's id, and with heads of the true log."""
    unsigned = log_of(tmp_path / "unsigned", None, text="invented").results
    own = log_of(tmp_path / "own", OTHER, text="invented").results
    assert verify(*unsigned) == UNPROVED
    assert "6 receipts: 6 consistent, 0 chained, 0 signed" in verify.said
    assert "not proved: it has no signature" in verify.said
    assert verify(*own) == UNPROVED
    assert "6 receipts: 6 consistent, 6 chained, 0 signed" in verify.said

    for result in own:
        result.receipt.head.key_id = SIGNER.key_id
    assert verify(*own) == UNSIGNED
    assert f"signature: is not by key {SIGNER.key_id}" in verify.said
    for result, true in zip(unsigned, log.results, strict=True):
        result.receipt.head.CopyFrom(true.receipt.head)
        result.receipt.path.extend(true.receipt.path)
    assert verify(*unsigned) == UNCHAINED
    assert "6 receipts: 6 consistent, 0 chained, 0 signed" in verify.said


def test_a_receipt_of_another_log_is_seen(log: Log, verify: Verifier, tmp_path: Path) -> None:
    """Where one key signs two logs, a receipt of the other is shown with its log, refused by --log, and cannot become this
    log's."""
    other = log_of(tmp_path / "other", log_id="b" * 32).results
    assert verify(*other, options=["--log", "a" * 32]) == UNCHAINED
    assert f"is of log {'b' * 32}" in verify.said
    assert verify(*other) == PROVED
    assert f"proved: log {'b' * 32}" in verify.said

    moved = copy.deepcopy(other)
    for each in moved:
        each.receipt.head.log_id = "a" * 32
    assert verify(*moved) == UNCHAINED
    for each in moved:
        each.receipt.header.log_id = "a" * 32
    assert verify(*moved) == INCONSISTENT
    for theirs, ours in zip(moved, log.results, strict=True):
        theirs.receipt.header.log_id = "b" * 32
        theirs.receipt.head.CopyFrom(ours.receipt.head)
    assert verify(*moved) == UNCHAINED


def test_two_histories_of_one_log_are_seen(log: Log, verify: Verifier, tmp_path: Path) -> None:
    """A log that signs two entries of one index is caught as soon as receipts, entries or heads of both are seen together, and
    by a witness of one."""
    fork = log_of(tmp_path / "fork", text="another")
    for ours, theirs in ((log.results, fork.results), (log.heads, fork.heads), (log.results, fork.entries)):
        assert verify(*ours, *theirs) == UNCHAINED
        assert "has another entry" in verify.said
    assert verify(*fork.entries, *fork.heads, witness=log.heads) == CONTRADICTED
    assert verify(*fork.heads, witness=[envelope(each) for each in log.heads]) == CONTRADICTED
    assert verify(*log.entries, *log.heads, witness=log.heads) == PROVED


def test_a_cut_journal_is_seen_by_its_witness(log: Log, verify: Verifier) -> None:
    """Entries that end before what the witness holds are refused; so are they if another history follows. What the witness does
    not cover yet is not proved."""
    cut = log.entries[: log.heads[0].last_index]
    assert verify(*cut, log.heads[0], witness=log.heads) == CONTRADICTED
    assert f"is the last entry here, and the witness has a head of entry {log.heads[-1].last_index}" in verify.said
    assert verify(*log.entries, *log.heads, witness=log.heads[:1]) == UNPROVED
    assert "the witness has no head that covers it" in verify.said
    assert verify(*log.entries, *log.heads, *log.results, witness=log.heads) == PROVED
    counts = "6 receipts: 6 consistent, 6 chained, 6 signed, 6 witnessed"
    assert counts in verify.said, "the entries between a receipt and the witness's head lead to it"


def test_a_witness_covers_the_whole_transaction(log: Log, verify: Verifier) -> None:
    """A receipt whose own head the witness has is witnessed, wherever in the transaction its entry is."""
    for result in log.results:
        assert verify(result, witness=log.heads) == PROVED, verify.said
    assert verify(log.results[0], witness=log.heads[-1:]) == UNPROVED


def test_a_fork_inside_a_transaction_is_seen(log: Log, verify: Verifier) -> None:
    """Two signed trees of the same entries, or of ranges that overlap, are two histories, though they end with one entry."""
    true = log.results[0].receipt.head
    for first, root in ((true.first_index, b"r" * 32), (true.first_index + 1, b"r" * 32), (true.first_index - 1, b"r" * 32)):
        fork = types_pb2.SignedHead()
        fork.CopyFrom(true)
        fork.first_index, fork.root = first, root
        fork.signature = SIGNER.sign(pae(statement(fork)))
        assert verify(fork) == PROVED
        assert verify(*log.results, fork) == UNCHAINED
        assert verify(*log.results, witness=[fork]) == CONTRADICTED
        assert verify(fork, witness=[true]) == CONTRADICTED


def test_a_first_entry_whose_previous_one_is_unknown_is_on_trust(log: Log, verify: Verifier) -> None:
    """The entries after it confirm its hash, and nothing its content: such a part of a journal is not proved."""
    assert verify(*log.entries, *log.heads) == PROVED
    part = copy.deepcopy(log.entries[2:])
    part[0].header.time_unix_millis += 1
    for shown in (log.entries[2:], part):
        assert verify(*shown, *log.heads) == UNPROVED
        assert "its content is on trust" in verify.said


def test_a_witness_without_a_valid_head_counts_for_nothing(log: Log, verify: Verifier, tmp_path: Path) -> None:
    """Lines of a witness that are no heads, or not signed with a given key, neither prove nor contradict."""
    fork = log_of(tmp_path / "fork", OTHER, text="another")

    assert verify(*log.heads, witness=[{"a": 1}, *fork.heads]) == UNPROVED
    assert "passed over" in verify.said


def test_what_a_receipt_does_not_cover_is_named(log: Log, verify: Verifier) -> None:
    """Fields that no digest covers are listed, also where all that there is of proofs holds."""
    result = log.results[0]
    result.output.prompt_tokens = 7
    record = sequencer_pb2.ItemRecord(admitted=log.entries[1].header, result=result, outcome=result.receipt.header)
    record.input.ParseFromString(log.entries[1].payload)
    record.input.tenant = "another"
    assert verify(record) == PROVED, verify.said
    assert "\nnot covered: admitted." in verify.said
    assert {"input.tenant", "output.prompt_tokens", "admitted.time_unix_millis"} <= set(re.split(r", |: |\n", verify.said))


def test_a_contradiction_of_a_receipt_is_seen(log: Log, verify: Verifier) -> None:
    """Where other fields repeat what a receipt or a signed head says they have to be equal, and no name may be twice in an
    object, of which readers see different ones."""
    header, head = log.results[0].receipt.header, log.heads[-1]
    stamp = types_pb2.Stamp(log_id=header.log_id, first_sequence=header.first_sequence, count=header.count)
    response = generation_pb2.GenerateResponse(stamp=stamp, results=log.results[:3])
    answer = sequencer_pb2.HeadResponse(log_id=head.log_id, index=head.last_index, entry_hash=head.entry_hash, signed=head)
    assert verify(response) == verify(answer) == PROVED
    twice = json.dumps(show.as_dict(log.results[0])).replace('"text":', '"text": "invented", "text":')
    (verify.folder / "twice").write_text(twice)
    ran = CliRunner().invoke(app, ["verify", str(verify.folder / "twice")])
    assert (ran.exit_code, "text: given twice" in ran.output) == (INCONSISTENT, True)
    forgeries: list[tuple[Message, str, Any]] = [
        (stamp, "log_id", "f" * 32),
        (stamp, "first_sequence", 77),
        (stamp, "count", 77),
        (answer, "log_id", "f" * 32),
        (answer, "entry_hash", bytes(32)),
    ]
    for message, name, value in forgeries:
        true = getattr(message, name)
        setattr(message, name, value)
        response.stamp.CopyFrom(stamp)
        assert verify(answer if message is answer else response) == INCONSISTENT, name
        setattr(message, name, true)


def test_a_claim_without_a_receipt_is_not_proved(log: Log, verify: Verifier) -> None:
    """A result, record or event without a receipt is not proved by the receipts beside it, and the command says so."""
    failed = types_pb2.Result(sequence=99)
    failed.status.code = 13
    ended = sequencer_pb2.ItemRecord(admitted=log.entries[1].header, result=failed)
    tokens = generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens(runs=[generation_pb2.TokenRun(sequence=1, text="x")]))
    head = log.heads[-1]
    answer = sequencer_pb2.HeadResponse(log_id=head.log_id, index=9999, entry_hash=bytes(32), signed=head)
    for claim in (failed, ended, tokens, generation_pb2.GenerateResponse(results=[failed]), answer):
        assert verify(log.results[0], claim) == UNPROVED, claim
        assert "not proved: " in verify.said


def change(name: str, value: Any) -> Callable[[types_pb2.Receipt], None]:
    return lambda receipt: setattr(receipt.head, name, value)


def flip(receipt: types_pb2.Receipt) -> None:
    change("signature", bytes([receipt.head.signature[0] ^ 1]) + receipt.head.signature[1:])(receipt)


def swap(receipt: types_pb2.Receipt) -> None:
    receipt.path[:] = [receipt.path[1], receipt.path[0], *receipt.path[2:]]


FORGERIES: dict[str, tuple[Callable[[types_pb2.Receipt], object], int]] = {
    "the id of another key that was given": (change("key_id", OTHER.key_id), UNSIGNED),
    "the id of a key that was not given": (change("key_id", "00" * 8), UNPROVED),
    "a signature with a bit flipped": (flip, UNSIGNED),
    "no signature": (change("signature", b""), UNSIGNED),
    "a later head": (change("last_index", 100), UNCHAINED),
    "an earlier begin": (change("first_index", 1), UNCHAINED),
    "another root": (change("root", bytes(32)), UNCHAINED),
    "another newest entry": (change("entry_hash", bytes(32)), UNSIGNED),
    "a swapped path": (swap, UNCHAINED),
    "a path cut short": (lambda r: r.path.pop(), UNCHAINED),
    "a longer path": (lambda r: r.path.append(bytes(32)), UNCHAINED),
    "another place in the tree": (lambda r: setattr(r.header, "index", r.header.index + 1), INCONSISTENT),
    "no head": (lambda r: r.ClearField("head"), UNPROVED),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_proofs_are_seen(log: Log, verify: Verifier, forgery: str) -> None:
    """A receipt with a changed head, path or signature is not proved, and the exit code says what does not hold."""
    verify.keys = [SIGNER, OTHER]
    receipt, (forge, code) = log.results[0].receipt, FORGERIES[forgery]
    assert len(receipt.path) == 2
    assert verify(receipt) == PROVED
    forge(receipt)

    assert verify(receipt) == code, verify.said


def test_keys_that_are_no_keys_are_refused(verify: Verifier, tmp_path: Path, log: Log) -> None:
    """A file of --key that is missing, private, or no key is wrong usage, and named."""
    (tmp_path / "private").write_bytes(new_key())
    (tmp_path / "text").write_text("text")
    for name, why in (("private", "private key"), ("text", "no public key"), ("missing", "No such file")):
        assert verify(*log.heads, options=["--key", str(tmp_path / name)]) == 2
        assert why in " ".join(verify.said.replace("│", " ").split())
