"""`ostinato replay`: a range of the journal, run again here or elsewhere, and compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ostinato import errors
from ostinato.cli import difference, options, show
from ostinato.cli.resume import NOT_COMPARED, PASSED_OVER, State
from ostinato.cli.session import UNJUDGED, Session
from ostinato.client import Client
from ostinato.replay import CONCURRENCY, extent, replay_against
from ostinato.v1 import sequencer_pb2, types_pb2

RESPONSE_BYTES = 2**28
"""A response may hold two outputs, each as large as somebody once allowed."""

Sequences = Annotated[
    str | None, typer.Argument(metavar="[A..B]", help="Sequences, both included; A.., ..B, or one.", show_default=False)
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help="Run them at another sidecar, through its public door, with the same credentials.",
        show_default=False,
    ),
]
Concurrency = Annotated[int, typer.Option(min=0, max=64, help=f"Re-runs at once; 0 is {CONCURRENCY}.")]
Alone = Annotated[bool, typer.Option("--alone", help="Each with nothing else of the sidecar beside it in the engine.")]
Resume = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Go on with an interrupted replay: its range is in there.", dir_okay=False)
]


async def replay(
    session: Session,
    sequences: Sequences = None,
    against: Against = None,
    concurrency: Concurrency = 0,
    alone: Alone = False,
    resume: Resume = None,
) -> bool:
    """Runs completed items again and compares: exit code 1 if any answer differs, 3 if some could not be judged."""
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(session.client(RESPONSE_BYTES))
        state = await _state(session, source, sequences, against, resume)
        target = state.against
        elsewhere = replace(session, target=target) if target else None
        other = await stack.enter_async_context(elsewhere.client(RESPONSE_BYTES)) if elsewhere else None
        runs = _Runs(session, source, other, 1 if alone else concurrency, alone)
        await _follow(session, state, runs)
    if not session.json:
        show.line(_summary(state))
    verdicts = state.verdicts
    if not verdicts["diverged"] and (verdicts["incomparable"] or verdicts[NOT_COMPARED]):
        raise typer.Exit(UNJUDGED)
    return not verdicts["diverged"]


async def _state(session: Session, source: Client, sequences: str | None, against: str | None, resume: Path | None) -> State:
    """Of a new replay, or of the one to be resumed, which must be of this journal and this range."""
    if resume is None and sequences is None:
        raise typer.BadParameter("A..B, --resume: give one of them")
    wanted = None if sequences is None else options.open_span(sequences)
    if resume is not None:
        state = State.read(resume)
        log_id, _ = await extent(source, state.first, state.last, timeout=session.timeout)
        if state.log_id != log_id:
            raise typer.BadParameter(f"--resume: {resume} is of another journal, {state.log_id}")
        if wanted is not None and (wanted.first, min(wanted.last, state.last)) != (state.first, state.last):
            raise typer.BadParameter(f"--resume: {resume} is of {state.first}..{state.last}")
        if against not in (None, state.against):
            raise typer.BadParameter(f"--resume: {resume} is against {state.against or 'the sidecar itself'}")
        return state
    assert wanted is not None
    log_id, last = await extent(source, wanted.first, wanted.last, timeout=session.timeout)
    about = {"log_id": log_id, "first": wanted.first, "last": last, "against": against}
    return State(Path(f"ostinato-replay-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6:06}.jsonl"), about)


class _Runs:
    """Where the responses of a range come from."""

    def __init__(self, session: Session, source: Client, other: Client | None, concurrency: int, alone: bool) -> None:
        self._session, self._source, self._other = session, source, other
        self._concurrency, self._alone = concurrency, alone

    def of(self, first: int, last: int) -> AsyncGenerator[sequencer_pb2.ReplayResponse, None]:
        timeout = self._session.timeout
        if self._other is not None:
            concurrency = self._concurrency or CONCURRENCY
            return replay_against(self._source, self._other, first, last, concurrency=concurrency, timeout=timeout)
        return self._source.replay(first, last, concurrency=self._concurrency, alone=self._alone, timeout=timeout)


async def _follow(session: Session, state: State, runs: _Runs) -> None:
    """All that is left, shown as it falls. Says how to go on if it is interrupted."""
    with state:
        try:
            with show.progress("replay", state.total) as seen:
                seen(state.seen)
                async for response in _responses(state, runs):
                    state.take(response)
                    seen(state.seen)
                    _show(session, response)
        except (asyncio.CancelledError, errors.OstinatoError):
            show.note(f"interrupted: {state.seen} of {state.total} looked at: {_summary(state)}")
            if state.resumable:
                show.note(f"  Go on with: ostinato replay --resume {state.path}")
            raise


def _show(session: Session, response: sequencer_pb2.ReplayResponse) -> None:
    if session.json:
        show.as_json(response)
    elif response.HasField("comparison") and response.comparison.verdict != types_pb2.VERDICT_MATCH:
        show.line(difference.headline(response.comparison))
        if response.HasField("record"):
            difference.side_by_side(response)


async def _responses(state: State, runs: _Runs) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
    for first, last in list(state.left()):
        async with aclosing(runs.of(first, last)) as responses:
            async for response in responses:
                yield response


def _summary(state: State) -> str:
    return ", ".join(
        f"{state.verdicts[each]} {each}" for each in ("match", "diverged", "incomparable", NOT_COMPARED, PASSED_OVER)
    )
