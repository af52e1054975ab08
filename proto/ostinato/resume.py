"""Token streams that continue after a loss: of an attempt (in the sidecar) or of a connection (in the client).

`Progress` compares the tokens of a new attempt with those that were sent. `resumed` reconnects a stream of a request with an
idempotency key. After a loss the same request joins its batch, and the sidecar sends the batch's events from the beginning;
`StreamResume` leaves out what the caller has received.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from ostinato import errors
from ostinato.retry import KEYED_SECONDS, RetryPolicy
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2
from ostinato.v1.generation_pb2 import GenerateEvent, Restarted, TokenRun


async def resumed(
    connect: Callable[[float | None], AsyncGenerator[GenerateEvent, None]], timeout: float | None
) -> AsyncGenerator[GenerateEvent, None]:
    """The events of a batch, over as many connections as it takes. `connect` sends the request with a timeout. Raises an
    OstinatoError that cannot be retried, or the last one when retries end."""
    policy, state = RetryPolicy(timeout, KEYED_SECONDS), StreamResume()
    while True:
        try:
            async with aclosing(connect(policy.remaining)) as events:
                async for event in events:
                    for new in state.take(event):
                        policy.reset()
                        yield new
            return
        except errors.OstinatoError as error:
            if state.complete:
                return
            await policy.backoff(error)
        state.connection_lost()


class StreamResume:
    """What the caller has received of a batch."""

    def __init__(self) -> None:
        self._stamp: types_pb2.Stamp | None = None
        self._progress: dict[int, Progress] = {}
        self._ended: set[int] = set()
        self._lost = False
        self._silent: set[int] = set()
        """Items without an event on the new connection."""

    @property
    def complete(self) -> bool:
        return self._stamp is not None and len(self._ended) == self._stamp.count

    def connection_lost(self) -> None:
        """The next events come from the beginning of the batch."""
        self._lost, self._silent = True, set(self._progress)

    def take(self, event: GenerateEvent) -> Iterator[GenerateEvent]:
        """The new part of an event. Raises Internal if the event contradicts those before."""
        try:
            match event.WhichOneof("event"):
                case "admitted":
                    yield from self._admitted(event)
                case "tokens":
                    yield from self._tokens(event.tokens)
                case "restarted":
                    self._of(event.restarted.sequence, event.restarted.attempt).restart(event.restarted.attempt)
                case "finished" | "failed" as end:
                    sequence = getattr(event, end).sequence
                    if sequence not in self._ended:
                        if self._lost and end == "finished":
                            yield from self._missed(event.finished)
                        self._ended.add(sequence)
                        yield event
                case _:
                    yield event
        except ValueError as error:
            raise errors.Internal(f"an event contradicts those before it: {error}") from error

    def _admitted(self, event: GenerateEvent) -> Iterator[GenerateEvent]:
        stamp = event.admitted.stamp
        if self._stamp is None:
            self._stamp = stamp
            yield event
        elif stamp != self._stamp:
            raise ValueError(f"the key's first sequence is {stamp.first_sequence} now, not {self._stamp.first_sequence}")

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

    def _missed(self, result: types_pb2.Result) -> Iterator[GenerateEvent]:
        """The tokens that were generated while no connection was open."""
        progress = self._of(result.sequence, result.attempt)
        restarted, run = progress.finish(result.output)
        if restarted is not None:
            yield GenerateEvent(restarted=restarted)
        run = run or progress.rest(result.output)
        if run is not None:
            yield GenerateEvent(tokens=generation_pb2.Tokens(runs=[run]))

    def _of(self, sequence: int, attempt: int) -> Progress:
        progress = self._progress.setdefault(sequence, Progress(sequence, attempt))
        if sequence in self._silent:
            self._silent.remove(sequence)
            progress.restart(attempt)
        return progress


@dataclass(slots=True)
class Progress:
    """The tokens of an item's running attempt against those that were sent.

    While an attempt repeats the sent tokens, nothing is sent. At its first other token, a Restarted is sent, and the attempt
    from its token 0. Equal tokens have equal text, so texts are cut by length.
    """

    sequence: int
    attempt: int = 1
    sent: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """The tokens that the last lost attempt had sent. A recovery comparison compares them."""
    _seen: int = 0
    _repeat: TokenRun | None = None
    """This attempt from its token 0, until it has more than the sent tokens; without its text."""
    _repeat_texts: list[str] = field(default_factory=list)
    """Separate: a message that is appended to keeps every earlier text alive."""

    def restart(self, attempt: int) -> None:
        """A new attempt begins at token 0."""
        self.lost, self.attempt, self._seen = list(self.sent), attempt, 0
        self._repeat, self._repeat_texts = self._run(0), []

    def accept(self, tokens: engine_pb2.RunTokens | TokenRun) -> tuple[Restarted | None, TokenRun | None]:
        """What to send for these tokens. Raises ValueError if they do not follow those before."""
        if tokens.first_token != self._seen:
            raise ValueError(f"tokens from {tokens.first_token} after {self._seen}")
        start, self._seen = self._seen, self._seen + len(tokens.token_ids)
        if self._repeat is None:
            return None, self._send(self._run(start, tokens.token_ids, tokens.text, tokens.logprobs))
        repeat = self._repeat
        repeat.token_ids.extend(tokens.token_ids)
        repeat.logprobs.extend(tokens.logprobs)
        self._repeat_texts.append(tokens.text)
        before = self.sent[start : self._seen]
        differs = before != tokens.token_ids[: len(before)]
        if not differs and self._seen < len(self.sent):
            return None, None
        self._repeat, repeat.text = None, "".join(self._repeat_texts)
        return self._replace(repeat) if differs else (None, self.rest(repeat))

    def finish(self, output: types_pb2.Output) -> tuple[Restarted | None, TokenRun | None]:
        """What to send before this output of the running attempt, if it does not begin with the sent tokens. Raises ValueError
        if the output is not what the attempt streamed."""
        streamed = self.sent if self._repeat is None else self._repeat.token_ids
        if streamed != output.token_ids[: len(streamed)]:
            raise ValueError("an output that is not what was streamed")
        if self.sent == output.token_ids[: len(self.sent)]:
            return None, None
        return self._replace(self._run(0, output.token_ids, output.text, output.logprobs))

    def so_far(self) -> TokenRun | None:
        """All sent tokens, for a caller that joins; None: there are none."""
        return self._run(0, self.sent, "".join(self.texts), self.logprobs) if self.sent else None

    def rest(self, output: types_pb2.Output | TokenRun) -> TokenRun | None:
        """The part of an output after the sent tokens, with which it begins; None: there is none."""
        start, text = len(self.sent), output.text[sum(map(len, self.texts)) :]
        run = self._run(start, output.token_ids[start:], text, output.logprobs[start:])
        return self._send(run) if run.token_ids or run.text else None

    def _replace(self, run: TokenRun) -> tuple[Restarted, TokenRun | None]:
        """The attempt from its token 0, in place of the sent tokens; it may have none."""
        self.sent, self.texts, self.logprobs, self._repeat = [], [], [], None
        restarted = Restarted(sequence=self.sequence, attempt=self.attempt)
        return restarted, self._send(run) if run.token_ids or run.text else None

    def _run(
        self, first: int, token_ids: Iterable[int] = (), text: str = "", logprobs: Iterable[types_pb2.TokenLogprobs] = ()
    ) -> TokenRun:
        return TokenRun(
            sequence=self.sequence,
            attempt=self.attempt,
            first_token=first,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
        )

    def _send(self, run: TokenRun) -> TokenRun:
        self.sent.extend(run.token_ids)
        self.texts.append(run.text)
        if run.logprobs:
            self.logprobs.extend(run.logprobs)
        return run
