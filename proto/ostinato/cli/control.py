"""`ostinato cancel`, `model` and `tokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from ostinato import requests
from ostinato.cli import options, prompts, show
from ostinato.cli.session import Session, usage
from ostinato.v1 import types_pb2


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
            answer = await client.cancel(first, last, key=key or "", timeout=session.timeout)
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
