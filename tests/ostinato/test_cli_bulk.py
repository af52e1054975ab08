"""`ostinato generate --output`: everything once, in order, whatever happens on the way."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostinato import errors
from ostinato.cli.generate import Batch, Prompt, answers, batches
from ostinato.client import Client
from ostinato.v1 import generation_pb2, types_pb2

from tests.ostinato.fake import Fake, Terminal, serving, serving_apart

COUNT = 11
PROMPTS = [f"prompt {number}" for number in range(COUNT)]


@pytest.fixture(name="ostinato")
def _ostinato() -> Iterator[Terminal]:
    fake = Fake()
    with serving_apart(fake) as target:
        yield Terminal(fake, target)


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    """A line for each prompt, the third one behind a blank line."""
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
    """Whether the answers are those to the prompts, in their order."""
    asked = {sequence: bytes(record.input.token_ids).decode() for sequence, record in fake.records.items()}
    return [asked[int(answer["sequence"])] for answer in answers] == PROMPTS


def test_a_file_is_answered_into_a_file(ostinato: Terminal, file: Path) -> None:
    """Each prompt has a line, in order, that names its own line and verifies offline; a summary says what came of it."""
    [summary] = ostinato.lines(*_command(file, "--concurrency", 3))

    answers = _answers(file)
    assert _in_order(ostinato.fake, answers)
    assert [answer["line"] for answer in answers] == [1, 2, *range(4, COUNT + 2)]
    assert [answer["key"].rpartition("/")[0] for answer in answers[-3:]] == ["prompts.jsonl/9-10"] * 2 + ["prompts.jsonl/11-11"]
    assert ostinato("verify", file.with_name("answers.jsonl")).stdout == f"{COUNT} of {COUNT} receipts sound\n"
    assert summary == {
        "items": COUNT,
        "outcomes": {"completed": COUNT},
        "kept": 0,
        "sequences": f"1..{COUNT}",
        "prompt_tokens": sum(map(len, PROMPTS)),
        "tokens": 4 * COUNT,
    }


def test_a_summary_for_people(ostinato: Terminal, file: Path) -> None:
    """Without --json the summary is a card."""
    assert [line.split(maxsplit=1) for line in ostinato(*_command(file)).stdout.splitlines()][:3] == [
        ["items", f"{COUNT}"],
        ["outcomes", f"{COUNT} completed"],
        ["kept", "0"],
    ]


def test_a_cut_anywhere_is_gone_on_with(ostinato: Terminal, file: Path) -> None:
    """Cut behind any byte, the output becomes what it was, and nothing is generated twice; what is there is not asked for."""
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
    """Nothing stands behind what failed, though it was answered; the same command again goes on, and nothing comes twice."""
    answer = ostinato.fake._generate

    async def generate(request: Any, _context: Any) -> Any:
        return answer(request)

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


def test_a_failed_item_is_an_answer(ostinato: Terminal, file: Path) -> None:
    """An item without an output has its line, is counted by its reason, and makes the exit code 1, also when all is kept."""
    failed = types_pb2.Result(sequence=77, status=errors.to_status(errors.GradeLost("fell")))
    done = types_pb2.Result(sequence=78, output=types_pb2.Output(token_ids=[1]))
    ostinato.fake.script["Generate"].append(generation_pb2.GenerateResponse(results=[failed, done]))

    for _ in range(2):
        result = ostinato("--json", *_command(file))
        assert result.exit_code == 1
        assert json.loads(result.stdout)["outcomes"] == {"GRADE_LOST": 1, "completed": COUNT - 1}


def test_verdicts_are_summed_up(ostinato: Terminal, file: Path) -> None:
    """With --verify the summary counts verdicts, and a divergence makes the exit code 1."""
    file.write_text('"a"\n"b"\n')
    results = [
        types_pb2.Result(sequence=n, output=types_pb2.Output(), comparison=types_pb2.Comparison(verdict=verdict))  # type: ignore[arg-type]
        for n, verdict in enumerate([1, 2], start=1)
    ]
    ostinato.fake.script["Generate"].append(generation_pb2.GenerateResponse(results=results))

    result = ostinato("--json", *_command(file, "--verify"))

    assert (result.exit_code, json.loads(result.stdout)["verified"]) == (1, {"match": 1, "diverged": 1})


@pytest.mark.parametrize("line", ["nonsense", '""', '{"text": "a", "topp": 1}', '{"token_ids": []}', '"\\ud800"'])
def test_a_bad_line_is_named_before_anything_is_sent(ostinato: Terminal, file: Path, line: str) -> None:
    """The whole file is looked at first: a bad last line is said before the first one is asked, and no output is begun."""
    with file.open("a") as more:
        print(line, file=more)

    result = ostinato(*_command(file))

    assert result.exit_code == 2
    assert f"{file}:{COUNT + 2}: " in result.stderr
    assert ostinato.fake.calls == []
    assert not file.with_name("answers.jsonl").exists()


def test_a_line_has_an_end(ostinato: Terminal, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is named, and not read."""
    monkeypatch.setattr("ostinato.cli.generate.LINE_BYTES_MAX", 40)
    with file.open("a") as more:
        print(json.dumps("a" * 40), file=more)
    assert f"{file}:{COUNT + 2}: longer than 40 bytes" in " ".join(ostinato(*_command(file)).stderr.split())


def test_a_refused_line_can_be_mended(ostinato: Terminal, file: Path) -> None:
    """What the sidecar refuses is named by its line; once that is mended, what was answered stays."""
    answer = ostinato.fake._generate

    async def generate(request: Any, _context: Any) -> Any:
        return answer(request)

    refused = errors.InvalidRequest("bad", violations=[errors.Violation("items[1].text", "too long")])
    ostinato.fake.script["Generate"].extend([generate, refused])
    first = ostinato(*_command(file))
    assert first.exit_code == 2
    assert f"  {file}:5: text: too long" in first.stderr.splitlines()

    file.write_text(file.read_text().replace("prompt 3", "short"))
    [summary] = ostinato.lines(*_command(file))

    assert (summary["kept"], summary["items"]) == (2, COUNT)
    assert sorted(_asked(ostinato.fake)) == sorted("short" if each == "prompt 3" else each for each in PROMPTS)


@pytest.mark.parametrize("change", ["prompt", "parameter", "--key", "--batch", "shorter", "no answers", "half a line"])
def test_other_answers_are_left_alone(ostinato: Terminal, file: Path, change: str) -> None:
    """An output that answers something else, or is something else, is wrong usage: it is not touched, and nothing is sent."""
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
        case _:
            output.write_text("some other file")
    before, count = output.read_bytes(), len(ostinato.sent)

    result = ostinato(*_command(file, *more))

    assert result.exit_code == 2
    assert "--output" in result.stderr
    assert output.read_bytes() == before
    assert len(ostinato.sent) == count


def test_a_key_names_a_run(ostinato: Terminal, file: Path) -> None:
    """Another --key is other answers; the same one, into another output, those of the record."""
    for key, records in (("one", COUNT), ("two", 2 * COUNT), ("one", 2 * COUNT)):
        file.with_name("answers.jsonl").unlink(missing_ok=True)
        ostinato.lines(*_command(file, "--key", key))
        assert len(ostinato.fake.records) == records


def test_copies_have_keys_of_their_own(ostinato: Terminal, file: Path) -> None:
    """-n asks for each prompt so often, though the requests are equal."""
    file.write_text('"a"\n')
    ostinato.lines(*_command(file, "-n", 5))
    assert len({answer["sequence"] for answer in _answers(file)}) == 5


def test_one_run_writes(ostinato: Terminal, file: Path) -> None:
    """A second run into the same output is wrong usage."""
    with file.with_name("answers.jsonl").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = ostinato(*_command(file))
    assert result.exit_code == 2
    assert "another run writes to" in result.stderr


@pytest.mark.parametrize("arguments", [["-"], ["a"], ["--stream"]])
def test_the_prompts_are_a_files(ostinato: Terminal, file: Path, arguments: list[str]) -> None:
    """Arguments, stdin and --stream do not go with --output."""
    result = ostinato(*_command(file, *arguments))
    assert result.exit_code == 2
    assert "--output: takes the prompts of --file" in " ".join(result.stderr.split())


def test_a_full_disk_is_said(ostinato: Terminal, file: Path) -> None:
    """What could not be written is said, with how to go on; exit 1."""
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


@pytest.mark.parametrize("output", ["/dev/null", ".", "a" * 300])
def test_an_output_can_be_read(ostinato: Terminal, file: Path, output: str) -> None:
    """What is no file cannot be gone on with, and is wrong usage; so is what cannot be looked at."""
    result = ostinato(*_command(file), "--output", output)
    assert result.exit_code == 2
    assert "--output" in result.output and output in result.output
    assert ostinato.sent == []


def test_an_interrupt_is_gone_on_with(ostinato: Terminal, file: Path) -> None:
    """Ctrl-C exits 130 with what was written in the file and says how to go on, which does nothing twice."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have made us ignore
    answer = ostinato.fake._generate

    async def generate(request: Any, _context: Any) -> Any:
        return answer(request)

    ostinato.fake.script["Generate"].extend([generate, generate, lambda *_: asyncio.sleep(1000)])
    command = [sys.executable, "-m", "ostinato.cli", *map(str, _command(file))]
    environment = {**os.environ, "OSTINATO_TARGET": ostinato.target}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while ostinato.fake.count("Generate") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    signal.signal(signal.SIGINT, before)

    assert process.returncode == 130
    assert said.startswith(f"interrupted: 4 of {COUNT} results are in ")
    [summary] = ostinato.lines(*_command(file))
    assert (summary["kept"], summary["items"]) == (4, COUNT)
    assert sorted(_asked(ostinato.fake)) == sorted(PROMPTS)


async def test_no_more_is_read_than_is_under_way() -> None:
    """Of an endless file as many batches are taken as run at once: one more with each answer."""
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
