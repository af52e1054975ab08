"""Replay: completed items, run again from the record and compared with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from ostinato import errors
from ostinato.abreast import abreast
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.access import pages
from sidecar.dispatcher import Dispatcher
from sidecar.journal import ItemEntries
from sidecar.recheck import Record
from sidecar.results import no_verdict, record_of

REPLAY = types_pb2.COMPARISON_KIND_REPLAY
ROOM_SECONDS = 0.05
"""Between looks whether another second run may wait."""


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
    async for page in pages(dispatcher.journal, first, last):
        if others := [entries.admitted.header.sequence for entries in page if not _completed(entries)]:
            yield _passed_over(others)
        for entries in filter(_completed, page):
            while not dispatcher.core.reruns.room:
                await asyncio.sleep(ROOM_SECONDS)
            yield _answer(dispatcher, entries, alone=alone)


async def _passed_over(sequences: list[int]) -> sequencer_pb2.ReplayResponse:
    return sequencer_pb2.ReplayResponse(passed_over=sequences)


def _completed(entries: ItemEntries) -> bool:
    return entries.outcome is not None and entries.outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED


async def _answer(dispatcher: Dispatcher, entries: ItemEntries, *, alone: bool) -> sequencer_pb2.ReplayResponse:
    """With all that is needed to look at both runs, where they differ."""
    comparison = await _one(dispatcher, entries, alone=alone)
    record = record_of(entries, dispatcher.fingerprints.known) if comparison.HasField("first_difference") else None
    return sequencer_pb2.ReplayResponse(comparison=comparison, record=record)


async def _one(dispatcher: Dispatcher, entries: ItemEntries, *, alone: bool) -> types_pb2.Comparison:
    assert entries.outcome is not None
    sequence, rechecker = entries.outcome.header.sequence, dispatcher.rechecker
    try:
        record = Record.of(entries)
    except errors.PayloadPruned as error:
        dispatcher.observer.not_compared(REPLAY, error.reason)
        return no_verdict(sequence, REPLAY, error)
    try:
        checked = await rechecker.check(record, REPLAY, rechecker.begin(record.input, sequence, REPLAY, alone=alone))
    except (errors.EngineUnavailable, errors.Draining):
        raise
    except errors.OstinatoError as error:  # counted
        return no_verdict(sequence, REPLAY, error)
    if checked.comparison.HasField("first_difference"):
        checked.comparison.actual.CopyFrom(checked.output)
    return checked.comparison
