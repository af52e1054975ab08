"""`ostinato get`, `tail` and `head`: what the journal holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any

import typer

from ostinato import errors
from ostinato.cli import options, show
from ostinato.cli.session import Session, usage
from ostinato.v1 import sequencer_pb2, types_pb2


async def get(
    session: Session,
    sequence: Annotated[int | None, typer.Argument(help="Of the item.", show_default=False)] = None,
    key: options.Key = "",
    last: Annotated[bool, typer.Option("--last", help="The newest item.")] = False,
) -> bool:
    """Shows an item, or all of a keyed batch: what went in and how it ended."""
    if last and (sequence is not None or key):
        raise typer.BadParameter("--last: give no sequence and no --key with it")
    async with session.client() as client:
        if last:
            sequence = (await client.head(timeout=session.timeout)).last_sequence
            if not sequence:
                raise errors.NotFound("the journal has no item yet")
        with usage():
            records = await client.get(sequence, key=key or "", timeout=session.timeout)
    for position, record in enumerate(records):
        if session.json:
            show.as_json(record)
            continue
        if position:
            show.line("")
        show.card(_record(record))
    return True


async def tail(
    session: Session,
    from_index: Annotated[int, typer.Option("--from", min=0, metavar="N", help="First index.")] = 1,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new entries, also over a sidecar's restart.")
    ] = False,
    payloads: Annotated[bool, typer.Option("--payloads", help="What went in and came out, too.")] = False,
) -> bool:
    """Shows the journal's entries: index, kind, sequence, epoch, time, digest."""
    async with session.client() as client:
        with usage():
            entries = client.tail(from_index, follow=follow, payloads=payloads, timeout=session.timeout)
        async with aclosing(entries):
            async for entry in entries:
                shown = show.entry(entry)
                if session.json:
                    show.as_json(shown)
                else:
                    show.line(_line(entry.header, shown.get("decoded")))
    return True


async def head(session: Session) -> bool:
    """Shows where the journal stands."""
    async with session.client() as client:
        answer = await client.head(timeout=session.timeout)
    if session.json:
        show.as_json(answer)
        return True
    show.card(
        [
            ("log", answer.log_id),
            ("writer", answer.writer),
            ("epoch", answer.epoch),
            ("index", answer.index),
            ("entry hash", answer.entry_hash.hex()),
            ("last sequence", answer.last_sequence),
            ("unfinished", answer.unfinished),
        ]
    )
    return True


def _line(header: types_pb2.EntryHeader, payload: Any) -> str:
    digest = header.output_digest or header.input_digest or header.payload_digest
    cells = (
        f"{header.index:>8}",
        f"{show.word(header, 'kind'):<9}",
        f"{_sequences(header):>8}",
        f"{header.epoch:>4}",
        show.moment(header.time_unix_millis),
        show.short(digest),
    )
    return "  ".join(cells if payload is None else (*cells, json.dumps(payload)))


def _sequences(header: types_pb2.EntryHeader) -> str:
    """Of the item that the entry is about; of a LOST entry all that it stands for."""
    if header.kind != types_pb2.ENTRY_KIND_LOST:
        return str(header.sequence or "-")
    first, last = header.first_sequence, header.first_sequence + header.count - 1
    return f"{first}..{last}" if first < last else str(first) if first == last else "-"


def _record(record: sequencer_pb2.ItemRecord) -> Iterator[tuple[str, object]]:
    header, given, result = record.admitted, record.input, record.result
    yield "sequence", header.sequence
    yield "batch", f"{header.first_sequence}..{header.first_sequence + header.count - 1}"
    yield "admitted", f"{show.moment(header.time_unix_millis)} by {header.writer} in epoch {header.epoch}"
    yield "seed", f"{header.seed} (derived)" if given.seed_derived else header.seed
    if given.idempotency_key:
        yield "key", given.idempotency_key
    if given.request_id:
        yield "request id", given.request_id
    yield "prompt", f"{len(given.token_ids)} tokens" if record.HasField("input") else "pruned"
    yield "input digest", header.input_digest.hex()
    if result.HasField("output"):
        yield from _output(result)
    elif result.HasField("status"):
        error = errors.from_status(result.status)
        yield "ended", f"{error.reason}: {error.message}"
    elif record.HasField("outcome"):
        yield "ended", f"{show.word(record.outcome, 'kind')}, pruned"
    else:
        yield "ended", "not yet"


def _output(result: types_pb2.Result) -> Iterator[tuple[str, object]]:
    output, header = result.output, result.receipt.header
    yield "grade", show.word(output, "grade")
    yield "fingerprint", header.fingerprint_digest.hex()
    yield "output digest", header.output_digest.hex()
    yield "ended", f"{show.word(output, 'finish_reason')} after {len(output.token_ids)} tokens"
    yield "cached", f"{output.cached_tokens} of {output.prompt_tokens} prompt tokens"
    yield "attempt", result.attempt
    yield "text", output.text
