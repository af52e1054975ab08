"""A stream of a batch with a key, over as many connections as it takes: whoever listens hears everything once.

After a loss the same request joins the batch, and the sidecar tells it from the beginning: Admitted, all tokens so far (or
none, where it was started again meanwhile), and every end. What was told before is left out; tokens that are not those that
were told come from token 0 behind a Restarted, as they do where the engine was lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from ostinato import errors
from ostinato.patience import KEYED_SECONDS, Patience
from ostinato.progress import Progress
from ostinato.v1 import generation_pb2, types_pb2
from ostinato.v1.generation_pb2 import GenerateEvent
from ostinato.wire import Wire


async def joined(
    wire: Wire, request: generation_pb2.GenerateRequest, timeout: float | None
) -> AsyncGenerator[GenerateEvent, None]:
    """The batch's events. Raises an OstinatoError when patience ends, or for what patience does not cure."""
    patience, told = Patience(timeout, KEYED_SECONDS), Told()
    while True:
        try:
            async with aclosing(wire.read(wire.stubs.generation.GenerateStream, request, patience.left)) as events:
                async for event in events:
                    for each in told.take(event):
                        patience.heard()
                        yield each
            return
        except errors.OstinatoError as error:
            if told.complete:
                return
            await patience.wait(error)
        told.lose()


class Told:
    """What the caller has heard of a batch."""

    def __init__(self) -> None:
        self._stamp: types_pb2.Stamp | None = None
        self._progress: dict[int, Progress] = {}
        self._ended: set[int] = set()
        self._lost = False
        self._behind: set[int] = set()
        """Items of which nothing has come since the connection was lost."""

    @property
    def complete(self) -> bool:
        return self._stamp is not None and len(self._ended) == self._stamp.count

    def lose(self) -> None:
        """The connection is gone: what comes next comes from the beginning."""
        self._lost, self._behind = True, set(self._progress)

    def take(self, event: GenerateEvent) -> Iterator[GenerateEvent]:
        """What is new in an event. Raises Internal for one that cannot follow what was told."""
        try:
            match event.WhichOneof("event"):
                case "admitted":
                    yield from self._admitted(event)
                case "tokens":
                    yield from self._tokens(event.tokens)
                case "restarted":
                    self._of(event.restarted.sequence, event.restarted.attempt).restart(event.restarted.attempt)
                case "finished":
                    if event.finished.sequence not in self._ended:
                        yield from self._missing(event.finished)
                        yield from self._end(event, event.finished)
                case "failed":
                    yield from self._end(event, event.failed)
                case _:
                    yield event
        except ValueError as error:
            raise errors.Internal(f"what came does not follow what came before: {error}") from error

    def _admitted(self, event: GenerateEvent) -> Iterator[GenerateEvent]:
        stamp = event.admitted.stamp
        if self._stamp is None:
            self._stamp = stamp
            yield event
        elif stamp != self._stamp:
            raise ValueError(f"the key stands for sequence {stamp.first_sequence} now, not {self._stamp.first_sequence}")

    def _tokens(self, tokens: generation_pb2.Tokens) -> Iterator[GenerateEvent]:
        runs = []
        for run in tokens.runs:
            if run.sequence not in self._ended:
                progress = self._of(run.sequence, run.attempt)
                progress.attempt = run.attempt
                restarted, new = progress.accept(run)
                if restarted is not None:
                    yield GenerateEvent(restarted=restarted)
                if new is not None:
                    runs.append(new)
        if runs:
            yield GenerateEvent(tokens=generation_pb2.Tokens(runs=runs))

    def _missing(self, result: types_pb2.Result) -> Iterator[GenerateEvent]:
        """The tokens that a loss kept from the caller: nobody may have streamed them."""
        if not self._lost:
            return
        progress = self._of(result.sequence, result.attempt)
        restarted, run = progress.finish(result.output)
        if restarted is not None:
            yield GenerateEvent(restarted=restarted)
        run = run or progress.rest(result.output)
        if run is not None:
            yield GenerateEvent(tokens=generation_pb2.Tokens(runs=[run]))

    def _end(self, event: GenerateEvent, result: types_pb2.Result) -> Iterator[GenerateEvent]:
        if result.sequence not in self._ended:
            self._ended.add(result.sequence)
            yield event

    def _of(self, sequence: int, attempt: int) -> Progress:
        progress = self._progress.setdefault(sequence, Progress(sequence, attempt))
        if sequence in self._behind:
            self._behind.remove(sequence)
            progress.restart(attempt)
        return progress
