"""`ostinato get`, `tail`, `head`, `cancel`, `model` and `tokenize`."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from typer.testing import CliRunner

from ostinato import chain, errors
from ostinato.cli.app import app
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.ostinato.fake import LOG_ID, MODEL, Fake, Terminal


@pytest.fixture(name="ostinato")
def _ostinato(ostinato: Terminal) -> Terminal:
    """The command with a sidecar that has sequences 1 to 3."""
    assert ostinato("generate", "a", "b", "--key", "k", "--seed", 2**64 - 1).exit_code == 0
    assert ostinato("generate", "c").exit_code == 0
    ostinato.fake.calls.clear()
    return ostinato


def test_get_shows_an_item_or_a_batch(ostinato: Terminal) -> None:
    """An item is shown with its number, its seed and how it ended, and by --key every item of the batch; with --json each is an
    ItemRecord on one line."""
    shown = dict(line.split(maxsplit=1) for line in ostinato("get", 2).stdout.splitlines() if not line.startswith("input d"))
    assert (shown["sequence"], shown["batch"], shown["seed"], shown["key"]) == ("2", "1..2", str(2**64 - 1), "k")
    assert shown["ended"] == "length after 4 tokens"

    records = [json_format.ParseDict(line, sequencer_pb2.ItemRecord()) for line in ostinato.lines("get", "--key", "k")]
    assert records == [ostinato.fake.records[1], ostinato.fake.records[2]]
    assert ostinato("get", "--key", "k").stdout.count("sequence ") == 2


def test_get_shows_the_newest_item(ostinato: Terminal) -> None:
    """--last is the item with the highest sequence, and fails on an empty journal."""
    [record] = [json_format.ParseDict(line, sequencer_pb2.ItemRecord()) for line in ostinato.lines("get", "--last")]
    assert record == ostinato.fake.records[3]
    ostinato.fake.script["Head"].append(sequencer_pb2.HeadResponse())
    assert ostinato("get", "--last").stderr == "error: NOT_FOUND: the journal has no item yet\n"


def test_get_shows_how_far_an_item_is(ostinato: Terminal) -> None:
    """An item that has not ended, and one that failed, are shown as such; one that is not there is NOT_FOUND, in one line."""
    absent = ostinato("get", 99)
    assert (absent.exit_code, absent.stdout, absent.stderr) == (1, "", "error: NOT_FOUND: no item 99\n")
    header = types_pb2.EntryHeader(sequence=5, first_sequence=5, count=1, seed=1)
    failed = types_pb2.Result(sequence=5, status=errors.to_status(errors.Abandoned("nobody waits")))
    records = [sequencer_pb2.ItemRecord(admitted=header), sequencer_pb2.ItemRecord(admitted=header, result=failed)]
    ostinato.fake.script["Get"].append(sequencer_pb2.GetResponse(items=records))

    lines = ostinato("get", 5).stdout.splitlines()

    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("ended")] == ["not yet", "ABANDONED: nobody waits"]


def test_tail_is_a_line_an_entry(ostinato: Terminal) -> None:
    """An entry is one line with index, kind, sequence, epoch, time and digest; --from sets the first."""
    lines = [line.split() for line in ostinato("tail", "--from", 3).stdout.splitlines()]

    assert [line[:4] for line in lines] == [
        ["3", "admitted", "2", "1"],
        ["4", "completed", "2", "1"],
        ["5", "admitted", "3", "1"],
        ["6", "completed", "3", "1"],
    ]
    assert lines[0][4] == "2023-11-14T22:13:20.002Z"
    assert lines[1][5] == ostinato.fake.journal.entries[3].header.output_digest.hex()[:12]


def test_tail_in_json_is_entries(ostinato: Terminal) -> None:
    """With --json an entry has its payload's bytes and the decoded payload, if payloads are requested."""
    assert not any(line.keys() & {"payload", "decoded"} for line in ostinato.lines("tail"))
    lines = ostinato.lines("tail", "--payloads")

    decoded = [line.pop("decoded") for line in lines]
    assert [json_format.ParseDict(line, sequencer_pb2.Entry()) for line in lines] == ostinato.fake.journal.entries
    assert decoded[0]["seed"] == str(2**64 - 1)
    assert decoded[1]["output"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert json.loads(ostinato("tail", "--payloads").stdout.splitlines()[0].split(maxsplit=6)[6]) == decoded[0]


KINDS = [kind for kind in types_pb2.EntryKind.values() if kind != types_pb2.ENTRY_KIND_UNSPECIFIED]


@pytest.mark.parametrize("kind", KINDS, ids=types_pb2.EntryKind.Name)
def test_tail_decodes_every_kind(elsewhere: tuple[Fake, str], kind: types_pb2.EntryKind.ValueType) -> None:
    """Entries of every kind are shown with their decoded payload, and the output verifies."""
    payload = chain.PAYLOADS[kind]()
    field = next(each for each in payload.DESCRIPTOR.fields if not each.is_repeated)
    if field.message_type is not None:
        getattr(payload, field.name).SetInParent()
    else:
        setattr(payload, field.name, "x" if field.type == FieldDescriptor.TYPE_STRING else 7)
    terminal = Terminal(*elsewhere)
    terminal.fake.journal.append(payload.SerializeToString(), kind=kind, sequence=3)
    printed, line = terminal("--json", "tail", "--payloads").stdout, terminal("tail", "--payloads").stdout

    decoded = json_format.MessageToDict(payload, preserving_proto_field_name=True)
    assert json.loads(printed)["decoded"] == decoded
    assert line.split()[1] == types_pb2.EntryKind.Name(kind).removeprefix("ENTRY_KIND_").lower()
    assert json.loads(line.split(maxsplit=6)[6]) == decoded
    verified = CliRunner().invoke(app, ["verify", "-"], input=printed)
    assert verified.exit_code == 3
    assert "\n1 entry: 1 consistent, 1 chained, 0 signed\n" in verified.stdout


@pytest.mark.parametrize(("count", "numbers"), [(1, "4"), (3, "4..6"), (0, "-")])
def test_tail_shows_what_was_lost(elsewhere: tuple[Fake, str], count: int, numbers: str) -> None:
    """The line of a LOST entry has its range of sequences, also without payloads."""
    elsewhere[0].journal.append(b"", kind=types_pb2.ENTRY_KIND_LOST, first_sequence=4, count=count)
    line = Terminal(*elsewhere)("tail").stdout

    assert line.split()[:4] == ["1", "lost", numbers, "1"]


def test_head_shows_the_end(ostinato: Terminal) -> None:
    """head prints the newest entry's index and hash, and the newest sequence."""
    shown = dict(line.rsplit(maxsplit=1) for line in ostinato("head").stdout.splitlines())
    assert (shown["log"], shown["index"], shown["last sequence"]) == (LOG_ID, "6", "3")
    assert shown["entry hash"] == ostinato.fake.journal.entries[-1].entry_hash.hex()


def test_cancel_takes_a_range_or_a_key(ostinato: Terminal) -> None:
    """cancel takes A..B, one sequence or --key, and prints the counts."""
    assert ostinato("cancel", "3..5").stdout == "1 cancelled, 2 had ended before\n"
    assert ostinato.lines("cancel", "7") == [{"cancelled": 1, "ended": 2}]
    ostinato("cancel", "--key", "k")

    ranges = [(call.request.range.first, call.request.range.last) for call in ostinato.fake.calls]
    assert ranges == [(3, 5), (7, 7), (0, 0)]
    assert ostinato.fake.calls[2].request.idempotency_key == "k"


def test_model_shows_grade_limits_and_fingerprint(ostinato: Terminal) -> None:
    """model prints the grade with its reason, each limit and each field of the fingerprint."""
    shown = [line.split(maxsplit=1) for line in ostinato("model").stdout.splitlines()]
    assert ["grade", "exact: self-test: 4 of 4 equal"] in shown
    assert ["threads", "1"] in shown
    assert ["batch_items_max", "4"] in shown
    assert json_format.ParseDict(ostinato.lines("model")[0], types_pb2.Model()) == MODEL


def test_tokenize_prints_ids(ostinato: Terminal) -> None:
    """tokenize prints ids with spaces between them, or TokenIds in JSON; --chat uses the template."""
    assert ostinato("tokenize", "abc").stdout == "97 98 99\n"
    assert ostinato.lines("tokenize", "abc") == [{"ids": [97, 98, 99]}]
    ostinato("tokenize", "abc", "--chat")
    assert ostinato.fake.calls[-1].request.items[0].chat.messages[0].content == "abc"
