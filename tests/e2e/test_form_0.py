"""A journal of the time before nonces. Entries of form 0 are read, verified, finished and run again as they always were.

`form_0.sql` is the dump of a journal that such a sidecar left when it was killed: a keyed batch of two that were verified
(sequences 1 and 2), a twin (3), three replays, an item that was cancelled (4), and a keyed one that had not ended (5).
`form_0.json` has the request with the key, and the response that its caller got.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from ostinato.chain import FORM, check_record
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.kit import opened, scripted
from tests.pair import Pair
from tests.sidecar.journal_kit import faults
from tests.waiting import eventually

HERE = Path(__file__).parent


async def test_an_older_journal() -> None:
    """It verifies, its keyed answer has the same bytes, its items are replayed and finished, and new ones are sealed."""
    kept = {name: bytes.fromhex(value) for name, value in json.loads((HERE / "form_0.json").read_text()).items()}
    asked = generation_pb2.GenerateRequest.FromString(kept["request"])
    with Pair(service=scripted()) as pair:
        journal = pair.folder / "journal.sqlite"
        journal.touch(mode=0o600)
        with closing(sqlite3.connect(journal)) as db:
            db.executescript((HERE / "form_0.sql").read_text())
        assert faults(journal) == []
        pair.start()
        async with opened(pair) as door:
            again = await door.generation.Generate(asked)
            verdicts = [each.comparison.verdict async for each in door.client.replay(1, 3)]

            async def ended() -> bool:
                return (await door.client.get(key="later"))[0].result.HasField("output")

            await eventually(ended, "what had not ended ends")
            old = [(await door.client.get(sequence))[0] for sequence in range(1, 6)]
            first = old[0]
            new = [
                (await door.client.generate(asked.items[0].text, seed=first.input.seed, max_new_tokens=8, logprobs=2)).results[
                    0
                ]
                for _ in range(2)
            ]
            records = [(await door.client.get(result.sequence))[0] for result in new]
            entries = [entry async for entry in door.client.tail(payloads=True)]
        pair.stop()
        assert faults(journal) == []

    assert again.SerializeToString(deterministic=True) == kept["response"]
    assert verdicts == [types_pb2.VERDICT_MATCH] * 3
    assert [check_record(record) for record in (*old, *records)] == [[]] * 7
    assert {(record.admitted.form, record.outcome.form, record.input.nonce) for record in old} == {(0, 0, b"")}
    assert {(record.admitted.form, record.outcome.form) for record in records} == {(FORM, FORM)}
    assert len({record.input.nonce for record in records}) == 2
    twins = [
        sequencer_pb2.CompletedPayload.FromString(entry.payload).twin
        for entry in entries
        if entry.header.sequence in {result.sequence for result in new} and entry.header.kind == types_pb2.ENTRY_KIND_COMPLETED
    ]
    assert [(twin.verdict, twin.expected_sequence) for twin in twins] == [
        (types_pb2.VERDICT_UNSPECIFIED, 0),
        (types_pb2.VERDICT_MATCH, new[0].sequence),
    ], "what an older journal had of twins is not used"
