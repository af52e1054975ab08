"""`ostinato get`, `tail`, `head`, `cancel`, `model` and `tokenize`: calls that are answered in one step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any

import typer

from ostinato import digest, errors, requests
from ostinato.cli import show
from ostinato.cli.generate import placed
from ostinato.cli.session import Key, Session, span, usage
from ostinato.signature import envelope
from ostinato.v1 import sequencer_pb2, types_pb2

Dsse = Annotated[bool, typer.Option("--dsse", help="Print the signed head alone, as a DSSE envelope.")]


async def get(
    session: Session,
    sequence: Annotated[int | None, typer.Argument(help="The item's sequence.", show_default=False)] = None,
    key: Key = None,
    last: Annotated[bool, typer.Option("--last", help="The newest item.")] = False,
    dsse: Dsse = False,
) -> None:
    """Shows the record of an item or a keyed batch. It has the input and the outcome."""
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
        if session.json or dsse:
            show.as_json(_envelope(record.result.receipt.head) if dsse else record)
        else:
            if position:
                show.line("")
            show.card(_record(record))


async def tail(
    session: Session,
    from_index: Annotated[int, typer.Option("--from", min=0, metavar="N", help="Index of the first entry.")] = 1,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new entries, also if the sidecar restarts.")] = False,
    payloads: Annotated[bool, typer.Option("--payloads", help="Show inputs and outputs too.")] = False,
) -> None:
    """Shows the journal's entries. A line has index, kind, sequence, epoch, time and digest."""
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


async def head(session: Session, dsse: Dsse = False) -> None:
    """Shows the journal's newest entry and sequence."""
    async with session.client() as client:
        answer = await client.head(timeout=session.timeout)
    if dsse:
        show.as_json(_envelope(answer.signed))
        return
    shown = {
        "log": answer.log_id,
        "writer": answer.writer,
        "epoch": answer.epoch,
        "index": answer.index,
        "entry hash": answer.entry_hash.hex(),
        "last sequence": answer.last_sequence,
        "unfinished": answer.unfinished,
        "signed": f"to entry {answer.signed.last_index}, key {answer.signed.key_id}" if answer.HasField("signed") else "no",
    }
    session.print(answer, lambda: show.card(shown.items()))


async def cancel(
    session: Session,
    sequences: Annotated[
        str | None, typer.Argument(metavar="A..B", help="Sequences, both included; or one.", show_default=False)
    ] = None,
    key: Key = None,
) -> None:
    """Cancels unfinished items. Takes a sequence, a range, or a key."""
    first, last = span(sequences) if sequences is not None else (None, None)
    async with session.client() as client:
        with usage():
            answer = await client.cancel(first, last, key=key or "", timeout=session.timeout)
    session.print(answer, lambda: show.line(f"{answer.cancelled} cancelled, {answer.ended} had ended before"))


async def model(session: Session) -> None:
    """Shows the running model and its grade. Also its limits and its fingerprint."""
    async with session.client() as client:
        answer = await client.model(timeout=session.timeout)
    session.print(answer, lambda: show.card(_model(answer)))


async def tokenize(
    session: Session,
    text: Annotated[str, typer.Argument(help="A text as generate takes it.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="The text is a user's message.")] = False,
) -> None:
    """Shows a prompt's token ids."""
    with usage():
        item = requests.item([{"role": "user", "content": text}] if chat else text, "text")
    async with session.client() as client:
        with placed("prompt"):
            [token_ids] = await client.tokenize(item, timeout=session.timeout)
    session.print(types_pb2.TokenIds(ids=token_ids), lambda: show.line(" ".join(map(str, token_ids))))


def _envelope(head: types_pb2.SignedHead) -> dict[str, Any]:
    if not head.signature:
        raise errors.NotFound("it is not signed: the sidecar had no --signing-key")
    return envelope(head)


def _line(header: types_pb2.EntryHeader, payload: Any) -> str:
    shown = header.output_digest or header.input_digest or header.payload_digest
    cells = (
        f"{header.index:>8}",
        f"{show.word(header, 'kind'):<9}",
        f"{_sequences(header):>8}",
        f"{header.epoch:>4}",
        show.moment(header.time_unix_millis),
        show.short(shown),
    )
    return "  ".join(cells if payload is None else (*cells, json.dumps(payload)))


def _sequences(header: types_pb2.EntryHeader) -> str:
    """The sequence of the entry's item, or all sequences of a LOST entry."""
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
    if record.HasField("input"):
        yield "input digest", digest.input_digest(given.token_ids, given.parameters, given.seed).hex()
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
    yield "output digest", digest.output_digest(output).hex()
    yield "ended", f"{show.word(output, 'finish_reason')} after {len(output.token_ids)} tokens"
    yield "cached", f"{output.cached_tokens} of {output.prompt_tokens} prompt tokens"
    yield "attempt", result.attempt
    yield "text", output.text


def _model(given: types_pb2.Model) -> Iterator[tuple[str, object]]:
    yield "name", given.name
    yield "engine", given.engine
    yield "grade", f"{show.word(given, 'grade')}: {given.grade_reason}"
    yield "fingerprint", given.fingerprint.digest.hex()
    for name, value in sorted(given.fingerprint.fields.items()):
        yield f"  {name}", value
    yield "vocabulary", given.vocabulary_size
    yield "context", f"{given.context_tokens} tokens"
    yield "chat", "yes" if given.chat else "no"
    yield "logprobs", show.word(given, "logprob_kind")
    yield "limits", ""
    for field in given.limits.DESCRIPTOR.fields:
        yield f"  {field.name}", getattr(given.limits, field.name)
