"""What was sent of one item's tokens, so that a second attempt, or a second connection, can go on behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

_Tokens = engine_pb2.RunTokens | generation_pb2.TokenRun | types_pb2.Output
_NONE = engine_pb2.RunTokens()


@dataclass(slots=True)
class Progress:
    """Tokens of the running attempt against those that were sent.

    While an attempt repeats what was sent, nothing leaves. At the first other token it is sent from its token 0, behind a
    Restarted. Equal tokens make equal text, so texts are cut by length.
    """

    sequence: int
    attempt: int = 1
    sent: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """What the newest lost attempt had sent: what a recovery comparison compares."""
    _seen: int = 0
    _repeat: generation_pb2.TokenRun | None = None
    """This attempt from its token 0, while it has not got beyond what was sent; without its text."""
    _repeat_texts: list[str] = field(default_factory=list)
    """Apart: a message keeps every text that it was ever given."""

    def restart(self, attempt: int) -> None:
        """A new attempt begins at token 0."""
        self.lost, self.attempt, self._seen = list(self.sent), attempt, 0
        self._repeat, self._repeat_texts = self._run(0, _NONE), []

    def accept(
        self, tokens: engine_pb2.RunTokens | generation_pb2.TokenRun
    ) -> tuple[generation_pb2.Restarted | None, generation_pb2.TokenRun | None]:
        """What a listener is to be sent. Raises ValueError if these tokens do not follow those before."""
        if tokens.first_token != self._seen:
            raise ValueError(f"tokens from {tokens.first_token} after {self._seen}")
        start, self._seen = self._seen, self._seen + len(tokens.token_ids)
        if self._repeat is None:
            return None, self._send(self._run(start, tokens))
        self._repeat.token_ids.extend(tokens.token_ids)
        self._repeat.logprobs.extend(tokens.logprobs)
        self._repeat_texts.append(tokens.text)
        before = self.sent[start : self._seen]
        if before != tokens.token_ids[: len(before)]:
            self._repeat.text = "".join(self._repeat_texts)
            return self._anew(self._repeat)
        return None, self._beyond(self._repeat)

    def finish(self, output: types_pb2.Output) -> tuple[generation_pb2.Restarted | None, generation_pb2.TokenRun | None]:
        """What a listener is to be sent before this output of the running attempt, if it did not repeat all that was sent.
        Raises ValueError if the output is not what the attempt streamed."""
        streamed = self.sent if self._repeat is None else self._repeat.token_ids
        if streamed != output.token_ids[: len(streamed)]:
            raise ValueError("an output that is not what was streamed")
        if self.sent == output.token_ids[: len(self.sent)]:
            return None, None
        return self._anew(self._run(0, output))

    def so_far(self) -> generation_pb2.TokenRun | None:
        """All that was sent, for somebody who comes later; None: nothing."""
        if not self.sent:
            return None
        so_far = engine_pb2.RunTokens(token_ids=self.sent, text="".join(self.texts), logprobs=self.logprobs)
        return self._run(0, so_far)

    def rest(self, output: types_pb2.Output | generation_pb2.TokenRun) -> generation_pb2.TokenRun | None:
        """What the output has beyond all that was sent, which is how it begins; None: nothing."""
        start = len(self.sent)
        beyond = types_pb2.Output(
            token_ids=output.token_ids[start:], text=output.text[sum(map(len, self.texts)) :], logprobs=output.logprobs[start:]
        )
        run = self._run(start, beyond)
        return self._send(run) if run.token_ids or run.text else None

    def _anew(self, run: generation_pb2.TokenRun) -> tuple[generation_pb2.Restarted, generation_pb2.TokenRun | None]:
        """The attempt from its token 0, in place of all that was sent; it may be that it made nothing."""
        self.sent, self.texts, self.logprobs, self._repeat = [], [], [], None
        restarted = generation_pb2.Restarted(sequence=self.sequence, attempt=self.attempt)
        return restarted, self._send(run) if run.token_ids or run.text else None

    def _beyond(self, repeat: generation_pb2.TokenRun) -> generation_pb2.TokenRun | None:
        """What the repetition has beyond what was sent, once it got there."""
        if self._seen < len(self.sent):
            return None
        self._repeat, repeat.text = None, "".join(self._repeat_texts)
        return self.rest(repeat)

    def _run(self, first_token: int, tokens: _Tokens) -> generation_pb2.TokenRun:
        return generation_pb2.TokenRun(
            sequence=self.sequence,
            attempt=self.attempt,
            first_token=first_token,
            token_ids=tokens.token_ids,
            text=tokens.text,
            logprobs=tokens.logprobs,
        )

    def _send(self, run: generation_pb2.TokenRun) -> generation_pb2.TokenRun:
        self.sent.extend(run.token_ids)
        self.texts.append(run.text)
        if run.logprobs:
            self.logprobs.extend(run.logprobs)
        return run
