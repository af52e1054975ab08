"""Answer against an oracle that searches the whole text, and single edge cases."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from ostinato.v1 import types_pb2

from service.answer import Answer

END = 256
CONTROL = 257
F = types_pb2.FinishReason


class Bytes:
    """A vocabulary of one token per byte, an end token, a control token and some longer pieces."""

    size = 300
    end_ids = frozenset({END})

    def __init__(self, longer: list[bytes] | None = None) -> None:
        given = [bytes([value]) for value in range(256)] + [b"", b""] + (longer or [])
        self.pieces: Sequence[bytes] = given + [b""] * (self.size - len(given))
        names = {END: b"<end>", CONTROL: b"<\xc3\xa9>"}
        self.written: Sequence[bytes] = [names.get(token_id, piece) for token_id, piece in enumerate(self.pieces)]


@dataclass(frozen=True)
class Case:
    tokens: list[int]
    longer: list[bytes]
    stops: list[str]
    stop_ids: list[int]
    ignore_eos: bool
    least: int
    most: int
    include_stop: bool = False
    keep: bool = False
    takes: list[bool] = field(default_factory=list)

    @property
    def parameters(self) -> types_pb2.ResolvedParameters:
        return types_pb2.ResolvedParameters(
            stop=self.stops, stop_token_ids=self.stop_ids, ignore_eos=self.ignore_eos, min_new_tokens=self.least,
            max_new_tokens=self.most, include_stop=self.include_stop, keep_special_tokens=self.keep,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Texts over a small alphabet with characters of 1 to 4 bytes, cut into tokens anywhere, now and then broken."""
    text = draw(st.text(alphabet="abé龘🧬", max_size=12)).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    longer = [text[a:b] for a, b in itertools.pairwise(cuts)]
    tokens = [258 + i for i in range(len(longer))]
    for odd in draw(st.lists(st.sampled_from([END, CONTROL, 0xC3, 0xFF, 0x61]), max_size=3)):
        tokens.insert(draw(st.integers(0, len(tokens))), odd)
    tokens.append(0x62)
    most = draw(st.integers(1, len(tokens)))
    return Case(
        tokens=tokens,
        longer=longer,
        stops=draw(st.lists(st.text(alphabet="abé龘🧬\ufffd", min_size=1, max_size=4), max_size=3, unique=True)),
        stop_ids=draw(st.lists(st.sampled_from([0x61, 0x62, 258, END]), max_size=2, unique=True)),
        ignore_eos=draw(st.booleans()),
        least=draw(st.integers(0, most)),
        most=most,
        include_stop=draw(st.booleans()),
        keep=draw(st.booleans()),
        takes=draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))),
    )


def oracle(case: Case) -> tuple[int, str, int, str]:
    """Tokens, text, reason and matched stop, by decoding and searching the whole text anew after every token."""
    vocabulary, data, open_from = Bytes(case.longer), b"", 0
    for made, token in enumerate(case.tokens, start=1):
        reason = F.FINISH_REASON_LENGTH if made >= case.most else 0
        if made > case.least and token in case.stop_ids:
            reason = F.FINISH_REASON_STOP_TOKEN
        if made > case.least and token == END and not case.ignore_eos:
            reason = F.FINISH_REASON_END_OF_SEQUENCE
        if case.include_stop or reason not in (F.FINISH_REASON_END_OF_SEQUENCE, F.FINISH_REASON_STOP_TOKEN):
            data += (vocabulary.written if case.keep else vocabulary.pieces)[token]
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, bool(reason))
        if made <= case.least:
            open_from = len(text)
        matches = [
            (start + len(stop), -len(stop), stop)
            for stop in case.stops
            for start in range(open_from, len(text))
            if text.startswith(stop, start)
        ]
        if matches:
            end, length, stop = min(matches)
            return made, text[: end + (0 if case.include_stop else length)], F.FINISH_REASON_STOP_STRING, stop
        if reason:
            return made, text, reason, ""
    raise AssertionError("max_new_tokens ends every answer")


def run(case: Case) -> tuple[Answer, list[str], list[int], int]:
    answer, made = Answer(case.parameters, Bytes(case.longer)), 0
    texts: list[str] = []
    ids: list[int] = []
    for token, take in zip(case.tokens, case.takes, strict=True):
        made += 1
        complete = answer.accept(token)
        if (take or complete) and (delta := answer.take()):
            assert delta.first_token == len(ids)
            texts.append(delta.text)
            ids += delta.token_ids
        if complete:
            break
    return answer, texts, ids, made


def finish(answer: Answer) -> types_pb2.Output:
    output = types_pb2.Output()
    answer.put_into(output)
    return output


@given(cases())
def test_equals_whole_text_search(case: Case) -> None:
    """However tokens divide the text, text, ids, reason and matched stop are those of a search in the whole text."""
    made, text, reason, stop = oracle(case)

    answer, _, _, used = run(case)
    output = finish(answer)

    assert (used, output.text, output.finish_reason, output.matched_stop) == (made, text, reason, stop)
    assert list(output.token_ids) == case.tokens[:made]


@given(cases())
def test_deltas_concatenate_to_the_output(case: Case) -> None:
    """The texts and ids of all takes together are the output's, whenever `take` is called: none is ever taken back."""
    answer, texts, ids, _ = run(case)

    output = finish(answer)

    assert "".join(texts) == output.text
    assert ids == list(output.token_ids)
    assert answer.take() is None


def made_of(text: str, **parameters: object) -> types_pb2.Output:
    answer = Answer(types_pb2.ResolvedParameters(max_new_tokens=100, **parameters), Bytes())  # type: ignore[arg-type]
    for token in [*text.encode(), END]:
        if answer.accept(token):
            break
    return finish(answer)


def test_first_completed_stop_wins() -> None:
    """The stop string that is complete first ends the answer, although another began before it."""
    assert made_of("xabcd", stop=["abcd", "c"]).text == "xab"


def test_what_ended_the_answer_is_text_on_request() -> None:
    """With include_stop the stop string is in the text; with kept control tokens, so is the token that ended the answer."""
    assert made_of("xabc", stop=["b"], include_stop=True).text == "xab"
    assert made_of("x", include_stop=True, keep_special_tokens=True).text == "x<end>"
    assert made_of("x", keep_special_tokens=True).text == "x"


def test_longest_of_those_completed_together_wins() -> None:
    """Of stop strings that one character completes, the longest is cut out."""
    output = made_of("xabc", stop=["c", "bc", "zbc"])

    assert (output.text, output.matched_stop) == ("xa", "bc")


def test_held_text_comes_with_the_end() -> None:
    """The beginning of a stop string is held, and delivered when the answer ends without the rest."""
    answer = Answer(types_pb2.ResolvedParameters(max_new_tokens=9, stop=["abc"]), Bytes())
    texts = []
    for token in [0x78, 0x61, 0x62, END]:
        answer.accept(token)
        delta = answer.take()
        texts.append(delta.text if delta else None)

    assert texts == ["x", "", "", "ab"]


def test_logprobs_go_with_their_tokens() -> None:
    """Each take has the logprobs of its own tokens; the output has all."""
    answer = Answer(types_pb2.ResolvedParameters(max_new_tokens=2, logprobs=0), Bytes())
    answer.accept(0x61, types_pb2.TokenLogprobs(logprob=-1))
    first = answer.take()
    answer.accept(0x62, types_pb2.TokenLogprobs(logprob=-2))

    assert first
    assert [p.logprob for p in first.logprobs] == [-1]
    assert [p.logprob for p in finish(answer).logprobs] == [-1, -2]


def test_cost_per_token_is_flat() -> None:
    """A hundred thousand tokens with takes and sixteen long stop strings pass in seconds: no work grows with the answer."""
    stops = [chr(97 + i) * 200 + "!" for i in range(16)]
    answer = Answer(types_pb2.ResolvedParameters(max_new_tokens=100_000, stop=stops), Bytes())
    while not answer.accept(97 + len(answer) // 150 % 16):
        answer.take()

    assert len(finish(answer).text) == 100_000
