"""`ostinato challenge`: recorded items are chosen at random and run again elsewhere."""

from __future__ import annotations

import json
import re

import pytest

from ostinato import digest
from ostinato.cli import show
from ostinato.cli.challenge import choice
from ostinato.v1 import generation_pb2, types_pb2

from tests.ostinato.fake import MODEL, Fake, Terminal

COUNTS = "{} match, {} diverged, {} incomparable, {} not compared, {} not consistent"
ITEMS = 6


@pytest.fixture(name="ostinato")
def _ostinato(ostinato: Terminal) -> Terminal:
    """The command with a sidecar that has sequences 1 to 6."""
    for prompt in "abcdef":
        assert ostinato("generate", prompt, "--seed", 7).exit_code == 0
    return ostinato


def records(ostinato: Terminal) -> str:
    """What `get --json` prints of all items."""
    return "".join(ostinato("--json", "get", sequence).stdout for sequence in range(1, ITEMS + 1))


def test_honest_records_match(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """What get and tail print is run again there, with token ids, parameters and seed, and matches; the seed of the choice, and
    where each run is recorded there, are printed."""
    other, target = elsewhere
    for told in (records(ostinato), ostinato("--json", "tail", "--payloads").stdout):
        result = ostinato("challenge", "-", "--against", target, stdin=told)

        lines = result.stdout.splitlines()
        assert result.exit_code == 0, result.output
        assert re.fullmatch(re.escape(COUNTS.format(6, 0, 0, 0, 0)) + r"; 6 of 6 records, seed \d+", lines[-1])
        assert all("match" in line and "of log" in line for line in lines[:-1])
    asked = {bytes(call.request.items[0].token_ids.ids) for call in other.calls if call.method == "Generate"}
    assert asked == {b"a", b"b", b"c", b"d", b"e", b"f"}
    assert {call.request.items[0].parameters.seed for call in other.calls if call.method == "Generate"} == {7}


def test_the_seed_decides_the_choice(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """The same seed chooses the same items, those with the smallest digests as docs/protocol.md says. Some seed chooses each; a
    count above the number of records is all of them."""
    _, target = elsewhere
    told = records(ostinato)

    def chosen(seed: int, count: int = 2) -> list[str]:
        out = ostinato("--json", "challenge", "-", "--against", target, "--seed", seed, "--count", count, stdin=told).stdout
        *runs, summary = map(json.loads, out.splitlines())
        assert summary["challenge"]["seed"] == str(seed)
        assert summary["challenge"]["chosen"] == len(runs)
        return sorted(run["claimed"]["admitted"]["sequence"] for run in runs)

    listed = list(ostinato.fake.records.values())
    ranks = {
        digest.tagged_digest("challenge", digest.u64(5), digest.text(each.admitted.log_id), digest.u64(each.admitted.sequence)):
        str(each.admitted.sequence)
        for each in listed
    }  # fmt: skip
    assert chosen(5) == chosen(5) == sorted(ranks[rank] for rank in sorted(ranks)[:2])
    assert len(chosen(5, 99)) == ITEMS
    seen = {each.admitted.sequence for seed in range(64) for each in choice(listed, 1, seed)}
    assert seen == set(range(1, ITEMS + 1))


def test_a_divergence_is_told(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """An output that differs there is DIVERGED, with exit code 1, and --json has what was claimed and what was recomputed."""
    other, target = elsewhere
    other.script["Generate"].append(other.altering(lambda result: result.output.CopyFrom(other.another(result.output))))
    result = ostinato("--json", "challenge", "-", "--against", target, stdin=records(ostinato))

    *runs, summary = map(json.loads, result.stdout.splitlines())
    assert (result.exit_code, summary["challenge"]["diverged"], summary["challenge"]["match"]) == (1, 1, 5)
    [run] = [run for run in runs if run["verdict"] == "diverged"]
    assert run["claimed"]["result"]["output"]["token_ids"] != run["recomputed"]["output"]["token_ids"]
    assert run["recomputed"]["receipt"]["entry_hash"]


def test_an_altered_record_is_told_and_not_run(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """A record that has no receipt, or another output or input, is not consistent, with exit code 1, and is not
    run. What a receipt does not cover has no effect."""
    other, target = elsewhere
    ostinato.fake.records[1].result.output.token_ids[0] ^= 1
    ostinato.fake.records[2].input.token_ids[0] ^= 1
    ostinato.fake.records[3].result.ClearField("receipt")
    ostinato.fake.records[4].outcome.fingerprint_digest = bytes(32)
    ostinato.fake.records[5].fingerprint.CopyFrom(types_pb2.Fingerprint(digest=MODEL.fingerprint.digest, fields={"model": "x"}))
    result = ostinato("challenge", "-", "--against", target, stdin=records(ostinato))

    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith(COUNTS.format(2, 0, 0, 0, 4))
    assert "sequence 1: not consistent" in result.stdout
    assert other.count("Generate") == 2


def test_what_cannot_be_challenged_is_counted(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """Records without input or output beside others are told, with exit code 3; so are items of a journal whose
    admission is not there. Two different records of one item are wrong usage, and an equal one counts once."""
    _, target = elsewhere
    told = [json.loads(line) for line in records(ostinato).splitlines()]
    del told[0]["input"]
    told[1]["result"] = {"sequence": "2", "status": {"code": 13}}
    result = ostinato("challenge", "-", "--against", target, stdin="\n".join(map(json.dumps, [*told, told[3]])))
    assert (result.exit_code, "1 records without input, 1 without output" in result.stderr) == (3, True)
    assert COUNTS.format(4, 0, 0, 0, 0) in result.stdout
    forged = json.loads(json.dumps(told[3]))
    forged["result"]["output"]["text"] = "another"
    for both in ([forged, told[3]], [told[3], forged]):
        result = ostinato("challenge", "-", "--against", target, stdin="\n".join(map(json.dumps, both)))
        assert (result.exit_code, "another record of sequence 4" in result.output) == (2, True)
    entries = ostinato("--json", "tail", "--payloads").stdout.splitlines()
    part = [line for line in entries if json.loads(line)["header"].get("kind") != "ENTRY_KIND_ADMITTED"]
    result = ostinato("challenge", "-", "--against", target, stdin="\n".join([*part, *records(ostinato).splitlines()]))
    assert (result.exit_code, f"{ITEMS} records without input" in result.stderr) == (3, True)


def test_another_engine_is_incomparable(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """Where the fingerprint differs there is no verdict about the output: exit code 3."""
    other, target = elsewhere

    def drift(result: types_pb2.Result) -> None:
        result.receipt.header.fingerprint_digest = bytes(32)

    other.script["Generate"].append(other.altering(drift))
    result = ostinato("challenge", "-", "--against", target, stdin=records(ostinato))

    assert result.exit_code == 3
    assert result.stdout.splitlines()[-1].startswith(COUNTS.format(5, 0, 1, 0, 0))


def test_what_has_no_input_cannot_be_challenged(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """Results of generate have no input: the command says what has one, with exit code 1. Other lines are wrong usage."""
    _, target = elsewhere
    told = json.dumps(show.as_dict(generation_pb2.GenerateResponse(results=[ostinato.fake.records[1].result])))
    result = ostinato("challenge", "-", "--against", target, stdin=told)
    assert result.exit_code == 1
    assert "1 records without input, 0 without output; get --json has both" in result.stderr
    for line in ("nonsense", "7", '{"a": 1}', json.dumps(show.as_dict(types_pb2.SignedHead(root=b"r")))):
        assert ostinato("challenge", "-", "--against", target, stdin=line).exit_code == 2
