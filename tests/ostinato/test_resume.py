"""Keyed streams over lost connections: the caller gets everything once. And attempts that repeat or differ."""

from __future__ import annotations

from collections import defaultdict
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.resume import Progress, StreamResume
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2
from ostinato.v1.generation_pb2 import GenerateEvent

from tests.ostinato.fake import LOG_ID, talking

LETTERS = "abé汉"
STAMP = types_pb2.Stamp(log_id=LOG_ID, writer="w", epoch=1, first_sequence=5, count=2)
SEQUENCES = (5, 6)


def _text(ids: list[int]) -> str:
    return "".join(LETTERS[each] for each in ids)


def _admitted() -> GenerateEvent:
    return GenerateEvent(admitted=generation_pb2.Admitted(stamp=STAMP))


def _tokens(sequence: int, ids: list[int], first: int, attempt: int = 1) -> GenerateEvent:
    run = generation_pb2.TokenRun(
        sequence=sequence, attempt=attempt, first_token=first, token_ids=ids[first:], text=_text(ids[first:])
    )
    return GenerateEvent(tokens=generation_pb2.Tokens(runs=[run]))


def _finished(sequence: int, ids: list[int], attempt: int = 1) -> GenerateEvent:
    output = types_pb2.Output(text=_text(ids), token_ids=ids)
    return GenerateEvent(finished=types_pb2.Result(sequence=sequence, output=output, attempt=attempt))


@dataclass
class Heard:
    """What a caller has of an item. Obeys Restarted, and fails on gaps and repetitions."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    ended: list[int] | None = None

    def hear(self, restarted: generation_pb2.Restarted | None, run: generation_pb2.TokenRun | None) -> None:
        if restarted is not None:
            self.restarts.append(restarted.attempt)
            self.ids, self.text, self.logprobs = [], "", []
        if run is not None:
            assert self.ended is None
            assert run.first_token == len(self.ids), "a gap, or a repetition"
            assert run.token_ids or run.text, "a run of nothing"
            assert not self.restarts or self.ids or run.attempt == self.restarts[-1]
            self.ids.extend(run.token_ids)
            self.text += run.text
            self.logprobs.extend(run.logprobs)


@dataclass
class Listener:
    """A caller of a batch."""

    admitted: int = 0
    heard: defaultdict[int, Heard] = field(default_factory=lambda: defaultdict(Heard))

    def hear(self, event: GenerateEvent) -> None:
        match event.WhichOneof("event"):
            case "admitted":
                self.admitted += 1
            case "tokens":
                for run in event.tokens.runs:
                    self.heard[run.sequence].hear(None, run)
            case "restarted":
                self.heard[event.restarted.sequence].hear(event.restarted, None)
            case "finished":
                item = self.heard[event.finished.sequence]
                assert item.ended is None
                item.ended = list(event.finished.output.token_ids)

    @property
    def ended(self) -> dict[int, list[int]]:
        return {sequence: item.ended for sequence, item in self.heard.items() if item.ended is not None}


@st.composite
def _connections(draw: st.DrawFn) -> tuple[list[list[GenerateEvent]], dict[int, list[int]]]:
    """The events of each connection, and the outputs. A later connection may have another attempt with other tokens, send the
    beginning at once, in pieces, or not at all, and end anywhere; the last one ends the batch."""
    ids = st.lists(st.integers(0, 3), max_size=6)
    count = draw(st.integers(1, 4))
    outputs = {sequence: draw(ids) for sequence in SEQUENCES}
    ended: set[int] = set()
    connections = []
    for number in range(1, count + 1):
        told = [_admitted()]
        for sequence in SEQUENCES:
            final = number == count or sequence in ended or draw(st.booleans())
            tokens = outputs[sequence] if final or draw(st.booleans()) else draw(ids)
            streamed = draw(st.booleans()) and sequence not in ended
            cuts = sorted({0, *draw(st.lists(st.integers(0, len(tokens)), max_size=3))})
            if streamed and (number == 1 or tokens):
                told += [
                    _tokens(sequence, tokens[:end], start, number)
                    for start, end in zip(cuts, [*cuts[1:], len(tokens)], strict=True)
                    if end > start
                ]
            if final:
                ended.add(sequence)
                told.append(_finished(sequence, tokens, number))
        connections.append(told if number == count else told[: draw(st.integers(0, len(told)))])
    return connections, outputs


@given(_connections())
def test_everything_is_told_once(told: tuple[list[list[GenerateEvent]], dict[int, list[int]]]) -> None:
    """However often a stream breaks, and whatever each connection repeats, leaves out or generates again: Admitted comes once,
    tokens follow each other without gaps or repetitions, each item ends once, and after a loss all its tokens have come."""
    connections, outputs = told
    listener, hears = Listener(), StreamResume()
    for number, events in enumerate(connections):
        if number:
            hears.connection_lost()
        for event in events:
            before = set(listener.ended)
            for new in hears.take(event):
                listener.hear(new)
            for sequence in set(listener.ended) - before:
                if number:
                    item = listener.heard[sequence]
                    assert (item.ids, item.text) == (outputs[sequence], _text(outputs[sequence]))

    assert listener.admitted == 1
    assert listener.ended == outputs
    assert hears.complete


def test_an_unbroken_stream_passes_as_it_is() -> None:
    """Without a loss the events pass unchanged."""
    other = generation_pb2.Restarted(sequence=6, attempt=2)
    events = [
        _admitted(),
        _tokens(5, [0, 1], 0),
        _tokens(6, [2], 0),
        GenerateEvent(restarted=other),
        _tokens(6, [3, 3], 0, 2),
        _finished(5, [0, 1]),
        _finished(6, [3, 3], 2),
    ]
    told = StreamResume()
    assert [new for event in events for new in told.take(event)] == events


@pytest.mark.parametrize(
    "wrong",
    [
        _tokens(5, [0, 1, 2], 2),
        GenerateEvent(admitted=generation_pb2.Admitted(stamp=types_pb2.Stamp(log_id=LOG_ID, first_sequence=9, count=2))),
    ],
    ids=["a gap", "another batch"],
)
def test_what_cannot_follow_is_an_error(wrong: GenerateEvent) -> None:
    """Missing tokens, or another batch for the key, raise Internal."""
    told = StreamResume()
    assert list(told.take(_admitted()))
    told.connection_lost()
    with pytest.raises(errors.Internal, match="contradicts those before it"):
        list(told.take(wrong))


async def test_a_lost_stream_is_joined() -> None:
    """Over a socket, a stream that breaks after its second token, and again before a new one, continues with the third."""

    def lost(*events: GenerateEvent) -> list[object]:
        return [*events, errors.Draining("going", retry_after=0.01)]

    async with talking() as (fake, client):
        stamp = types_pb2.Stamp(log_id=LOG_ID, first_sequence=5, count=1)
        admitted = GenerateEvent(admitted=generation_pb2.Admitted(stamp=stamp))
        fake.script["GenerateStream"].extend(
            [
                lost(admitted, _tokens(5, [0, 1], 0)),
                lost(admitted),
                lost(admitted, _tokens(5, [0], 0)),
                [admitted, _tokens(5, [0, 1, 2], 0), _finished(5, [0, 1, 2, 3])],
            ]
        )
        async with aclosing(client.stream("a", key="k", timeout=60)) as events:
            heard = [event async for event in events]

    assert heard == [
        admitted,
        _tokens(5, [0, 1], 0),
        _tokens(5, [0, 1, 2], 2),
        _tokens(5, [0, 1, 2, 3], 3),
        _finished(5, [0, 1, 2, 3]),
    ]
    assert fake.count("GenerateStream") == 4


async def test_a_loss_behind_the_last_word_is_none() -> None:
    """A stream that breaks after the end of every item ends without an error."""
    async with talking() as (fake, client):
        events = [_admitted(), _finished(5, [0]), _finished(6, [1])]
        fake.script["GenerateStream"].append([*events, errors.Internal("at the end")])
        async with aclosing(client.stream(["a", "b"], key="k")) as source:
            assert [event async for event in source] == events


# ---- Progress: attempts that are lost and repeated


SEQUENCE, TOKENS_MAX, END = 7, 8, 9


def whole(tokens: list[int]) -> list[int]:
    """Tokens as an engine generates them: up to the first END, or to the limit."""
    return [*tokens[: tokens.index(END)], END] if END in tokens else (tokens * TOKENS_MAX)[:TOKENS_MAX]


def text(tokens: list[int]) -> str:
    """The text for these tokens; that of a 0 is held back until another token follows, as a stop string's would be."""
    written = "".join("aé汉"[token] for token in tokens if token != END)
    ended = len(tokens) == TOKENS_MAX or END in tokens
    return written if ended else written.rstrip("a")


def logprobs(tokens: list[int]) -> list[types_pb2.TokenLogprobs]:
    return [types_pb2.TokenLogprobs(logprob=-token) for token in tokens]


def output(tokens: list[int]) -> types_pb2.Output:
    return types_pb2.Output(token_ids=tokens, text=text(tokens), logprobs=logprobs(tokens))


def runs(tokens: list[int], cuts: list[int]) -> list[engine_pb2.RunTokens]:
    """The tokens as runs, cut at these places."""
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    return [
        engine_pb2.RunTokens(
            first_token=start,
            token_ids=tokens[start:stop],
            text=text(tokens[:stop])[len(text(tokens[:start])) :],
            logprobs=logprobs(tokens[start:stop]),
        )
        for start, stop in pairwise(edges)
    ]


token_lists = st.lists(st.sampled_from([0, 0, 1, 1, 2, END]), min_size=1, max_size=TOKENS_MAX).map(whole)
cut_lists = st.lists(st.integers(0, TOKENS_MAX), max_size=4)


@st.composite
def attempts(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Tokens and cuts of up to four attempts, most of which repeat the first. All but the last are lost midway, some before
    their first token or without a stream."""
    first = draw(token_lists)
    made = [first, *draw(st.lists(st.one_of(st.just(first), token_lists), max_size=3))]
    lost = [tokens[: draw(st.integers(0, len(tokens)))] for tokens in made[:-1]]
    return [(tokens, draw(cut_lists)) for tokens in (*lost, made[-1])]


@given(attempts(), st.booleans())
def test_the_listener_ends_with_the_last_attempt(tried: list[tuple[list[int], list[int]]], streamed: bool) -> None:
    """The caller ends with tokens, text and logprobs of the last attempt, without gaps or repetitions. A Restarted comes
    only if a sent token was not repeated. Of a last attempt of which only the output is known, the caller has no more than was
    sent, unless Restarted comes."""
    progress, listener = Progress(SEQUENCE), Heard()
    needless = True
    for number, (tokens, cuts) in enumerate(tried, start=1):
        heard = list(listener.ids)
        if number > 1:
            progress.restart(number)
            assert progress.lost == heard
        for piece in runs(tokens, cuts) if streamed or number < len(tried) else ():
            listener.hear(*progress.accept(piece))
            sofar = Heard()
            sofar.hear(None, progress.so_far())
            assert (sofar.ids, sofar.text, sofar.logprobs) == (listener.ids, listener.text, listener.logprobs)
        needless = needless and heard[: len(tokens)] == tokens[: len(heard)]
    final = tried[-1][0]
    sent = list(listener.ids)
    restarted, run = progress.finish(output(final))
    listener.hear(restarted, run)

    told = final if streamed or restarted is not None else sent
    assert (listener.ids, listener.logprobs) == (told, logprobs(told))
    assert told == final[: len(told)]
    assert listener.text == text(final) or told != final
    assert bool(listener.restarts) == (not needless)
    assert listener.restarts == sorted(set(listener.restarts)), "once an attempt at most"


def test_attempts_without_tokens() -> None:
    """Before the first token there is nothing to send to a caller that joins, and nothing to compare. An attempt without tokens
    sends Restarted and no empty run."""
    progress = Progress(SEQUENCE)
    assert progress.so_far() is None
    progress.restart(2)
    assert progress.lost == []
    assert progress.accept(runs([1], [])[0])[1] is not None
    progress.restart(3)
    assert progress.finish(types_pb2.Output()) == (generation_pb2.Restarted(sequence=SEQUENCE, attempt=3), None)


@pytest.mark.parametrize("attempt", [1, 2])
def test_tokens_out_of_place(attempt: int) -> None:
    """A gap, or repeated tokens, raise ValueError."""
    for first_token in (0, 2):
        progress = Progress(SEQUENCE)
        progress.accept(runs([1], [])[0])
        if attempt == 2:
            progress.restart(2)
            progress.accept(runs([1], [])[0])
        with pytest.raises(ValueError, match=f"tokens from {first_token} after 1"):
            progress.accept(engine_pb2.RunTokens(first_token=first_token, token_ids=[1]))


def test_an_output_that_was_not_streamed() -> None:
    """An output that does not begin with its attempt's streamed tokens raises ValueError."""
    progress = Progress(SEQUENCE)
    progress.accept(runs([1, 2], [])[0])
    with pytest.raises(ValueError, match="not what was streamed"):
        progress.finish(output([1, 1]))
    progress.restart(2)
    progress.accept(runs([1], [])[0])
    with pytest.raises(ValueError, match="not what was streamed"):
        progress.finish(output([2]))
