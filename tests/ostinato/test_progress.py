"""What a listener hears of attempts that are lost: whatever is cut where, it ends with the last attempt's answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.resume import Progress
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

SEQUENCE, TOKENS_MAX, END = 7, 8, 9


def whole(tokens: list[int]) -> list[int]:
    """As an engine makes them: to the first end, or to the limit."""
    return [*tokens[: tokens.index(END)], END] if END in tokens else (tokens * TOKENS_MAX)[:TOKENS_MAX]


def text(tokens: list[int]) -> str:
    """All text that these tokens let out: a 0 may begin a stop string, and is held back until something follows."""
    written = "".join("aé汉"[token] for token in tokens if token != END)
    ended = len(tokens) == TOKENS_MAX or END in tokens
    return written if ended else written.rstrip("a")


def logprobs(tokens: list[int]) -> list[types_pb2.TokenLogprobs]:
    return [types_pb2.TokenLogprobs(logprob=-token) for token in tokens]


def output(tokens: list[int]) -> types_pb2.Output:
    return types_pb2.Output(token_ids=tokens, text=text(tokens), logprobs=logprobs(tokens))


def runs(tokens: list[int], cuts: list[int]) -> list[engine_pb2.RunTokens]:
    """The tokens in as many pieces as the cuts make of them."""
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


@dataclass
class Listener:
    """Obeys Restarted, and takes nothing that is missing something before it or comes twice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)

    def hear(self, restarted: generation_pb2.Restarted | None, run: generation_pb2.TokenRun | None) -> None:
        if restarted is not None:
            assert restarted.sequence == SEQUENCE
            self.restarts.append(restarted.attempt)
            self.tokens, self.text, self.logprobs = [], "", []
        if run is not None:
            assert run.sequence == SEQUENCE
            assert run.token_ids or run.text, "a run that says nothing"
            assert run.first_token == len(self.tokens)
            self.tokens.extend(run.token_ids)
            self.text += run.text
            self.logprobs.extend(run.logprobs)


token_lists = st.lists(st.sampled_from([0, 0, 1, 1, 2, END]), min_size=1, max_size=TOKENS_MAX).map(whole)
cut_lists = st.lists(st.integers(0, TOKENS_MAX), max_size=4)


@st.composite
def attempts(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Tokens and cuts of up to four attempts, most of which make what the first one made; all but the last are lost midway,
    some before their first token or with nobody listening."""
    first = draw(token_lists)
    made = [first, *draw(st.lists(st.one_of(st.just(first), token_lists), max_size=3))]
    lost = [tokens[: draw(st.integers(0, len(tokens)))] for tokens in made[:-1]]
    return [(tokens, draw(cut_lists)) for tokens in (*lost, made[-1])]


@given(attempts())
def test_the_listener_ends_with_the_last_attempt(tried: list[tuple[list[int], list[int]]]) -> None:
    """Tokens, text and logprobs are the last attempt's, with no gap and no repetition on the way; a Restarted came only where
    something that had been sent was not made again."""
    progress, listener = Progress(SEQUENCE), Listener()
    needless = True
    for number, (tokens, cuts) in enumerate(tried, start=1):
        if number > 1:
            progress.restart(number)
        heard = list(listener.tokens)
        for piece in runs(tokens, cuts):
            listener.hear(*progress.accept(piece))
            sofar = Listener()
            sofar.hear(None, progress.so_far())
            assert (sofar.tokens, sofar.text, sofar.logprobs) == (listener.tokens, listener.text, listener.logprobs)
        needless = needless and heard[: len(tokens)] == tokens[: len(heard)]
    final = tried[-1][0]
    listener.hear(*progress.finish(output(final)))

    assert (listener.tokens, listener.text, listener.logprobs) == (final, text(final), logprobs(final))
    assert bool(listener.restarts) == (not needless)
    assert listener.restarts == sorted(set(listener.restarts)), "once an attempt at most"


@given(attempts())
def test_an_attempt_that_nobody_streamed(tried: list[tuple[list[int], list[int]]]) -> None:
    """A last attempt of which only the output is known takes back what was sent, if that is not its beginning."""
    progress, listener = Progress(SEQUENCE), Listener()
    for number, (tokens, cuts) in enumerate(tried, start=1):
        if number > 1:
            progress.restart(number)
        for piece in runs(tokens, cuts):
            listener.hear(*progress.accept(piece))
    final = whole([1, END])
    progress.restart(len(tried) + 1)
    before = list(listener.tokens)

    restarted, run = progress.finish(output(final))
    listener.hear(restarted, run)

    assert listener.tokens == final[: len(listener.tokens)]
    assert (restarted is None) == (before == final[: len(before)])
    assert restarted is None or listener.tokens == final


def test_equal_tokens_go_on_behind_what_was_sent() -> None:
    """The second attempt says nothing until it is beyond the first, and no Restarted."""
    progress = Progress(SEQUENCE)
    first, second = [1, 2, 1], [1, 2, 1, 2, END]
    for piece in runs(first, []):
        progress.accept(piece)
    progress.restart(2)

    said = [progress.accept(piece) for piece in runs(second, [2, 4])]

    assert said[0] == (None, None)
    assert said[1] == (
        None,
        generation_pb2.TokenRun(sequence=SEQUENCE, attempt=2, first_token=3, token_ids=[2], text="汉", logprobs=logprobs([2])),
    )
    assert progress.lost == first


def test_other_tokens_come_from_the_first_on() -> None:
    """At the first other token all of the second attempt is sent, behind a Restarted."""
    progress = Progress(SEQUENCE)
    for piece in runs([1, 2, 1], []):
        progress.accept(piece)
    progress.restart(2)
    progress.accept(runs([1, 2, 2], [1, 2])[0])

    restarted, run = progress.accept(
        engine_pb2.RunTokens(first_token=1, token_ids=[2, 2], text="汉汉", logprobs=logprobs([2, 2]))
    )

    assert restarted == generation_pb2.Restarted(sequence=SEQUENCE, attempt=2)
    assert run is not None and (run.first_token, list(run.token_ids), run.text) == (0, [1, 2, 2], "é汉汉")


def test_a_shorter_second_answer() -> None:
    """An attempt that ends before it has repeated all that was sent takes the rest back."""
    progress, listener = Progress(SEQUENCE), Listener()
    for piece in runs([1, 2, 1, 2], []):
        listener.hear(*progress.accept(piece))
    progress.restart(2)
    listener.hear(*progress.accept(runs([1, 2], [])[0]))

    listener.hear(*progress.finish(output([1, 2])))

    assert (listener.tokens, listener.restarts) == ([1, 2], [2])


def test_a_second_answer_of_nothing() -> None:
    """An attempt that makes nothing takes back what was sent, and sends no run of nothing."""
    progress = Progress(SEQUENCE)
    progress.accept(runs([1], [])[0])
    progress.restart(2)

    assert progress.finish(types_pb2.Output()) == (generation_pb2.Restarted(sequence=SEQUENCE, attempt=2), None)


def test_nothing_was_sent() -> None:
    """Who comes before the first token gets nothing; what is lost with nothing sent compares nothing."""
    progress = Progress(SEQUENCE)
    assert progress.so_far() is None
    progress.restart(2)
    assert progress.lost == []
    assert progress.accept(runs([1], [])[0])[1] is not None


@pytest.mark.parametrize("attempt", [1, 2])
def test_tokens_out_of_place(attempt: int) -> None:
    """A gap, or tokens that come again, are the service's fault."""
    for first_token in (0, 2):
        progress = Progress(SEQUENCE)
        progress.accept(runs([1], [])[0])
        if attempt == 2:
            progress.restart(2)
            progress.accept(runs([1], [])[0])
        with pytest.raises(ValueError, match=f"tokens from {first_token} after 1"):
            progress.accept(engine_pb2.RunTokens(first_token=first_token, token_ids=[1]))


def test_an_output_that_was_not_streamed() -> None:
    """An output that does not begin with what its own attempt streamed is the service's fault."""
    progress = Progress(SEQUENCE)
    progress.accept(runs([1, 2], [])[0])
    with pytest.raises(ValueError, match="not what was streamed"):
        progress.finish(output([1, 1]))
    progress.restart(2)
    progress.accept(runs([1], [])[0])
    with pytest.raises(ValueError, match="not what was streamed"):
        progress.finish(output([2]))


def test_other_tokens_are_the_new_attempts() -> None:
    """What is sent behind a Restarted says which attempt made it."""
    progress = Progress(SEQUENCE)
    progress.accept(engine_pb2.RunTokens(token_ids=[1], text="é"))
    progress.restart(2)
    restarted, run = progress.accept(engine_pb2.RunTokens(token_ids=[2], text="汉"))
    assert restarted is not None
    assert run is not None
    assert (restarted.attempt, run.attempt) == (2, 2)
