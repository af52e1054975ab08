"""`ostinato cancel`, `model`, `tokenize` and `replay`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated

import typer

from ostinato import errors, requests
from ostinato.cli import options, prompts, show
from ostinato.cli.session import Session, usage
from ostinato.v1 import types_pb2

Span = Annotated[str, typer.Argument(metavar="A..B", help="Sequences, both included; or one of them.", show_default=False)]


async def cancel(
    session: Session, sequences: Annotated[str | None, typer.Argument(metavar="[A..B]")] = None, key: options.Key = ""
) -> bool:
    """Ends items that have not ended: a sequence, a range of them, or a keyed batch."""
    first, last = None, None
    if sequences is not None:
        span = options.span(sequences)
        first, last = span.first, span.last
    async with session.client() as client:
        with usage():
            answer = await client.cancel(first, last, key=key, timeout=session.timeout)
    if session.json:
        show.as_json(answer)
    else:
        show.line(f"{answer.cancelled} cancelled, {answer.ended} had ended before")
    return True


async def model(session: Session) -> bool:
    """Shows what is running: the grade it has earned and why, its limits, its fingerprint."""
    async with session.client() as client:
        answer = await client.model(timeout=session.timeout)
    if session.json:
        show.as_json(answer)
    else:
        show.card(_model(answer))
    return True


async def tokenize(
    session: Session,
    text: Annotated[str, typer.Argument(help="A text as generate takes it.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="It is a user's message.")] = False,
) -> bool:
    """Shows a prompt's token ids."""
    with usage():
        given = prompts.Prompt(requests.item(text, "text"), "text")
        item = (prompts.as_chat(given) if chat else given).item
    async with session.client() as client:
        [token_ids] = await client.tokenize(item, timeout=session.timeout)
    if session.json:
        show.as_json(types_pb2.TokenIds(ids=token_ids))
    else:
        show.line(" ".join(map(str, token_ids)))
    return True


async def replay(
    session: Session,
    sequences: Span,
    concurrency: Annotated[int, typer.Option(min=0, max=64, help="Re-runs at once; 0 is the sidecar's choice.")] = 0,
    alone: Annotated[bool, typer.Option("--alone", help="Each with no other re-run beside it.")] = False,
) -> bool:
    """Runs completed items again, and fails if any answer differs."""
    span, verdicts = options.span(sequences), Counter[str]()
    async with session.client() as client:
        with usage():
            responses = client.replay(span.first, span.last, concurrency=concurrency, alone=alone, timeout=session.timeout)
        with show.progress("replay", span.last - span.first + 1) as seen:
            async with aclosing(responses):
                async for response in responses:
                    found = response.comparison
                    verdicts[show.word(found, "verdict")] += 1
                    seen(response.seen)
                    if session.json:
                        show.as_json(found)
                    elif found.verdict != types_pb2.VERDICT_MATCH:
                        show.line(_difference(found))
    if not session.json:
        show.line(", ".join(f"{verdicts[each]} {each}" for each in ("match", "diverged", "incomparable")))
    return not verdicts["diverged"]


def _difference(found: types_pb2.Comparison) -> str:
    if found.verdict != types_pb2.VERDICT_DIVERGED:
        why = errors.from_status(found.status).message if found.HasField("status") else ", ".join(found.drift)
        return f"{found.sequence} incomparable: {show.visible(why)}"
    at = found.first_difference
    line = f"{found.sequence} diverged at token {at}"
    if at < len(found.actual.token_ids):
        line += f", which is {found.actual.token_ids[at]} now"
    return line + (f" (margin {found.margin:g})" if found.HasField("margin") else "")


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
