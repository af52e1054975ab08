"""`ostinato generate`: prompts from all sources, results in order, errors that name the place; --stream and --output."""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import shlex
import signal
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from ostinato import errors, requests
from ostinato.cli.generate import Batch, Prompt, answers, batches
from ostinato.client import Client
from ostinato.v1 import generation_pb2, types_pb2

from tests.ostinato.fake import Fake, Terminal, serving, start
from tests.waiting import until


def test_a_table_of_answers(ostinato: Terminal) -> None:
    """Without --json there is a row for each prompt, aligned, with the seed and the beginning of the output digest."""
    result = ostinato("generate", "Shanghai is", "Paris is", "-n", 2, "--seed", 7)

    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert result.exit_code == 0
    assert header == ["sequence", "seed", "grade", "finish", "digest", "tokens", "ms", "text"]
    assert [row[:4] for row in rows] == [[str(sequence), "7", "exact", "length"] for sequence in (1, 2, 3, 4)]
    assert rows[0][4:] == rows[1][4:] != rows[2][4:]
    assert len(rows[0][4]) == 12


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_json_is_protobufs_and_exact(ostinato: Terminal, seed: int) -> None:
    """Each line is a Result in protobuf's JSON with the contract's names; 64-bit numbers are strings, also in receipts."""
    [line] = ostinato.lines("generate", "a", "--seed", seed)

    result = json_format.ParseDict(line, types_pb2.Result())
    assert result == ostinato.fake.records[1].result
    assert line["output"]["seed"] == line["receipt"]["header"]["seed"] == str(seed)
    assert line["output"]["finish_reason"] == "FINISH_REASON_LENGTH"


def test_every_parameter_has_an_option(ostinato: Terminal, tmp_path: Path) -> None:
    """Each field of Parameters can be set, and each kind of response format by an option."""
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    numbers = "--seed 5 --temperature 0.5 --top-k 2 --top-p 0.75 --min-p 0.25 --repetition-penalty 1.5 --logprobs 0"
    tokens = "--max-new-tokens 7 --min-new-tokens 3 --stop x --stop y --stop-token-id 8 --bad-word z"
    text = f"--ignore-eos --include-stop --no-skip-special-tokens --parse tools --json-schema @{tmp_path}/schema.json"
    assert ostinato("generate", "a", *f"{numbers} {tokens} {text}".split()).exit_code == 0
    for option, value in (("--regex", "a+"), ("--ebnf", "root ::= a"), ("--structural-tag", "{}")):
        assert ostinato("generate", "a", option, value).exit_code == 0

    given = ostinato.sent[0].parameters
    assert {field.name for field, _ in given.ListFields()} == set(types_pb2.Parameters.DESCRIPTOR.fields_by_name)
    assert (given.seed, given.temperature, list(given.stop), list(given.stop_token_ids)) == (5, 0.5, ["x", "y"], [8])
    assert given.response_format.json_schema == '{"type": "object"}'
    formats = [sent.parameters.response_format for sent in ostinato.sent[1:]]
    assert (formats[0].regex, formats[1].ebnf, formats[2].structural_tag) == ("a+", "root ::= a", "{}")
    assert given.include_stop
    assert not given.skip_special_tokens


def test_what_else_is_said_is_sent(ostinato: Terminal) -> None:
    """Key, label, grade, size limit and timeout reach the sidecar; the model's limit is not asked for a single prompt."""
    options = "--key k --request-id r --require-grade serial --max-response-bytes 5000 --timeout 20"
    assert ostinato("generate", "a", *options.split()).exit_code == 0

    [call] = ostinato.fake.calls
    assert (call.request.idempotency_key, call.request.request_id) == ("k", "r")
    assert call.request.required_grade == types_pb2.GRADE_SERIAL
    assert call.metadata["ostinato-max-response-bytes"] == "5000"
    assert call.seconds_left == pytest.approx(20, abs=3)


def results(*verdicts: int, text: str = "done") -> list[types_pb2.Result]:
    """Of verified items."""
    made = types_pb2.Output(text=text)
    return [
        types_pb2.Result(sequence=n, output=made, comparison=types_pb2.Comparison(verdict=verdict))  # type: ignore[arg-type]
        for n, verdict in enumerate(verdicts, start=1)
    ]


FELL = types_pb2.Result(sequence=9, status=errors.to_status(errors.GradeLost("fell to\nserial")))


@pytest.mark.parametrize(
    ("answers", "code", "rows", "stderr"),
    [
        ([FELL, *results(1)], 1, [r"9 *GRADE_LOST *fell to\nserial", "1 *done"], "verified: 1 match\n"),
        (results(1, 1, 2, 0), 1, ["*"] * 4, "verified: 2 match, 1 diverged, 1 not compared\n"),
        (results(1, text="a\x1b[31m\nb\u202e\tc\\é"), 0, [r"*a\x1b*31m\nb\u202e\tc\é"], "verified: 1 match\n"),
    ],
    ids=["failed", "verified", "control characters"],
)
def test_what_a_table_shows(ostinato: Terminal, answers: list[Any], code: int, rows: list[str], stderr: str) -> None:
    """An item without an output has its reason and message in its row. --verify requests second runs and prints the verdicts.
    A failed item, or a run that differs, makes the exit code 1. Control characters are shown as escapes."""
    ostinato.fake.script["Generate"].append(generation_pb2.GenerateResponse(results=answers))
    result = ostinato("generate", "a", "--verify")
    assert ostinato.sent[0].verify
    assert (result.exit_code, result.stderr) == (code, stderr)
    assert all(map(fnmatchcase, result.stdout.splitlines()[1:], rows)) and len(result.stdout.splitlines()) == 1 + len(rows)


def chat(text: str, **more: Any) -> types_pb2.Item:
    """A user's message."""
    return types_pb2.Item(chat=requests.chat([{"role": "user", "content": text}], **more))


def with_parameters(item: types_pb2.Item, **given: Any) -> types_pb2.Item:
    item.parameters.CopyFrom(types_pb2.Parameters(**given))
    return item


OPTIONS = {"tools": '[{"type": "function"}]', "template_kwargs": '{"x": 1}'}


@pytest.mark.parametrize(
    ("arguments", "stdin", "file", "expected"),
    [
        ("first - last", "a\r\n\n  \nb\u2028c\n", "", list(map(requests.item, ["first", "a", "b\u2028c", "last"]))),
        (
            "hi --chat",
            "",
            '{"text": "a", "seed": 1}\n{"token_ids": [1]}\n',
            [chat("hi"), with_parameters(chat("a"), seed=1), requests.item([1])],
        ),
        (
            """c --chat --messages '[{"role": "user", "content": "a"}]' --tools @TOOLS --template-kwargs '{"x": 1}'""",
            "",
            '{"messages": [{"role": "user", "content": "b"}], "tools": [], "continue_final_message": true}\n',
            [chat("c", **OPTIONS), chat("a", **OPTIONS), chat("b", **OPTIONS | {"tools": "[]"}, continue_final_message=True)],
        ),
        (
            "",
            "",
            "\ufeff"
            '"a\u2028b"\r\n\n{"text": "c", "seed": "18446744073709551615"}\r\n\n{"token_ids": [1, 2], "stop": "x"}\r\n\n'
            '{"messages": [{"role": "user", "content": "hi"}]}',
            [
                requests.item("a\u2028b"),
                with_parameters(requests.item("c"), seed=2**64 - 1),
                with_parameters(requests.item([1, 2]), stop=["x"]),
                chat("hi"),
            ],
        ),
    ],
    ids=["stdin", "texts as chats", "chats", "a file"],
)
def test_prompts_of_every_source(
    ostinato: Terminal, tmp_path: Path, arguments: str, stdin: str, file: str, expected: list[types_pb2.Item]
) -> None:
    """- reads prompts from stdin; only a line feed ends one, and blank lines are skipped. --chat makes user messages of texts,
    with the same parameters. --messages is one prompt; --tools and --template-kwargs are for every chat that has none of its
    own. Lines of --file are strings or objects with one prompt and any parameters; a seed may be a string, as our own JSON has
    it. A byte order mark and carriage returns are not part of a prompt."""
    (tmp_path / "tools").write_text(OPTIONS["tools"])
    (tmp_path / "prompts").write_text(file)

    given = shlex.split(arguments.replace("TOOLS", f"{tmp_path}/tools"))
    ostinato.lines("generate", *given, "--file", tmp_path / "prompts", stdin=stdin)

    assert list(ostinato.sent[0].items) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "is not JSON: Expecting value"),
        ("7", "must be a JSON string or object"),
        ("{}", "text, token_ids, messages: exactly one of them"),
        ('{"text": "a", "token_ids": [1]}', "text, token_ids: exactly one of them"),
        ('{"text": 1}', "text: must be a str, not int"),
        ('{"text": "\\ud800"}', "text: character 0 is half of a surrogate pair"),
        ('{"token_ids": []}', "token_ids: empty"),
        ('{"token_ids": {"a": 1}}', "token_ids: must be a list of token ids, not dict"),
        ('{"token_ids": [1, -1]}', "token_ids[1]: -1 is not from 0"),
        ('{"messages": [1]}', "messages[0]: must be a message"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: missing"),
        ('{"text": "a", "topp": 1}', "topp: no such parameter"),
        ('{"text": "a", "top_p": "1"}', "top_p: must be a number, not str"),
        ('{"text": "a", "seed": 18446744073709551616}', "seed: 18446744073709551616 is not from 0 to"),
        ('{"text": "a", "seed": "-1"}', "seed: must be an int, not str"),
        ('{"text": "a", "seed": 1, "seed": 2}', "seed: given twice"),
        ('{"text": "a", "temperature": NaN}', "NaN: is not a JSON number"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        (b"\xff", "is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_a_bad_line_is_named(ostinato: Terminal, tmp_path: Path, line: str | bytes, message: str) -> None:
    """A line that is not a prompt is wrong usage; the message has file, line and field, and nothing is sent."""
    file = tmp_path / "f"
    file.write_bytes(b'"fine"\n\n' + (line if isinstance(line, bytes) else line.encode()))

    result = ostinato("generate", "--file", file)

    assert result.exit_code == 2
    assert f"{file}:3: " in result.stderr
    assert message in result.stderr
    assert ostinato.fake.calls == []


def test_a_refused_line_is_named(ostinato: Terminal, tmp_path: Path) -> None:
    """A request that the sidecar calls invalid exits 2, as wrong usage does, and names the line or prompt that is wrong."""
    (tmp_path / "f").write_text('"a"\n\n"b"\n')
    violations = [
        errors.Violation("items[1].parameters.top_p", "above 1"),
        errors.Violation("items", "raise metadata ostinato-max-response-bytes"),
    ]
    refused = errors.InvalidRequest("bad", violations=violations)
    ostinato.fake.script["Generate"].append(refused)

    result = ostinato("generate", "--file", tmp_path / "f")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: INVALID_REQUEST: the request has 2 bad fields",
        f"  {tmp_path}/f:3: parameters.top_p: above 1",
        "  items: raise --max-response-bytes",
    ]
    alone = errors.invalid("items[0].text", "is too long")
    for method, command, place in (
        ("GenerateStream", ["generate", "--stream"], "prompt 1"),
        ("Tokenize", ["tokenize"], "prompt"),
    ):
        ostinato.fake.script[method].append(alone)
        assert f"  {place}: text: is too long\n" in ostinato(*command, "a").stderr


def test_batches_keep_the_order(ostinato: Terminal) -> None:
    """Requests have at most the items that the model allows, and results have the prompts' order, also with --concurrency."""
    prompts = [f"prompt {number}" for number in range(19)]

    lines = ostinato.lines("generate", *prompts, "--batch", 10, "--concurrency", 3, "--key", "k")

    sizes = sorted(len(request.items) for request in ostinato.sent)
    assert sizes == [3, 4, 4, 4, 4]
    assert {request.idempotency_key for request in ostinato.sent} == {"k", "k/2", "k/3", "k/4", "k/5"}
    asked = {record.result.sequence: bytes(record.input.token_ids).decode() for record in ostinato.fake.records.values()}
    assert [asked[int(line["sequence"])] for line in lines] == prompts


def test_at_most_so_many_requests_at_once(ostinato: Terminal) -> None:
    """At most --concurrency requests run at once, and that many do."""
    running, most, pair = 0, 0, asyncio.Barrier(2)

    async def slowly(request: Any, _context: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await pair.wait()
        await asyncio.sleep(0.05)  # a third would come meanwhile
        running -= 1
        return ostinato.fake._generate(request)

    ostinato.fake.script["Generate"].extend([slowly] * 6)
    assert ostinato("generate", *"abcdef", "--batch", 1, "--concurrency", 2).exit_code == 0
    assert most == 2


def test_after_a_failed_call_nothing_more_begins(ostinato: Terminal) -> None:
    """After a failed request the results so far are printed, no more requests are sent, and the error says when to retry."""
    ostinato.fake.script["Generate"].extend([ostinato.fake._generate(_request("a")), errors.QueueFull("full", retry_after=2.5)])

    result = ostinato("generate", *"abcd", "--batch", 1)

    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.splitlines() == ["error: QUEUE_FULL: full", "  Try again in 2.5 s."]
    assert len(ostinato.sent) == 2


def test_a_stream_shows_the_text(ostinato: Terminal) -> None:
    """--stream writes only the text to stdout, and the summary to stderr; with --json it prints every event."""
    events = [
        json_format.ParseDict(line, generation_pb2.GenerateEvent()) for line in ostinato.lines("generate", "--stream", "b")
    ]
    assert [event.WhichOneof("event") for event in events] == ["admitted", *["tokens"] * 4, "finished"]

    result = ostinato("generate", "--stream", "a", "--seed", 3)

    output = ostinato.fake.records[2].result.output
    assert (result.exit_code, result.stdout) == (0, output.text + "\n")
    assert result.stderr.startswith("sequence 2, seed 3, grade exact, finish length, digest ")
    assert "verified" not in result.stderr


def _tokens(text: str) -> generation_pb2.GenerateEvent:
    run = generation_pb2.TokenRun(sequence=1, attempt=1, text=text)
    return generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens(runs=[run]))


def finished(text: str, **more: Any) -> generation_pb2.GenerateEvent:
    return generation_pb2.GenerateEvent(finished=types_pb2.Result(sequence=1, output=types_pb2.Output(text=text), **more))


RESTARTED = generation_pb2.GenerateEvent(restarted=generation_pb2.Restarted(sequence=1, attempt=2))
ABANDONED = generation_pb2.GenerateEvent(failed=types_pb2.Result(sequence=1, status=errors.to_status(errors.Abandoned("gone"))))
MATCHED = types_pb2.Comparison(verdict=types_pb2.VERDICT_MATCH)


@pytest.mark.parametrize(
    ("events", "code", "stdout", "stderr"),
    [
        ([finished("hello", comparison=MATCHED)], 0, "hello\n", "sequence 1, *\nverified: 1 match\n"),
        (
            [_tokens("hel"), RESTARTED, _tokens("world"), finished("world!", attempt=2)],
            0,
            "hel\nworld!\n",
            "restarted: attempt 2 has other tokens; discard what came before\nsequence 1, *\n",
        ),
        ([_tokens("hel"), ABANDONED], 1, "hel\n", "*ABANDONED*"),
        ([_tokens("hel"), errors.SlowReader("too slow")], 1, "hel\n", "error: SLOW_READER: too slow\n"),
    ],
    ids=["verified", "restarted", "a failed item", "a failed call"],
)
def test_what_a_stream_shows(ostinato: Terminal, events: list[Any], code: int, stdout: str, stderr: str) -> None:
    """After the summary of a verified stream comes the verdict, also if it is a match. If a second attempt generates other
    tokens, the text starts again; text that was held back comes at the end. If an item or a call fails, the text so far stays,
    the reason follows, and the exit code is 1."""
    ostinato.fake.script["GenerateStream"].append(events)
    result = ostinato("generate", "--stream", "--verify", "a")
    assert (result.exit_code, result.stdout) == (code, stdout)
    assert fnmatchcase(result.stderr, stderr)


def test_progress_stays_off_stdout(ostinato: Terminal) -> None:
    """--progress draws a bar on stderr and does not change stdout; by default there is no bar without a terminal."""
    prompts = [str(number) for number in range(9)]
    forced, quiet = ostinato("--json", "generate", *prompts, "--progress"), ostinato("--json", "generate", *prompts)

    assert "generate" in forced.stderr
    assert quiet.stderr == ""
    assert [len(list(map(json.loads, each.stdout.splitlines()))) for each in (forced, quiet)] == [9, 9]


def _request(text: str) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(items=[types_pb2.Item(text=text)])


# ---- --output: every prompt once, in order, through any interruption

COUNT = 11
PROMPTS = [f"prompt {number}" for number in range(COUNT)]


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    """One line per prompt, and a blank line before the third."""
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps(prompt) for prompt in PROMPTS]
    lines.insert(2, "")
    file.write_text("\n".join(lines) + "\n")
    return file


def _command(file: Path, *more: object) -> list[object]:
    return ["generate", "--file", file, "--output", file.with_name("answers.jsonl"), "--batch", 2, *more]


def _answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.with_name("answers.jsonl").read_text().splitlines()]


def _asked(fake: Fake) -> list[str]:
    return [bytes(record.input.token_ids).decode() for record in fake.records.values()]


def _in_order(fake: Fake, answers: list[dict[str, Any]]) -> bool:
    """Whether these are the results of all prompts, in their order."""
    asked = {sequence: bytes(record.input.token_ids).decode() for sequence, record in fake.records.items()}
    return [asked[int(answer["sequence"])] for answer in answers] == PROMPTS


def test_a_file_is_answered_into_a_file(ostinato: Terminal, file: Path) -> None:
    """Each prompt has a result in order, with its line number, that verifies offline; a summary counts them, for people too."""
    [summary] = ostinato.lines(*_command(file, "--concurrency", 3))

    answers = _answers(file)
    assert _in_order(ostinato.fake, answers)
    assert [answer["line"] for answer in answers] == [1, 2, *range(4, COUNT + 2)]
    assert [answer["key"].rpartition("/")[0] for answer in answers[-3:]] == ["prompts.jsonl/9-10"] * 2 + ["prompts.jsonl/11-11"]
    assert f"\n{COUNT} receipts: {COUNT} consistent, " in ostinato("verify", file.with_name("answers.jsonl")).stdout
    assert summary == {
        "items": COUNT,
        "outcomes": {"completed": COUNT},
        "kept": 0,
        "sequences": f"1..{COUNT}",
        "prompt_tokens": sum(map(len, PROMPTS)),
        "tokens": 4 * COUNT,
    }
    assert ["outcomes", f"{COUNT} completed"] in [
        line.split(maxsplit=1) for line in ostinato(*_command(file)).stdout.splitlines()
    ]


def test_a_cut_anywhere_is_gone_on_with(ostinato: Terminal, file: Path) -> None:
    """After a cut at any byte, the same command restores the output, generates nothing twice and requests only the rest."""
    assert ostinato(*_command(file)).exit_code == 0
    output = file.with_name("answers.jsonl")
    whole = output.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, 1, 9, len(whole), *ends, *(end - 1 for end in ends), *(end + 20 for end in ends[:-1])}):
        output.write_bytes(whole[:cut])
        ostinato.fake.calls.clear()

        [summary] = ostinato.lines(*_command(file))

        kept = sum(end <= cut for end in ends) // 2 * 2 if cut < len(whole) else COUNT
        assert output.read_bytes() == whole
        assert (summary["kept"], summary["items"]) == (kept, COUNT)
        assert sum(len(request.items) for request in ostinato.sent) == COUNT - kept
    assert sorted(_asked(ostinato.fake)) == sorted(PROMPTS)


def test_a_failed_call_leaves_a_beginning(ostinato: Terminal, file: Path) -> None:
    """After a failed request the output ends before it, also if later ones were answered; the same command continues."""
    generate = ostinato.fake.altering(id)
    ostinato.fake.script["Generate"].extend([generate, errors.EngineFailed("broken"), generate])

    first = ostinato(*_command(file, "--concurrency", 3))
    begun = _answers(file)
    again = ostinato(*_command(file, "--concurrency", 3))

    assert first.exit_code == 1
    assert first.stderr.splitlines()[0].startswith(f"interrupted: {len(begun)} of {COUNT} results are in ")
    assert "ENGINE_FAILED: broken" in first.stderr
    assert len(begun) < COUNT
    assert again.exit_code == 0
    assert _in_order(ostinato.fake, _answers(file))
    assert sorted(_asked(ostinato.fake)) == sorted(PROMPTS)


@pytest.mark.parametrize("verify", [False, True])
def test_a_failed_item_is_an_answer(ostinato: Terminal, file: Path, verify: bool) -> None:
    """An item without an output has a line and is counted by its reason; with --verify the verdicts are counted. A failure or
    a divergence makes the exit code 1, also in a later run."""
    failed = types_pb2.Result(sequence=77, status=errors.to_status(errors.GradeLost("fell")))
    done, diverged = (
        types_pb2.Result(sequence=78, output=types_pb2.Output(token_ids=[1]), comparison=types_pb2.Comparison(verdict=verdict))
        for verdict in (types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED)
    )
    results, told = [failed, done], ("outcomes", {"GRADE_LOST": 1, "completed": COUNT - 1})
    if verify:
        file.write_text('"a"\n"b"\n')
        results, told = [done, diverged], ("verified", {"match": 1, "diverged": 1})
    ostinato.fake.script["Generate"].append(generation_pb2.GenerateResponse(results=results))

    for _ in range(2):
        said = ostinato("--json", *_command(file, *["--verify"] * verify))
        assert (said.exit_code, json.loads(said.stdout)[told[0]]) == (1, told[1])


@pytest.mark.parametrize("line", ["nonsense", '""', '"\\ud800"', '"a string of more than 40 bytes, which is too long"'])
def test_a_bad_line_is_named_before_anything_is_sent(
    ostinato: Terminal, file: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole file is read first: a bad last line, or one that is too long, is named before anything is sent or written."""
    monkeypatch.setattr("ostinato.cli.generate.LINE_BYTES_MAX", 40)
    with file.open("a") as more:
        print(line, file=more)

    result = ostinato(*_command(file))

    assert result.exit_code == 2
    assert f"{file}:{COUNT + 2}: " in result.stderr
    assert ostinato.fake.calls == []
    assert not file.with_name("answers.jsonl").exists()


def test_a_refused_line_can_be_mended(ostinato: Terminal, file: Path) -> None:
    """An invalid prompt is reported with its line; after a correction the earlier results are kept."""
    generate = ostinato.fake.altering(id)
    refused = errors.InvalidRequest("bad", violations=[errors.Violation("items[1].text", "too long")])
    ostinato.fake.script["Generate"].extend([generate, refused])
    first = ostinato(*_command(file))
    assert first.exit_code == 2
    assert f"  {file}:5: text: too long" in first.stderr.splitlines()

    file.write_text(file.read_text().replace("prompt 3", "short"))
    [summary] = ostinato.lines(*_command(file))

    assert (summary["kept"], summary["items"]) == (2, COUNT)
    assert sorted(_asked(ostinato.fake)) == sorted("short" if each == "prompt 3" else each for each in PROMPTS)


@pytest.mark.parametrize(
    "change", ["prompt", "parameter", "--key", "--batch", "shorter", "no answers", "half a line", "edited"]
)
def test_other_answers_are_left_alone(ostinato: Terminal, file: Path, change: str) -> None:
    """An output file of other prompts or another kind is wrong usage; it is not changed, and nothing is sent."""
    assert ostinato(*_command(file)).exit_code == 0
    output, more = file.with_name("answers.jsonl"), list[object]()
    match change:
        case "prompt":
            file.write_text(file.read_text().replace("prompt 3", "prompt three"))
        case "parameter":
            more = ["--seed", 7]
        case "--key" | "--batch":
            more = [change, 3]
        case "shorter":
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
        case "no answers":
            output.write_text('"some other file"\n')
        case "edited":
            output.write_text(output.read_text().replace('"sequence": "1"', '"sequence": "x"'))
        case _:
            output.write_text("some other file")
    before, count = output.read_bytes(), len(ostinato.sent)

    result = ostinato(*_command(file, *more))

    assert result.exit_code == 2
    assert "--output" in result.stderr
    assert output.read_bytes() == before
    assert len(ostinato.sent) == count


def test_a_key_names_a_run(ostinato: Terminal, file: Path) -> None:
    """Another --key gives new results; the same key with a new output file gives the recorded ones. With -n each copy has its
    own result."""
    for key, copies, records in (("one", 1, COUNT), ("two", 1, 2 * COUNT), ("one", 1, 2 * COUNT), ("three", 3, 5 * COUNT)):
        file.with_name("answers.jsonl").unlink(missing_ok=True)
        ostinato.lines(*_command(file, "--key", key, "-n", copies))
        assert len(ostinato.fake.records) == records


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-"], "--output: takes the prompts of --file"),
        (["a"], "--output: takes the prompts of --file"),
        (["--stream"], "--output: takes the prompts of --file"),
        (["--output", "/dev/null"], "--output: /dev/null is not a file"),
        (["--output", "."], "--output"),
        (["--output", "a" * 300], f"--output: {'a' * 300}: File name too long"),
        ([], "another run writes to"),
    ],
)
def test_no_output_to_write_to(ostinato: Terminal, file: Path, arguments: list[str], why: str) -> None:
    """Other prompts than a file's, --stream, a path that is no file, and an output of another run are wrong usage."""
    with file.with_name("answers.jsonl").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = ostinato(*_command(file, *arguments))
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
    assert ostinato.sent == []


def test_a_full_disk_is_said(ostinato: Terminal, file: Path) -> None:
    """A full disk is reported, with how to continue, and the exit code is 1."""
    assert ostinato(*_command(file)).exit_code == 0
    output = file.with_name("answers.jsonl")
    whole = output.read_bytes()
    output.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        result = ostinato(*_command(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert result.exit_code == 1
    assert result.stderr.splitlines()[0].endswith("answers.jsonl: File too large")
    assert result.stderr.splitlines()[1].startswith("interrupted: 4 of ")
    assert ostinato(*_command(file)).exit_code == 0
    assert output.read_bytes() == whole


def test_an_interrupt_is_gone_on_with(ostinato: Terminal, file: Path) -> None:
    """Ctrl-C exits 130 and keeps the results so far; the same command continues and generates nothing twice."""
    answer = ostinato.fake.altering(id)
    ostinato.fake.script["Generate"].extend([answer, answer, lambda *_: asyncio.sleep(1000)])
    with start(*_command(file), target=ostinato.target) as process:
        until(lambda: ostinato.fake.count("Generate") == 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)

    assert process.returncode == 130
    assert said.startswith(f"interrupted: 4 of {COUNT} results are in ")
    [summary] = ostinato.lines(*_command(file))
    assert (summary["kept"], summary["items"]) == (4, COUNT)
    assert sorted(_asked(ostinato.fake)) == sorted(PROMPTS)


async def test_no_more_is_read_than_is_under_way() -> None:
    """Of an endless file only the batches that run are read; each answer lets one more be read."""
    taken = 0

    def endless() -> Iterator[Prompt]:
        nonlocal taken
        while True:
            taken += 1
            yield Prompt(types_pb2.Item(text="a"), f"f:{taken}")

    async with serving(Fake()) as target, Client(target) as client:
        source: Iterator[Batch] = batches(endless(), generation_pb2.GenerateRequest(), 2, lambda number, _: f"k/{number}")
        answered = answers(client, 30, source, 3)
        seen = []
        async for batch, _ in answered:
            seen.append(batch.number)
            assert taken <= 2 * (len(seen) + 2)
            if len(seen) == 10:
                break
        await answered.aclose()
    assert seen == list(range(1, 11))
