"""Replay: completed items, run again from the record and compared with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ostinato import errors
from ostinato.compare import Side, compare
from ostinato.digest import input_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.dispatcher import Dispatcher
from sidecar.journal import Audit, ItemEntries
from sidecar.rerunner import Made

PAGE_ITEMS = 64
"""Read from the journal at once."""


async def replay(
    dispatcher: Dispatcher, first: int, last: int, concurrency: int
) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
    """A verdict for each completed item of the range, as it falls, `concurrency` runs at once; each is journalled."""
    running: set[asyncio.Task[types_pb2.Comparison]] = set()
    seen = 0
    try:
        async for entries in _completed(dispatcher, first, last):
            running.add(asyncio.create_task(_one(dispatcher, entries)))
            while len(running) >= concurrency:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    seen += 1
                    yield sequencer_pb2.ReplayResponse(comparison=task.result(), seen=seen)
        for finished in asyncio.as_completed(running):
            seen += 1
            yield sequencer_pb2.ReplayResponse(comparison=await finished, seen=seen)
    finally:
        for task in running:
            task.cancel()


async def _completed(dispatcher: Dispatcher, first: int, last: int) -> AsyncIterator[ItemEntries]:
    while first <= last:
        page = await dispatcher.journal.items(first, last, PAGE_ITEMS)
        if not page:
            return
        for entries in page:
            if entries.outcome is not None and entries.outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED:
                yield entries
        first = page[-1].admitted.header.sequence + 1


async def _one(dispatcher: Dispatcher, entries: ItemEntries) -> types_pb2.Comparison:
    outcome = entries.outcome
    assert outcome is not None
    header = outcome.header
    comparison = types_pb2.Comparison(
        sequence=header.sequence,
        kind=types_pb2.COMPARISON_KIND_REPLAY,
        verdict=types_pb2.VERDICT_INCOMPARABLE,
        expected_output_digest=header.output_digest,
        expected_writer=header.writer,
        expected_sequence=header.sequence,
        grade=header.grade,
    )
    made: Made | None = None
    try:
        if not (entries.admitted.payload and outcome.payload):
            raise errors.PayloadPruned(f"the payloads of sequence {header.sequence} are not kept any more")
        given = sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload)
        recorded = sequencer_pb2.CompletedPayload.FromString(outcome.payload)
        made = await dispatcher.reruns.run(given, header.sequence, engine_pb2.PURPOSE_REPLAY)
        expected = Side.recorded(header, recorded)
        actual = Side(made.output, input_digest(given.token_ids, given.parameters, given.seed), made.fingerprint_digest)
        comparison = compare(expected, actual, types_pb2.COMPARISON_KIND_REPLAY, header.sequence)
    except errors.OstinatoError as error:
        comparison.status.CopyFrom(errors.to_status(error))
    with contextlib.suppress(errors.JournalFull):  # the verdict is in the answer, and nowhere else
        await dispatcher.journal.append(
            Audit(entries.admitted.header, comparison, made.fingerprint_digest if made else b"", comparison.grade)
        )
    if made is not None and comparison.verdict == types_pb2.VERDICT_DIVERGED:
        comparison.actual.CopyFrom(made.output)
    return comparison
