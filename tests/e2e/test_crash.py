"""Programs that are killed or stopped under load: what clients, journal and metrics say afterwards."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ostinato import errors
from ostinato.client import Client

from tests.e2e.kit import own, rule
from tests.pair import Pair, environment
from tests.simulation.history import Call
from tests.soak import chaos, checks
from tests.soak.chaos import Story
from tests.soak.checks import ABANDONED, COMPLETED, Record
from tests.soak.load import Load, jobs
from tests.soak.recording import RecordedPair
from tests.waiting import eventually

SLOW = json.dumps({"rules": [{"do": "delay", "at": 1, "seconds": 0.25}, {"do": "delay", "at": 2, "seconds": 0.25}]})
"""Every run takes half a second, most of it between its tokens."""


@pytest.fixture
def rng() -> random.Random:
    """The seed is printed if a test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


async def test_a_killed_service_costs_no_call(rng: random.Random) -> None:
    """After kill -9 of the service no call is lost: streams continue after the tokens they had, and equal inputs have equal
    answers."""
    with chaos.pair() as pair:
        pair.start()
        told = Story(pair, rng)
        faults = await told.chapter(["service"] * 3)

    assert faults == []
    assert {outcome.kind for outcome in told.record.outcomes.values()} == {COMPLETED}
    assert {type(call.error) for call in told.load.calls} <= {type(None), errors.EngineUnavailable}
    assert sum(call.restarts for call in told.load.calls) == 0
    assert any(outcome.attempt > 1 for outcome in told.record.outcomes.values())


async def test_ten_kills_in_turn(rng: random.Random) -> None:
    """Ten kills on one journal, of either program, of both at once, and of one before the other is back, under clients of which
    most have keys: numbers go on, every acknowledged answer is there, keyed items complete, others may be ABANDONED (a kill
    need not find one under way), all else that was promised holds, and the file verifies."""
    kills = [*["service", "sidecar"] * 4, "both", "both"]
    rng.shuffle(kills)
    with chaos.pair() as pair:
        pair.start()
        told = Story(pair, rng)
        faults = await told.chapter(kills, keyed_share=0.8)
        code = await asyncio.to_thread(pair.sidecar.stop)
        faults += checks.journal_file(pair.folder / "journal.sqlite")

    assert faults == []
    assert (code, told.record.opened) == (0, 7)
    assert {outcome.kind for outcome in told.record.outcomes.values()} <= {COMPLETED, ABANDONED}
    assert any(call.repeated for call in told.load.calls)


async def drained(pair: RecordedPair, name: str, rng: random.Random) -> tuple[Load, Record, list[str]]:
    """This program is stopped under load and has to exit with 0; a new one follows. Load, journal, and what is wrong."""
    program, start = (pair.sidecar, pair.start_sidecar) if name == "sidecar" else (pair.service, pair.start_service)
    load = Load(lambda: pair.target, jobs(rng, "drain"))
    running = asyncio.create_task(load.run(chaos.CLIENTS))
    await eventually(lambda: any(call.stamp is not None and not call.complete for call in load.calls), "work is under way")
    code = await asyncio.to_thread(program.stop)
    before = len(load.calls)
    await asyncio.to_thread(start)
    await eventually(lambda: any(call.complete for call in load.calls[before:]), "clients carry on")
    load.stop()
    await running
    async with Client(pair.target) as client:
        record = await Record().read(client)
        faults = await checks.kept(load.calls, client)
    faults += checks.kept_promises(load, record) + checks.submitted(pair.submissions(), record)
    return load, record, faults if code == 0 else [*faults, f"it exited with {code}"]


async def test_a_sidecar_that_is_told_to_stop_finishes_first(rng: random.Random) -> None:
    """SIGTERM under load: what was admitted completes in its first attempt and reaches its callers, nothing new gets a number,
    and the program exits with 0; clients carry on with the next one."""
    with RecordedPair(service=["--script", SLOW]) as pair:
        load, record, faults = await drained(pair.start(), "sidecar", rng)

    assert faults == []
    assert {(outcome.kind, outcome.attempt) for outcome in record.outcomes.values()} == {(COMPLETED, 1)}
    # While it drains, while no sidecar listens, and while the next one is not connected.
    refusals = {errors.Draining, errors.Disconnected, errors.EngineUnavailable}
    assert {type(call.error) for call in load.calls if call.error is not None} <= refusals


async def test_a_service_that_is_told_to_stop_loses_nothing(rng: random.Random) -> None:
    """SIGTERM of the service under load: it exits with 0, callers are refused or answered, and every item completes."""
    with RecordedPair(service=["--script", SLOW, "--drain-seconds", "0.5"]) as pair:
        load, record, faults = await drained(pair.start(), "service", rng)

    assert faults == []
    assert {outcome.kind for outcome in record.outcomes.values()} == {COMPLETED}
    assert {type(call.error) for call in load.calls} <= {type(None), errors.EngineUnavailable}


BATCHES, CLIENTS = 400, 20


async def test_a_load_is_ordered_proved_and_counted(rng: random.Random) -> None:
    """400 mixed batches get the numbers 1 to n in real-time order, run in that order, and each answer is proved."""
    with RecordedPair() as pair:
        pair.start()
        load = Load(lambda: pair.target, itertools.islice(jobs(rng, "load", repeated_share=0.05), BATCHES))
        await load.run(CLIENTS)
        async with Client(pair.target) as client:
            record = await Record().read(client)
            faults = await checks.kept(load.calls, client, most=500)
            head = await client.head()
        lines = pair.submissions()
        faults += (
            checks.kept_promises(load, record) + checks.submitted(lines, record) + books(pair.metrics(), load.calls, record)
        )
        code = pair.sidecar.stop()
        faults += checks.journal_file(pair.folder / "journal.sqlite")

        assert faults == []
        assert code == 0
        assert all(call.complete for call in load.calls if call.error is None)
        assert [line.sequence for line in lines] == list(range(1, len(record.admitted) + 1)), "each ran once, in order"
        assert (head.index, head.entry_hash) == (len(record.entries), record.entries[-1].entry_hash)
        assert (head.last_sequence, head.unfinished) == (len(record.admitted), 0)


def books(metrics: dict[str, float], seen: list[Call], record: Record) -> list[str]:
    """The sidecar's metrics say what the clients saw and the journal holds."""
    done = [call for call in seen if call.complete]
    batches = {call.job: len(call.request.items) for call in done}
    items = sum(batches.values())
    completed = [outcome for outcome in record.outcomes.values() if outcome.kind == COMPLETED]
    distinct = {(record.input(outcome.sequence), outcome.fingerprint_digest) for outcome in completed}
    unary = sum(not call.streamed for call in done)
    expected = {
        "ostinato_admitted_items_total": items,
        "ostinato_last_sequence": items,
        'ostinato_ended_items_total{outcome="completed",reason=""}': items,
        "ostinato_item_seconds_count": items,
        "ostinato_admission_seconds_count": len(batches),
        "ostinato_queue_items": 0,
        "ostinato_inflight_items": 0,
        "ostinato_inflight_kv_blocks": 0,
        "ostinato_attempts_total": 0,
        "ostinato_repeated_requests_total": len(done) - len(batches),
        "ostinato_epoch": 1,
        "ostinato_engine_grade": 3,
        'ostinato_comparisons_total{grade="exact",kind="twin",replica="same",verdict="match"}': len(completed) - len(distinct),
        "ostinato_collisions_total": 0,
        'ostinato_rpc_handled_total{code="OK",method="Generate",service="ostinato.v1.Generation"}': unary,
        'ostinato_rpc_handled_total{code="OK",method="GenerateStream",service="ostinato.v1.Generation"}': len(done) - unary,
    }
    return [f"{name}: {metrics.get(name)} instead of {value}" for name, value in expected.items() if metrics.get(name) != value]


LINES = 240


async def test_a_bulk_run_survives_kills_of_sidecar_and_command() -> None:
    """The run waits through a kill -9 of the sidecar, and the same command continues a run that was killed: every line has one
    sequence number and one answer, in its place, that verifies offline."""
    async with own(rules=[rule("delay", 1, seconds=0.1)]) as door:
        pair = door.pair
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
    assert f"{LINES} receipts: {LINES} consistent, 0 chained, 0 signed\n" in proved


def _start(pair: Pair, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ostinato.cli", "--target", pair.target, *arguments]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)


async def _written(output: Path, lines: int) -> None:
    await eventually(lambda: output.exists() and output.read_bytes().count(b"\n") >= lines, f"{lines} lines are written")
