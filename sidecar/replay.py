"""Replay: completed items, run again from the record and compared with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from ostinato import errors
from ostinato.abreast import abreast
from ostinato.compare import Side, compare
from ostinato.digest import input_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.dispatcher import Dispatcher
from sidecar.journal import Audit, ItemEntries
from sidecar.rerunner import Made
from sidecar.results import record_of

PAGE_ITEMS = 64
"""Read from the journal at once."""
ROOM_SECONDS = 0.05
"""Between looks whether another re-run may wait."""


async def replay(
    dispatcher: Dispatcher, first: int, last: int, concurrency: int, *, alone: bool
) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
    """A verdict for each completed item of the range, as it falls, `concurrency` runs at once; each is journalled.

    Raises EngineUnavailable or Draining where the rest cannot be run: without a verdict, an item may be asked for again.
    """
    counted = sequencer_pb2.ReplayResponse(total=last - first + 1)
    async with aclosing(abreast(_answers(dispatcher, first, last, alone=alone), concurrency)) as responses:
        async for response in responses:
            counted.seen += len(response.passed_over) or 1
            response.MergeFrom(counted)
            yield response


async def _answers(
    dispatcher: Dispatcher, first: int, last: int, *, alone: bool
) -> AsyncIterator[Coroutine[Any, Any, sequencer_pb2.ReplayResponse]]:
    async for page in _pages(dispatcher, first, last):
        if others := [entries.admitted.header.sequence for entries in page if not _completed(entries)]:
            yield _passed_over(others)
        for entries in filter(_completed, page):
            while not dispatcher.core.reruns.room:
                await asyncio.sleep(ROOM_SECONDS)
            yield _answer(dispatcher, entries, alone=alone)


async def _passed_over(sequences: list[int]) -> sequencer_pb2.ReplayResponse:
    return sequencer_pb2.ReplayResponse(passed_over=sequences)


async def _pages(dispatcher: Dispatcher, first: int, last: int) -> AsyncIterator[Sequence[ItemEntries]]:
    while first <= last:
        page = await dispatcher.journal.items(first, last, PAGE_ITEMS)
        if not page:
            return
        yield page
        first = page[-1].admitted.header.sequence + 1


def _completed(entries: ItemEntries) -> bool:
    return entries.outcome is not None and entries.outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED


async def _answer(dispatcher: Dispatcher, entries: ItemEntries, *, alone: bool) -> sequencer_pb2.ReplayResponse:
    """With all that is needed to look at both runs, where they differ."""
    comparison = await _one(dispatcher, entries, alone=alone)
    record = record_of(entries, dispatcher.fingerprints.known) if comparison.HasField("first_difference") else None
    return sequencer_pb2.ReplayResponse(comparison=comparison, record=record)


async def _one(dispatcher: Dispatcher, entries: ItemEntries, *, alone: bool) -> types_pb2.Comparison:
    outcome = entries.outcome
    assert outcome is not None
    header, fields = outcome.header, dispatcher.fingerprints.fields
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
        made = await dispatcher.reruns.run(given, header.sequence, engine_pb2.PURPOSE_REPLAY, alone=alone)
        expected = Side.recorded(header, recorded, fields(header.fingerprint_digest))
        digest = input_digest(given.token_ids, given.parameters, given.seed)
        actual = Side(made.output, digest, made.fingerprint_digest, fingerprint_fields=fields(made.fingerprint_digest))
        comparison = compare(expected, actual, types_pb2.COMPARISON_KIND_REPLAY, header.sequence)
    except (errors.EngineUnavailable, errors.Draining):
        raise
    except errors.OstinatoError as error:
        comparison.status.CopyFrom(errors.to_status(error))
    with contextlib.suppress(errors.JournalFull):  # the verdict is in the answer, and nowhere else
        await dispatcher.journal.append(
            Audit(entries.admitted.header, comparison, made.fingerprint_digest if made else b"", comparison.grade)
        )
    if made is not None and comparison.HasField("first_difference"):
        comparison.actual.CopyFrom(made.output)
    return comparison
