"""A bulk run over real processes, both ends of which are killed on the way."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from ostinato.client import Client

from tests.e2e.kit import eventually
from tests.pair import Pair, environment

LINES = 240
SLOW = json.dumps({"rules": [{"do": "delay", "at": 1, "seconds": 0.1}]})


async def test_a_run_whose_both_ends_are_killed_does_nothing_twice() -> None:
    """kill -9 of the sidecar is a pause to the run, kill -9 of the run is mended by the same command: every line has one
    number, and one answer in its place that verifies offline."""
    with Pair(service=["--script", SLOW]) as pair:
        pair.start()
        prompts, output = pair.folder / "prompts.jsonl", pair.folder / "answers.jsonl"
        prompts.write_text("".join(f"{json.dumps(f'Prompt {number}')}\n" for number in range(LINES)))
        command = ["--json", "--timeout", "90", "generate", "--file", str(prompts), "--output", str(output)]
        command += ["--batch", "4", "--concurrency", "3", "--max-new-tokens", "4", "--ignore-eos"]

        first = _start(pair, *command)
        await _written(output, 20)
        await asyncio.to_thread(pair.sidecar.kill)
        await asyncio.to_thread(pair.start_sidecar)
        await _written(output, output.read_bytes().count(b"\n") + 20)
        first.kill()
        await asyncio.to_thread(first.communicate)
        kept = output.read_bytes().count(b"\n") // 4 * 4

        said, _ = await asyncio.to_thread(_start(pair, *command).communicate)
        proved, _ = await asyncio.to_thread(_start(pair, "verify", str(output)).communicate)
        async with Client(pair.target) as client:
            head = await client.head()
            answers = [json.loads(line) for line in output.read_bytes().splitlines()]
            inputs = [(await client.get(int(answer["sequence"])))[0].input.token_ids for answer in answers[::40]]
            wanted = await client.tokenize([f"Prompt {number}" for number in range(LINES)][::40])

    summary = json.loads(said)
    assert (summary["items"], summary["outcomes"], summary["kept"]) == (LINES, {"completed": LINES}, kept)
    assert summary["sequences"] == f"1..{LINES}"
    assert head.last_sequence == LINES, "something was numbered twice"
    assert [answer["line"] for answer in answers] == list(range(1, LINES + 1))
    assert [list(given) for given in inputs] == wanted
    assert proved == f"{LINES} of {LINES} receipts sound\n"


def _start(pair: Pair, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ostinato.cli", "--target", pair.target, *arguments]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)


async def _written(output: Path, lines: int) -> None:
    await eventually(lambda: output.exists() and output.read_bytes().count(b"\n") >= lines, f"{lines} lines are written")
