"""Replay at another sidecar: what one sidecar recorded is run by another and compared here.

The other sidecar gets ordinary Generate requests, with token ids, all parameters and the seed. It assigns sequences to them and
records the runs in its own journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from ostinato import errors
from ostinato.chain import sealed, sealed_input
from ostinato.client import Client
from ostinato.compare import Side, compare
from ostinato.digest import input_digest, output_digest
from ostinato.retry import RETRIED
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

CONCURRENCY = 8
FATAL = (*RETRIED, errors.PermissionDenied, errors.Unauthenticated)
"""Errors that are not about an item: they end the replay."""

T = TypeVar("T")


async def bounded_gather(works: AsyncIterable[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """The results of coroutines in the order in which they end, with at most `limit` of them running. An exception of one is
    raised and cancels the others."""
    running: set[asyncio.Task[T]] = set()
    ended = asyncio.Queue[asyncio.Task[T]]()
    try:
        async for work in works:
            task = asyncio.create_task(work)
            task.add_done_callback(ended.put_nowait)
            running.add(task)
            if len(running) == limit:
                running.remove(task := await ended.get())
                yield task.result()
        while running:
            running.remove(task := await ended.get())
            yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def replay_against(
    source: Client, other: Client, first: int, last: int, *, concurrency: int = CONCURRENCY, timeout: float | None = None
) -> AsyncGenerator[sequencer_pb2.ReplayResponse, None]:
    """As `source.replay`, but run by `other`, with `concurrency` items at once. All sequences have to exist: see `extent`.

    If fingerprints differ, a comparison is INCOMPARABLE and names the fields; it still has the first difference of the outputs.
    Raises an error that prevents reading from `source` or running at `other`. An item without a verdict can be replayed again.
    """
    elsewhere = Elsewhere(other, timeout)
    counts = sequencer_pb2.ReplayResponse(total=last - first + 1)

    async def run(sequence: int) -> sequencer_pb2.ReplayResponse:
        [record] = await source.get(sequence, timeout=timeout)
        if record.outcome.kind != types_pb2.ENTRY_KIND_COMPLETED:
            return sequencer_pb2.ReplayResponse(passed_over=[sequence])
        comparison, _ = await elsewhere.compared(record, "replay")
        differs = comparison.HasField("first_difference")
        return sequencer_pb2.ReplayResponse(comparison=comparison, record=record if differs else None)

    async def runs() -> AsyncIterator[Coroutine[Any, Any, sequencer_pb2.ReplayResponse]]:
        for sequence in range(first, last + 1):
            yield run(sequence)

    async with aclosing(bounded_gather(runs(), concurrency)) as responses:
        async for response in responses:
            counts.seen += 1
            response.MergeFrom(counts)
            yield response


async def extent(source: Client, first: int, last: int, *, timeout: float | None = None) -> int:
    """The last sequence of the range that exists. Raises NotFound if none does.

    Only an operator may ask for the newest sequence. For other callers `last` has to exist.
    """
    try:
        newest = (await source.head(timeout=timeout)).last_sequence
    except errors.PermissionDenied:
        await source.get(last, timeout=timeout)
        return last
    if first > newest:
        raise errors.NotFound(f"the newest sequence is {newest}")
    return min(last, newest)


def request(record: sequencer_pb2.ItemRecord, request_id: str) -> generation_pb2.GenerateRequest:
    """The request that makes another sidecar run this input. Raises InvalidRequest if no request can."""
    given, parameters = record.input, record.input.parameters
    if parameters.bad_token_ids:
        raise errors.invalid("bad_words", "are recorded as token ids, which a request cannot have")
    values = {
        field.name: getattr(parameters, field.name)
        for field in parameters.DESCRIPTOR.fields
        if field.name in types_pb2.Parameters.DESCRIPTOR.fields_by_name
        and (not field.has_presence or parameters.HasField(field.name))  # type: ignore[arg-type]
    }
    values["skip_special_tokens"] = not parameters.keep_special_tokens
    item = types_pb2.Item(
        token_ids=types_pb2.TokenIds(ids=given.token_ids), parameters=types_pb2.Parameters(seed=given.seed, **values)
    )
    return generation_pb2.GenerateRequest(items=[item], request_id=request_id)


class Elsewhere:
    """Runs recorded items at another sidecar, as ordinary requests, and compares."""

    def __init__(self, other: Client, timeout: float | None) -> None:
        self._other, self._timeout = other, timeout
        self._fingerprints: dict[bytes, Mapping[str, str] | None] = {}

    async def compared(
        self, record: sequencer_pb2.ItemRecord, why: str
    ) -> tuple[types_pb2.Comparison, types_pb2.Result | None]:
        """The verdict, and the other sidecar's result. Without one, the comparison's status says why. Raises FATAL errors.
        `why`: begins the label of the request, which names the record."""
        try:
            return await self._compared(record, f"{why} {record.admitted.log_id[:8]}/{record.admitted.sequence}")
        except FATAL:
            raise
        except errors.OstinatoError as error:
            comparison = types_pb2.Comparison(
                sequence=record.outcome.sequence,
                kind=types_pb2.COMPARISON_KIND_REPLAY,
                verdict=types_pb2.VERDICT_INCOMPARABLE,
                expected_output_digest=output_digest(record.result.output) if record.result.HasField("output") else b"",
                status=errors.to_status(error),
            )
            return comparison, None

    async def _compared(
        self, record: sequencer_pb2.ItemRecord, request_id: str
    ) -> tuple[types_pb2.Comparison, types_pb2.Result]:
        outcome = record.outcome
        if not (record.HasField("input") and record.result.HasField("output")):
            raise errors.PayloadPruned(f"the payloads of sequence {outcome.sequence} have been pruned")
        result = await self._generate(request(record, request_id))
        if result.HasField("status"):
            raise errors.from_status(result.status)
        header, given = result.receipt.header, record.input
        asked = sealed(header.form, result.receipt.nonce, "input", input_digest(given.token_ids, given.parameters, given.seed))
        comparison = compare(
            Side.recorded(outcome, record.result.output, record.fingerprint.fields if record.HasField("fingerprint") else None),
            Side(
                result.output,
                sealed_input(outcome.form, given) if asked == header.input_digest else b"",
                header.fingerprint_digest,
                fingerprint_fields=await self._fingerprint_fields(header.fingerprint_digest),
            ),
            types_pb2.COMPARISON_KIND_REPLAY,
            outcome.sequence,
        )
        if comparison.HasField("first_difference"):
            comparison.actual.CopyFrom(result.output)
        return comparison, result

    async def _generate(self, generate: generation_pb2.GenerateRequest) -> types_pb2.Result:
        """Waits while the other sidecar's queue is full."""
        while True:
            try:
                return (await self._other.generate(generate, timeout=self._timeout)).results[0]
            except errors.QueueFull as error:
                await asyncio.sleep(error.retry_after or 1.0)

    async def _fingerprint_fields(self, digest: bytes) -> Mapping[str, str] | None:
        """Of the other sidecar's engine; None if another engine is connected by now."""
        if digest not in self._fingerprints:
            fingerprint = (await self._other.model(timeout=self._timeout)).fingerprint
            self._fingerprints[digest] = fingerprint.fields if fingerprint.digest == digest else None
        return self._fingerprints[digest]
