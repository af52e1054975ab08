"""A thousand batches from twenty clients at once: order, proof and books, over real processes."""

from __future__ import annotations

import itertools
import random

from ostinato.client import Client

from tests.soak import checks
from tests.soak.checks import COMPLETED, Record
from tests.soak.load import Call, Load, jobs
from tests.soak.recording import RecordedPair

BATCHES, CLIENTS = 1_000, 20


async def test_a_load_is_ordered_proved_and_counted() -> None:
    """A thousand mixed batches get the numbers 1 to n in real-time order, run in that order, and each answer is proved."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with RecordedPair() as pair:
        pair.start()
        load = Load(lambda: pair.target, itertools.islice(jobs(random.Random(seed), "load", repeated_share=0.05), BATCHES))
        await load.run(CLIENTS)
        async with Client(pair.target) as client:
            record = await Record().read(client)
            faults = await checks.kept(load.calls, client, most=500)
            head = await client.head()
        faults += checks.numbers(record) + checks.calls(load.calls, record) + checks.real_time(load.calls)
        faults += checks.results(load.calls) + checks.kinds(load.calls, record) + checks.reproduced(record)
        lines = pair.submissions()
        faults += checks.submitted(lines, record) + books(pair.metrics(), load.calls, record)
        code = pair.sidecar.stop()
        faults += checks.journal_file(pair.folder / "journal.sqlite")

        assert faults == []
        assert code == 0
        assert all(call.complete for call in load.calls if call.error is None)
        assert [line.sequence for line in lines] == list(range(1, len(record.admitted) + 1)), "each ran once, in order"
        assert (head.index, head.entry_hash) == (record.entries, record.last.entry_hash if record.last else b"")
        assert (head.last_sequence, head.unfinished) == (len(record.admitted), 0)


def books(metrics: dict[str, float], seen: list[Call], record: Record) -> list[str]:
    """The sidecar's metrics say what the clients saw and the journal holds."""
    done = [call for call in seen if call.complete]
    batches = {call.job: call for call in done}
    items = sum(len(job.request.items) for job in batches)
    completed = [outcome for outcome in record.outcomes.values() if outcome.kind == COMPLETED]
    distinct = {(outcome.input_digest, outcome.fingerprint_digest) for outcome in completed}
    unary = sum(not call.job.streamed for call in done)
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
