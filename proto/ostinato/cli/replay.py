"""`ostinato replay`: runs a range of recorded items again, here or at another sidecar, and compares."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated

import typer

from ostinato import errors
from ostinato.cli import show
from ostinato.cli.session import FAILED, UNJUDGED, Session, open_span
from ostinato.replay import CONCURRENCY, extent, replay_against
from ostinato.v1 import sequencer_pb2, types_pb2

RESPONSE_BYTES = 2**28
"""A response may hold two outputs of the largest size that a caller was allowed."""
PASSED_OVER = "passed over"


async def replay(
    session: Session,
    sequences: Annotated[
        str, typer.Argument(metavar="A..B", help="Sequences, both included; A.., ..B, or one.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Run them at another sidecar, as ordinary requests with the same credentials.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=0, max=64, help=f"Runs at once; 0, the default, is {CONCURRENCY}.", show_default=False)
    ] = 0,
    alone: Annotated[
        bool, typer.Option("--alone", help="Run one item at a time, while nothing else of the sidecar is in the engine.")
    ] = False,
) -> int:
    """Runs completed items again and compares. Exit code 1 if an output differs, 3 if some could not be compared."""
    first, last = open_span(sequences)
    verdicts: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(session.client(RESPONSE_BYTES))
        other = session.against(against).client(RESPONSE_BYTES) if against is not None else None
        last = await extent(source, first, last, timeout=session.timeout)
        concurrency = 1 if alone else concurrency
        if other is None:
            responses = source.replay(first, last, concurrency=concurrency, alone=alone, timeout=session.timeout)
        else:
            await stack.enter_async_context(other)
            concurrency = concurrency or CONCURRENCY
            responses = replay_against(source, other, first, last, concurrency=concurrency, timeout=session.timeout)
        await _follow(session, responses, last - first + 1, verdicts)
    if not session.json:
        show.line(_summary(verdicts))
    if verdicts["diverged"]:
        return FAILED
    return UNJUDGED if verdicts["incomparable"] or verdicts[show.NOT_COMPARED] else 0


async def _follow(
    session: Session,
    responses: AsyncGenerator[sequencer_pb2.ReplayResponse, None],
    total: int,
    verdicts: Counter[str],
) -> None:
    try:
        with show.progress("replay", total) as done:
            async with aclosing(responses):
                async for response in responses:
                    verdicts[PASSED_OVER] += len(response.passed_over)
                    if response.HasField("comparison"):
                        verdicts[show.verdict(response.comparison)] += 1
                    done(verdicts.total())
                    if session.json:
                        show.as_json(response)
                    elif response.HasField("comparison") and response.comparison.verdict != types_pb2.VERDICT_MATCH:
                        show.line(show.headline(response.comparison))
                        if response.HasField("record"):
                            show.side_by_side(response)
    except (asyncio.CancelledError, errors.OstinatoError):
        show.note(f"interrupted after {verdicts.total()} of {total}: {_summary(verdicts)}")
        raise


def _summary(verdicts: Counter[str]) -> str:
    return show.counts({each: verdicts[each] for each in (*show.VERDICTS, PASSED_OVER)})
