"""Replay elsewhere: what one sidecar recorded, run by another and compared here.

The other sidecar is asked as by anybody: through its public door, with token ids, every parameter and the seed. It takes
numbers there, and its journal has the runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from ostinato import errors
from ostinato.abreast import abreast
from ostinato.client import Client
from ostinato.compare import Side, compare
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

CONCURRENCY = 8
GONE = (
    errors.CallLost,
    errors.EngineUnavailable,
    errors.Draining,
    errors.JournalFull,
    errors.JournalUnavailable,
    errors.PermissionDenied,
    errors.Unauthenticated,
)
"""What says nothing about an item, but that nobody can run it now, or will for this caller."""


async def replay_against(
    source: Client, other: Client, first: int, last: int, *, concurrency: int = CONCURRENCY, timeout: float | None = None
) -> AsyncGenerator[sequencer_pb2.ReplayResponse, None]:
    """As `source.replay`, but run by `other`, `concurrency` items at once.

    Unequal fingerprints make a comparison INCOMPARABLE, and name their fields; where the outputs part is said all the same.
    Raises what keeps `source` from being read, and what keeps `other` from running anything: an item without a verdict may
    be asked for again.
    """
    log_id, last = await extent(source, first, last, timeout=timeout)
    elsewhere = _Elsewhere(source, other, log_id, timeout)
    counted = sequencer_pb2.ReplayResponse(total=last - first + 1)

    async def runs() -> AsyncIterator[Coroutine[Any, Any, sequencer_pb2.ReplayResponse]]:
        for sequence in range(first, last + 1):
            yield elsewhere.run(sequence)

    async with aclosing(abreast(runs(), concurrency)) as responses:
        async for response in responses:
            counted.seen += 1
            response.MergeFrom(counted)
            yield response


async def extent(source: Client, first: int, last: int, *, timeout: float | None = None) -> tuple[str, int]:
    """The log's id, and the last sequence of the range that there is. Raises NotFound for a range that lies ahead.

    Only an operator is told what the newest is: anybody else has to name a last one that there is.
    """
    try:
        head = await source.head(timeout=timeout)
    except errors.PermissionDenied:
        [record] = await source.get(last, timeout=timeout)
        return record.admitted.log_id, last
    if first > head.last_sequence:
        raise errors.NotFound(f"the newest sequence is {head.last_sequence}")
    return head.log_id, min(last, head.last_sequence)


def request(record: sequencer_pb2.ItemRecord, request_id: str) -> generation_pb2.GenerateRequest:
    """What makes another sidecar run this input. Raises InvalidRequest where the public door has no words for it."""
    given, parameters = record.input, record.input.parameters
    if parameters.bad_token_ids:
        raise errors.invalid("bad_words", "are recorded as token ids, which a request cannot have")
    said = {
        field.name: getattr(parameters, field.name)
        for field in parameters.DESCRIPTOR.fields
        if field.name != "bad_token_ids" and (not field.has_presence or parameters.HasField(field.name))  # type: ignore[arg-type]
    }
    made = types_pb2.Parameters(seed=given.seed, **said)
    item = types_pb2.Item(token_ids=types_pb2.TokenIds(ids=given.token_ids), parameters=made)
    return generation_pb2.GenerateRequest(items=[item], request_id=request_id)


class _Elsewhere:
    def __init__(self, source: Client, other: Client, log_id: str, timeout: float | None) -> None:
        self._source, self._other = source, other
        self._log_id, self._timeout = log_id, timeout
        self._fields: dict[bytes, Mapping[str, str] | None] = {}

    async def run(self, sequence: int) -> sequencer_pb2.ReplayResponse:
        [record] = await self._source.get(sequence, timeout=self._timeout)
        if record.outcome.kind != types_pb2.ENTRY_KIND_COMPLETED:
            return sequencer_pb2.ReplayResponse(passed_over=[sequence])
        try:
            comparison = await self._compared(record)
        except GONE:
            raise
        except errors.OstinatoError as error:
            comparison = types_pb2.Comparison(
                sequence=sequence,
                kind=types_pb2.COMPARISON_KIND_REPLAY,
                verdict=types_pb2.VERDICT_INCOMPARABLE,
                expected_output_digest=record.outcome.output_digest,
                status=errors.to_status(error),
            )
        differs = comparison.HasField("first_difference")
        return sequencer_pb2.ReplayResponse(comparison=comparison, record=record if differs else None)

    async def _compared(self, record: sequencer_pb2.ItemRecord) -> types_pb2.Comparison:
        outcome = record.outcome
        if not (record.HasField("input") and record.result.HasField("output")):
            raise errors.PayloadPruned(f"the payloads of sequence {outcome.sequence} are not kept any more")
        result = await self._generated(request(record, f"replay {self._log_id[:8]}/{outcome.sequence}"))
        if result.HasField("status"):
            raise errors.from_status(result.status)
        made = result.receipt.header
        comparison = compare(
            Side.recorded(outcome, record.result.output, record.fingerprint.fields if record.HasField("fingerprint") else None),
            Side(
                result.output,
                made.input_digest,
                made.fingerprint_digest,
                fingerprint_fields=await self._fields_of(made.fingerprint_digest),
            ),
            types_pb2.COMPARISON_KIND_REPLAY,
            outcome.sequence,
        )
        if comparison.HasField("first_difference"):
            comparison.actual.CopyFrom(result.output)
        return comparison

    async def _generated(self, asked: generation_pb2.GenerateRequest) -> types_pb2.Result:
        """Waits where the other sidecar has no room."""
        while True:
            try:
                return (await self._other.generate(asked, timeout=self._timeout)).results[0]
            except errors.QueueFull as error:
                await asyncio.sleep(error.retry_after or 1.0)

    async def _fields_of(self, digest: bytes) -> Mapping[str, str] | None:
        """Of a fingerprint of the other sidecar's engine, if it is still the connected one."""
        if digest not in self._fields:
            fingerprint = (await self._other.model(timeout=self._timeout)).fingerprint
            self._fields[digest] = fingerprint.fields if fingerprint.digest == digest else None
        return self._fields[digest]
