"""`ostinato verify`: honest records are consistent, and every change is a fault."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ostinato import errors
from ostinato.cli.app import app
from ostinato.cli.verify import Verification
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.ostinato.fake import Fake, Terminal


def _journal() -> Fake:
    fake = Fake()
    for number in range(3):
        parameters = types_pb2.Parameters(seed=2**64 - 1 - number, logprobs=0)
        items = [types_pb2.Item(text=text) for text in ("a", "b")]
        fake._generate(generation_pb2.GenerateRequest(items=items, parameters=parameters))
    return fake


FAKE = _journal()
RECORD = FAKE.records[3]
ENTRIES = FAKE.journal.entries


def _dict(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return made


def _check(*documents: Any) -> Verification:
    checks = Verification()
    checks.read("f", "\n".join(json.dumps(each) for each in documents).encode())
    return checks


def _verify(content: str | bytes, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", "-", *arguments], input=content)


@pytest.mark.parametrize(
    ("document", "counts"),
    [
        (RECORD.result, (1, 0)),
        (RECORD, (1, 0)),
        (RECORD.result.receipt, (1, 0)),
        (generation_pb2.GenerateEvent(finished=RECORD.result), (1, 0)),
        (generation_pb2.GenerateResponse(results=[each.result for each in FAKE.records.values()]), (6, 0)),
        (sequencer_pb2.GetResponse(items=FAKE.records.values()), (6, 0)),
        (ENTRIES[0], (0, 1)),
    ],
)
def test_honest_records_are_sound(document: Message, counts: tuple[int, int]) -> None:
    """Every kind of record that the commands print is accepted, alone, in a list, and as one of several lines; and not with
    another epoch in its headers."""
    for checks, times in ((_check(_dict(document)), 1), (_check([_dict(document)], {"results": []}), 1)):
        assert checks.faults == []
        assert tuple(checks.count(kind, "consistent") for kind in ("receipt", "entry")) == tuple(times * n for n in counts)
    altered = json.loads(json.dumps(_dict(document)).replace('"epoch": "1"', '"epoch": "2"'))
    assert _check(altered).faults


def test_an_honest_journal_is_sound(tmp_path: Path) -> None:
    """Every link of a whole journal holds; of a part, the first entry is taken on trust. Without a key nothing is proved."""
    lines = [json.dumps(_dict(entry)) for entry in ENTRIES]
    (tmp_path / "whole").write_text("\n".join(lines))

    whole, part = CliRunner().invoke(app, ["verify", str(tmp_path / "whole")]), _verify("\n".join(lines[4:]))

    last = "consistent, not proved: no signed head follows it"
    assert (whole.exit_code, whole.stdout.splitlines()[1:]) == (3, ["12 entries: 12 consistent, 12 chained, 0 signed", last])
    counts = "7 entries: 7 consistent, 7 chained, 0 signed, 1 before them on trust"
    trust = f"{last}; the entry before it is unknown, so its content is on trust"
    assert (part.exit_code, part.stdout.splitlines()[1:]) == (3, [counts, trust])


@pytest.mark.parametrize(
    "tamper",
    [
        lambda record: record["result"]["receipt"]["header"].update(seed="1"),
        lambda record: record["result"]["output"].update(text="x"),
        lambda record: record["result"]["output"]["logprobs"][0].update(logprob="NaN"),
        lambda record: record["result"].pop("output"),
        lambda record: record["result"].pop("receipt"),
        lambda record: record["result"].update(receipt=_dict(FAKE.records[4].result.receipt)),
        lambda record: record["input"]["parameters"].update(top_p="NaN"),
        lambda record: record.update(input=_dict(FAKE.records[1].input), admitted=_dict(FAKE.records[1].admitted)),
    ],
)
def test_no_record_can_be_altered(tamper: Any) -> None:
    """A change of a record's input, output or receipt is a fault; test_chain.py has one for each field."""
    record = _dict(RECORD)
    tamper(record)
    checks = _check(record)
    assert checks.faults
    assert checks.count("receipt", "consistent") == 0


@pytest.mark.parametrize(
    "tamper",
    [
        lambda entries: entries.pop(3),
        lambda entries: entries.insert(3, entries[3]),
        lambda entries: entries.reverse(),
        lambda entries: entries[2].update(payload=entries[4]["payload"]),
        lambda entries: entries[2].update(entry_hash=entries[4]["entry_hash"]),
        lambda entries: entries[2].update(entry_hash=""),
        lambda entries: entries[2]["header"].update(kind=-1),
        lambda entries: entries[2].update(decoded={"seed": "1"}),
        lambda entries: entries[2].update(payload="", decoded={"seed": "1"}),
    ],
)
def test_no_journal_can_be_altered(tamper: Any) -> None:
    """A missing, repeated, reordered, exchanged or altered entry is a fault."""
    entries = [_dict(entry) for entry in ENTRIES]
    tamper(entries)
    assert _check(*entries).faults


def test_faults_are_printed_and_counted() -> None:
    """Each fault is a line with its place, what holds is counted, and the exit code is 1; --json has the same."""
    records = [_dict(record.result) for record in FAKE.records.values()]
    records[1]["output"]["seed"] = "5"
    content = "\n".join(map(json.dumps, records))

    plain, in_json = _verify(content), _verify(content, "--json")

    assert plain.exit_code == in_json.exit_code == 1
    assert plain.stdout.splitlines() == [
        "stdin:2: sequence 2: header.seed: does not belong to this output",
        *(f"stdin:{n}: sequence {n}: {'not ' * (n == 2)}consistent, not chained, not signed" for n in range(1, 7)),
        "6 receipts: 5 consistent, 0 chained, 0 signed",
        "not sound: not consistent",
    ]
    told = json.loads(in_json.stdout)
    assert (told["faults"], told["verdict"]) == (plain.stdout.splitlines()[:1], "not sound: not consistent")
    assert told["receipts"] == {"total": 6, "consistent": 5, "chained": 0, "signed": 0, "witnessed": 0}
    assert [each["consistent"] for each in told["proofs"]] == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        '{"a": 1}',
        '{"header": {}, "header": {}}',
        '{"output": {"seed": NaN}}',
        "7",
        '{"header": 7}',
        '{"output": {"seed": "x"}}',
        "[" * 5000,
    ],
)
def test_what_is_no_record_is_a_fault(content: str) -> None:
    """A line that is not a record is a fault with its place, also among sound ones."""
    result = _verify(json.dumps(_dict(RECORD)) + "\n" + content)
    assert result.exit_code == 1
    assert result.stdout.startswith(("stdin:2: not ", "stdin:2: is not "))
    assert result.stdout.endswith("1 receipt: 1 consistent, 0 chained, 0 signed\nnot sound: not consistent\n")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["header", "previous_hash", "entry_hash", "results", "items", "admitted", "stamp", "output", "receipt"]
                )
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_no_json_is_too_odd(document: Any) -> None:
    """Any JSON gets a list of faults; none raises an exception."""
    checks = _check(document)
    assert checks.count("receipt", "consistent") == 0
    assert isinstance(checks.faults, list)


def test_what_the_commands_print_is_what_verify_reads(ostinato: Terminal) -> None:
    """The --json output of generate, get and tail verifies unchanged."""
    for arguments in (
        f"generate a b --logprobs 0 --seed {2**63}",
        "generate c --stream",
        "get 2",
        "tail",
        "tail --payloads",
        "tail --payloads --from 3",
    ):
        printed = ostinato("--json", *arguments.split()).stdout
        assert _verify(printed).exit_code == 3, printed


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """The tests must not change their shared records."""
    before = [copy.deepcopy(record) for record in FAKE.records.values()]
    yield
    assert before == list(FAKE.records.values())


WITHOUT_A_PROOF: list[Any] = [
    [],
    {"tokens": {}},
    _dict(ENTRIES[5]),
    _dict(types_pb2.Result(sequence=1, status=errors.to_status(errors.Abandoned("gone")))),
]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["NOTHING: it is empty"]),
        (b"\n \n\t\r\n", ["NOTHING: it has only blank lines"]),
        (b"SQLite format 3\0" + bytes(84), ["FILE: is a SQLite file: if it is a sidecar's journal, use `ostinato", "NOTHING"]),
        (b"\x7fELF\xff\n" * 1000, ["FILE:1: not JSON: ", "FILE: the other 999 lines are not JSON either", "NOTHING"]),
        (b"\xff", ["FILE:1: not JSON: ", "NOTHING"]),
        *((json.dumps(each).encode(), ["NOTHING: it has no receipt"]) for each in WITHOUT_A_PROOF),
    ],
)
def test_a_file_without_a_record(tmp_path: Path, content: bytes, said: list[str]) -> None:
    """A file without a record exits 1, with a few lines that say what it is."""
    file = tmp_path / "file"
    file.write_bytes(content)

    result = CliRunner().invoke(app, ["verify", str(file)])

    assert result.exit_code == 1
    begins = [each.replace("NOTHING", "error: nothing to verify in FILE").replace("FILE", str(file)) for each in said]
    lines = [*result.stdout.splitlines(), *result.stderr.splitlines()]
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), lines


def test_without_cryptography_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package `cryptography` is not installed, --key says what to install; without --key nothing needs it."""
    for name in ["cryptography", *(each for each in sys.modules if each.startswith("cryptography."))]:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "key").write_text("-----BEGIN PUBLIC KEY-----")

    result = _verify(json.dumps(_dict(RECORD)), "--key", str(tmp_path / "key"))
    assert result.exit_code == 2
    assert "[verify]" in result.output
    assert _verify(json.dumps(_dict(RECORD))).exit_code == 3
