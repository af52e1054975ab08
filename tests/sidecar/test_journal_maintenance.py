"""What is done to a journal that no sidecar uses, and what it keeps: against every backend."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from ostinato.compare import Side, compare
from ostinato.digest import input_digest, output_digest, text_digest
from ostinato.signature import new_key, signer_of
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar import commands
from sidecar.journal.ledger import keyed, twins_tag
from sidecar.journal.maintenance import prune, redact
from sidecar.journal.model import JournalUnusable, Loss, Note, Sealed
from sidecar.journal.postgres import PostgresStore
from sidecar.journal.store import Store
from sidecar.journal.transfer import export, take_in
from tests.postgres import Postgres
from tests.sidecar.journal_kit import (
    SECRET,
    Kit,
    PostgresKit,
    SqliteKit,
    admission,
    audit,
    completed,
    ended,
    item,
    prompt,
    sequences,
    twin,
)

DAY = 86_400
SIGNER = signer_of(new_key())
AUDITED, MATCH = types_pb2.ENTRY_KIND_AUDITED, types_pb2.VERDICT_MATCH


def fill(kit: Kit) -> None:
    """Two epochs, batches with and without keys, every kind of entry, notes, one item unfinished."""
    with kit.opened() as journal:
        now = kit.clock.millis
        answers = journal.append_many(
            [admission(item(1), item(2, seed=2**64 - 1), key="k", tenant="t"), admission(item(3)), Note("a/ü", b"\0\xff")], now
        )
        first, second, third = (*answers[0].entries, *answers[1].entries)
        journal.append_many([completed(first, 2**31), ended(second), audit(first), completed(third)], now + 1)
        journal.append_many([Loss(9), admission(item(4), key="open")], now + 2)
    kit.clock.sleep(1)
    kit.open().close()


def kept_payloads(entries: Sequence[Sealed]) -> list[int]:
    """Sequences of the items of which something is kept, once for each entry."""
    return sorted(entry.header.sequence for entry in entries if entry.payload and entry.header.sequence)


# The end, lost.


def test_a_mark_that_holds(kit: Kit) -> None:
    """A journal that has the marked entry opens, however far it has gone on."""
    with kit.opened() as journal:
        mark = journal.head.mark
        journal.append_many([admission()], 1)
    for _ in range(2):
        journal = kit.open(mark=mark)
        journal.close()


def test_a_lost_end_is_found(kit: Kit) -> None:
    """A journal without the marked entry, with another in its place, or of another log is refused, and stays as it was."""
    with kit.opened() as journal:
        journal.append_many([admission()], 1)
        head = journal.head
    for index, hash_, log_id, what in (
        (head.index + 1, b"x" * 32, head.log_id, "ends at entry 2, sequence 1, and entry 3, sequence 7"),
        (head.index, b"x" * 32, head.log_id, "has another entry 2"),
        (1, head.entry_hash, head.log_id, "has another entry 1"),
        (head.index, head.entry_hash, "f" * 32, "of log f"),
    ):
        with pytest.raises(JournalUnusable, match=what):
            kit.open(mark=type(head.mark)(log_id, index, hash_, 7))
    journal = kit.open()
    journal.close()
    assert (journal.head.epoch, journal.head.index) == (2, 3)


@pytest.mark.parametrize("through", [1, 2, 1_000, 2**32, 2**32 + 1, 2**36])
def test_accepted_loss(kit: Kit, through: int) -> None:
    """Numbers that were lost are not given out again, nor forgotten; the journal says which they were, and verifies."""
    with kit.opened() as journal:
        journal.append_many([admission()], 1)
        mark = journal.head.mark
        (answer,) = journal.append_many([Loss(through, mark)], 1)
        headers = [entry.header for entry in answer.entries]
        assert {(header.kind, header.sequence) for header in headers} == {(types_pb2.ENTRY_KIND_LOST, 0)}
        assert headers[0].first_sequence == 2
        assert sum(header.count for header in headers) == through - 1
        assert len(headers) == max(1, -(-(through - 1) // (2**32 - 1))), "a count has 32 bits"
        assert sequencer_pb2.LostPayload.FromString(answer.entries[0].payload).entry_hash == mark.entry_hash
    journal = kit.open()
    assert journal.head.last_sequence == through
    (answer,) = journal.append_many([admission(item(), item())], 1)
    assert sequences(answer.entries) == [through + 1, through + 2]
    assert [found.admitted.header.sequence for found in journal.items(1, 2**63, 10)] == [1, through + 1, through + 2]
    journal.close()
    assert kit.faults() == []


# Payloads, dropped.


def test_prune(kit: Kit) -> None:
    """Prompts and answers of old items go; hashes, verdicts, keys and what has not ended stay, and the chain verifies."""
    fill(kit)
    with kit.maintained() as kept:
        assert sum(count for _, count in prune(kept, lambda header: header.sequence < 3, 9)) == 4
        entries = list(kept.entries(1, 100, payloads=True))
        assert kept_payloads(entries) == [1, 3, 3, 10]
        assert sum(count for _, count in prune(kept, lambda header: True, 9)) == 2
        assert kept_payloads(list(kept.entries(1, 100, payloads=True))) == [1, 10]
    assert kit.faults() == []
    with kit.opened() as journal:
        assert journal.binding("t", "k", kit.clock.millis) is not None
        assert journal.items(1, 1, 1)[0].outcome is not None


def test_redact(kit: Kit) -> None:
    """One item's payloads go; one that is unknown or has not ended is refused, and then nothing goes."""
    fill(kit)
    with kit.maintained() as kept:
        for numbers, why in (
            ([1, 4], "no sequence 4"),
            ([1, 10], "10 has not ended"),
            ([1, 2**64 - 1], "no sequence 18"),
        ):
            with pytest.raises(JournalUnusable, match=why):
                redact(kept, numbers, 9)
        assert redact(kept, [3], 9) == 2
        assert redact(kept, [3, 3], 9) == 0
        assert kept_payloads(list(kept.entries(1, 100, payloads=True))) == [1, 1, 1, 2, 2, 10]
    assert kit.faults() == []


def test_what_is_dropped_is_gone(tmp_path: Path) -> None:
    """No file has the bytes of a payload that was dropped."""
    kit = SqliteKit(tmp_path / "journal.db")
    secret = "a secret that must not be readable again"
    with kit.opened() as journal:
        (answer,) = journal.append_many([admission(item(5, request_id=secret))], 1)
        journal.append_many([completed(answer.entries[0], text=secret)], 1)
    files = list(tmp_path.iterdir())
    assert any(secret.encode() in path.read_bytes() for path in files)
    with kit.maintained() as kept:
        redact(kept, [1], 9)
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_what_is_redacted_cannot_be_guessed(kit: Kit) -> None:
    """Who has the database, the log's secret included, and guesses prompt and answer of a redacted item, finds neither; its
    verdicts stay."""
    digests = list[bytes]()
    with kit.opened() as journal:
        request = b"q" * 32
        (answer,) = journal.append_many([admission(item(5, seed=9), item(6), key="k", tenant="t", digest=request)], 1)
        entry, beside = answer.entries
        journal.append_many([completed(beside)], 1)
        outcome = completed(entry, 7)
        journal.append_many([outcome], 1)
        output, given = outcome.payload.output, prompt(entry)  # type: ignore[union-attr]
        digests += [output_digest(output), text_digest(output), input_digest(given.token_ids, given.parameters, given.seed)]
        guesses = {*digests, twins_tag(SECRET, outcome.twins), keyed(SECRET, "output", digests[0])}
        verdict = replace(audit(entry), comparison=compare(side(output), side(output), types_pb2.COMPARISON_KIND_REPLAY, 1))
        journal.append_many([verdict], 1)
        assert twin(journal.append_many([completed(another(journal, tenant="t"), 7)], 1)[0].entries[0]) is not None

    with kit.maintained() as kept:
        redact(kept, [1], 9)
        with kept.snapshot() as tables:
            assert tables.keys(1, 1)[0].request_digest == request, "the other item of the batch has it too"
        redact(kept, [2], 9)
        with kept.snapshot() as tables:
            assert tables.keys(1, 1)[0].request_digest == b""
        left = b"".join(
            field
            for each in kept.entries(1, 100, payloads=True)
            if each.header.sequence == 1
            for field in (each.header.SerializeToString(), each.payload)
        )
        tags = kept._read(lambda tables: list(tables.select("SELECT tag, output_tag FROM twins")))
    assert not [guess for guess in guesses if guess in left]
    assert not guesses & {tag for row in tags for tag in row}
    with kit.opened() as journal:
        verdicts = [each.payload for each in journal.entries(1, 100, payloads=True) if each.header.kind == AUDITED]
        assert [sequencer_pb2.AuditedPayload.FromString(each).comparison.verdict for each in verdicts] == [MATCH]
        assert twin(journal.append_many([completed(another(journal, tenant="t"), 7)], 1)[0].entries[0]) is None


def another(journal: Store, tenant: str) -> Sealed:
    """An item with the input of the first one."""
    (answer,) = journal.append_many([admission(item(5, seed=9), tenant=tenant)], 1)
    return answer.entries[0]


def side(output: types_pb2.Output) -> Side:
    return Side(output, b"", b"f" * 32)


def test_twins_of_one_tenant(kit: Kit) -> None:
    """Equal inputs of two tenants are not compared, and after an import those of one still are."""
    with kit.opened() as journal:
        answers = [journal.append_many([completed(another(journal, tenant), 7)], 1)[0] for tenant in ("a", "b", "a")]
        found = [twin(each.entries[0]) for each in answers]
        assert [said and said.expected_sequence for said in found] == [None, None, 1]
    other = kit.another()
    taken_in(other, lines := exported(kit))
    assert not [line for line in lines if base64.b64encode(SECRET).decode()[:40] in line]
    with other.opened() as journal:
        found = [twin(journal.append_many([completed(another(journal, t), 7)], 1)[0].entries[0]) for t in ("b", "a", "c")]
    assert [said and said.expected_sequence for said in found] == [2, 1, None]


def test_digests_only(kit: Kit) -> None:
    """An item's payloads are kept until its outcome, and what is unfinished can be finished after a restart."""
    kit.configure(digests_only=True)
    with kit.opened() as journal:
        (answer,) = journal.append_many([admission(item(1, seed=9), item(1, seed=9), item(3), item(1, seed=9))], 1)
        first, second, third, fourth = answer.entries
        (made,) = journal.append_many([completed(first, 4)], 1)
        assert made.entries[0].payload, "a call that waits for it is answered"
        assert kept_payloads(journal.entries(1, 100, payloads=True)) == [2, 3, 4]
        (twin,) = journal.append_many([completed(second, 4)], 1)
        verdict = sequencer_pb2.CompletedPayload.FromString(twin.entries[0].payload).twin
        assert (verdict.verdict, verdict.compared_tokens, verdict.expected_sequence) == (types_pb2.VERDICT_MATCH, 1, 1)
        (other,) = journal.append_many([completed(fourth, 5)], 1)
        verdict = sequencer_pb2.CompletedPayload.FromString(other.entries[0].payload).twin
        assert (verdict.verdict, verdict.HasField("first_difference")) == (types_pb2.VERDICT_DIVERGED, False)
    journal = kit.open()
    assert [item.admitted for item in journal.to_recover] == [third]
    journal.append_many([ended(third)], 1)
    assert kept_payloads(journal.entries(1, 100, payloads=True)) == []
    journal.close()
    assert kit.faults() == []


def test_digests_only_with_a_key(kit: Kit) -> None:
    """A keyed batch's payloads are kept until its ttl, and its key stays bound for good."""
    kit.configure(digests_only=True, idempotency_ttl_seconds=DAY)
    with kit.opened() as journal:
        (answer,) = journal.append_many([admission(item(1), item(2), key="k")], kit.clock.millis)
        journal.append_many([completed(entry) for entry in answer.entries], kit.clock.millis)
        kit.clock.sleep(DAY - 1)
        journal.append_many([admission()], kit.clock.millis)
        assert kept_payloads(journal.entries(1, 100, payloads=True)) == [1, 1, 2, 2, 3]
        kit.clock.sleep(1)
        (again,) = journal.append_many([admission(item(1), item(2), key="k")], kit.clock.millis)
        assert kept_payloads(journal.entries(1, 100, payloads=True)) == [3]
        kit.clock.sleep(100 * DAY)
        (later,) = journal.append_many([admission(key="k")], kit.clock.millis)
        bound = journal.binding("", "k", kit.clock.millis)
    assert bound is not None
    assert again.binding == later.binding == bound
    assert (bound.first_sequence, bound.count) == (1, 2)


# From one journal into another.


def exported(kit: Kit) -> list[str]:
    with kit.maintained() as kept:
        return list(export(kept))


def taken_in(kit: Kit, lines: list[str], writer: str | None = None) -> None:
    with kit.maintained("make") as kept:
        take_in(kept, lines, "lines", writer, lambda index, total: None)


def test_there_and_back(kit: Kit) -> None:
    """An imported journal is the exported one: record, keys, notes and dropped payloads, and it goes on where that was, with
    a secret of its own."""
    fill(kit)
    with kit.maintained() as kept:
        redact(kept, [3], 9)
    lines, other = exported(kit), kit.another()
    taken_in(other, lines, "writer")  # in a database the redaction is another writer's

    assert exported(other) == lines
    headers = [told["entry"]["header"] for line in lines if "entry" in (told := json.loads(line))]
    assert str(2**64 - 1) in {header.get("seed") for header in headers}, "a reader of JSON does not round it"
    assert other.faults() == []
    journal, original = other.open(), kit.open()
    assert journal.to_recover == original.to_recover
    assert structs.replace(journal.head, entry_hash=b"") == structs.replace(original.head, entry_hash=b"")
    for each in (journal, original):
        assert each.binding("t", "k", kit.clock.millis) == original.binding("t", "k", kit.clock.millis) is not None
        assert each.items(1, 100, 100) == original.items(1, 100, 100)
        (answer,) = each.append_many([admission()], kit.clock.millis)
        assert sequences(answer.entries) == [11]
        kit.clock.millis += DAY * 1000
        assert each.binding("t", "k", kit.clock.millis) is None, "it expires as it would have"
        kit.clock.millis -= DAY * 1000
        each.close()


def test_an_export_is_of_one_moment(postgres: Postgres) -> None:
    """An export that loses its connection ends there and says so: what a new connection shows is of another moment."""
    kit = PostgresKit(postgres.url(postgres.schema()))
    with kit.opened() as journal:
        for _ in range(2):
            journal.append_many([admission(*(item(number) for number in range(1, 601)))], kit.clock.millis)
        with kit.maintained() as kept:
            lines = export(kept)
            first = next(lines)
            kit.execute(END_KEEPING)
            journal.append_many([completed(journal.unfinished(1, 1, 1)[0])], kit.clock.millis)
            with pytest.raises(JournalUnusable, match="the database was lost"):
                list(lines)
        assert json.loads(first)["index"] == "1201"


END_KEEPING = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'ostinato maintenance'"


def test_an_import_reads_a_row_a_few_times(postgres: Postgres) -> None:
    """The server reads a few rows for an entry of an earlier epoch, and not all that were imported before it."""
    kit = PostgresKit(postgres.url(postgres.schema()), spare=postgres.url(postgres.schema()))
    with kit.opened() as journal:
        (answer,) = journal.append_many([admission(*(item(number) for number in range(1, 401)))], kit.clock.millis)
        journal.append_many([completed(entry) for entry in answer.entries[:200]], kit.clock.millis)
    kit.open().close()
    other = kit.another()
    with other.maintained("make") as kept:
        take_in(kept, exported(kit), "lines", None, lambda index, total: None)
        assert isinstance(kept, PostgresStore)
        with kept._database.connected() as db:
            db.execute("SELECT pg_stat_force_next_flush()")
            read = db.execute(ROWS_READ).fetchone()

    assert other.execute("SELECT attempt, count(*) FROM items WHERE outcome IS NULL GROUP BY attempt") == [(2, 200)]
    assert read is not None
    assert read[0] < 5 * 600


ROWS_READ = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relid = 'items'::regclass"


def test_only_into_nothing(kit: Kit) -> None:
    """A journal with anything in it takes no other in, and an empty one has nothing to export."""
    fill(kit)
    lines = exported(kit)
    with pytest.raises(JournalUnusable, match="not empty"):
        taken_in(kit, lines)
    assert exported(kit) == lines
    with kit.another().maintained("make") as kept, pytest.raises(JournalUnusable, match="has no entries"):
        list(export(kept))


def test_several_writers(kit: Kit) -> None:
    """A log of several writers goes into a journal of one only if the owner is named."""
    fill(kit)
    first, *others = exported(kit)
    head = json.loads(first)
    head["writers"]["other"] = "3"
    with pytest.raises(JournalUnusable, match="writer 'other' has epoch 3, and its newest entry 0"):
        taken_in(kit.another(), [json.dumps(head), *others], "other")
    head["writers"]["other"] = "0"
    with pytest.raises(JournalUnusable, match="several writers"):
        taken_in(kit.another(), [json.dumps(head), *others])
    taken_in(kit.another(), [json.dumps(head), *others], "other")
    journal = kit.another().open(writer="other")
    journal.close()
    assert journal.head.epoch == 1


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"sequence": "3"}, "payload of sequence 3 is missing"),
        ({"kind": "ENTRY_KIND_OPENED"}, "none of this kind"),
        ({}, "no signed head"),
    ],
)
def test_an_import_that_lacks_something(kit: Kit, wanted: dict[str, str], why: str) -> None:
    """Lines without the payloads of an item that has ended or of an epoch, or without the signed heads, are not taken in if no
    entry says so."""
    kit.configure(signer=SIGNER)
    fill(kit)
    first, *lines = map(json.loads, exported(kit))
    for line in lines:
        if wanted and wanted.items() <= line.get("entry", {}).get("header", {}).items():
            line["entry"].pop("payload", None)
    if not wanted:
        first["heads"], lines = "0", [line for line in lines if "head" not in line]
    with pytest.raises(JournalUnusable, match=why):
        taken_in(kit.another(), [json.dumps(line) for line in (first, *lines)])


@pytest.mark.parametrize("admitted", [0, 1])
def test_an_import_with_another_last_sequence(kit: Kit, admitted: int) -> None:
    """A first line with another last sequence than the entries is not taken in, whether or not one of them has a sequence."""
    with kit.opened() as journal:
        journal.append_many([admission() for _ in range(admitted)] or [Note("name", b"")], 1)
    first, *lines = exported(kit)
    lines = [json.dumps({**json.loads(first), "last_sequence": "7"}), *lines]
    with pytest.raises(JournalUnusable, match=f"the last sequence is 7, and that of the entries {admitted}"):
        taken_in(kit.another(), lines)
    taken_in(kit.another(), [first, *lines[1:]])


def test_a_note_that_stands_twice(kit: Kit) -> None:
    """Lines with two notes of one name are not taken in: it cannot be told which one holds."""
    fill(kit)
    first, *lines = exported(kit)
    at = next(number for number, line in enumerate(lines) if "note" in json.loads(line))
    notes = [json.dumps({"note": {"name": json.loads(lines[at])["note"]["name"], "value": ""}}), lines[at]]
    with pytest.raises(JournalUnusable, match="a note stands there twice"):
        taken_in(kit.another(), [json.dumps({**json.loads(first), "notes": "2"}), *lines[:at], *notes, *lines[at + 1 :]])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_not_whole_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Lines that are cut off, left out, doubled, exchanged or changed in any byte are refused in one line that names the file,
    and the journal stays empty; or only a note or a signature, which nothing else tells, is another."""
    folder = tmp_path_factory.mktemp("transfer")
    kit = SqliteKit(folder / "journal.db")
    kit.configure(signer=SIGNER)
    fill(kit)
    lines = exported(kit)
    text, other = "\n".join(lines), kit.another()
    at = data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["cut", "leave out", "double", "exchange", "change", "change a key"])):
        case "cut":
            damaged = text[: data.draw(st.integers(0, len(text) - 1))].split("\n")
        case "leave out":
            damaged = lines[:at] + lines[at + 1 :]
        case "double":
            damaged = lines[: at + 1] + lines[at:]
        case "exchange":
            entries = [number for number, line in enumerate(lines) if line.startswith('{"entry"')]
            a, b = data.draw(st.lists(st.sampled_from(entries), min_size=2, max_size=2, unique=True))
            damaged = list(lines)
            damaged[a], damaged[b] = lines[b], lines[a]
        case kind:
            if kind == "change a key":
                at = data.draw(st.sampled_from([number for number, line in enumerate(lines) if line.startswith('{"key"')]))
            changed = bytearray(lines[at].encode())
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
            damaged = [*lines[:at], changed.decode(errors="surrogateescape"), *lines[at + 1 :]]

    file = folder / "lines.jsonl"
    file.write_text("\n".join(damaged), errors="surrogateescape")
    with pytest.raises(SystemExit) as ended, redirect_stderr(io.StringIO()) as said:
        commands.main(["import", str(file), "--journal", other.location])
    assert said.getvalue().count("\n") == 1
    if ended.value.code:
        assert said.getvalue().startswith(f"import: {file} ")
        assert not other.path.exists()
    else:
        assert [line for line in exported(other) if not UNCHECKED.match(line)] == [
            line for line in lines if not UNCHECKED.match(line)
        ]


UNCHECKED = re.compile('{"(note|head)"')
"""The lines of which the entries say nothing, or without the key not all."""
