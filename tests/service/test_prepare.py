"""Prepare: bad fields by their paths, good items in their one canonical form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import Cancelled, InvalidRequest
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from service.answer import Answer
from service.bounds import Limits
from service.engines.scripted import BEGIN, CONTROLS, END, ByteVocabulary
from service.prepare import FORMATS_MAX, RECEIPT_BYTES, Lexicon, Preparer, result_bytes

LIMITS = Limits(
    context_tokens=200, new_tokens_max=199, top_k_max=1024, batch_items_max=4, prompt_bytes_max=1000, render_seconds_max=5
)
INF, NAN = math.inf, math.nan
A_REGEX = types_pb2.ResponseFormat(regex="a+")


def check_format(constraint: types_pb2.ResponseFormat) -> None:
    if "bad" in constraint.regex + constraint.json_schema:
        raise ValueError("cannot be obeyed")


def preparer(
    vocabulary: Any = None, limits: Limits = LIMITS, check: Callable[[Any], None] = check_format, *, chat: bool = True
) -> Preparer:
    return Preparer(vocabulary or ByteVocabulary(), limits, check, b"m" * 32, chat=chat)


def prepare(*items: types_pb2.Item, **parameters: Any) -> engine_pb2.PrepareResponse:
    return preparer().prepare(engine_pb2.PrepareRequest(items=items, parameters=types_pb2.Parameters(**parameters)))


def item(text: str | None = "hi", **parameters: Any) -> types_pb2.Item:
    return types_pb2.Item(text=text, parameters=types_pb2.Parameters(**parameters))


def paths(*items: types_pb2.Item, **parameters: Any) -> list[str]:
    """Fields of all violations, in order; each has a description."""
    with pytest.raises(InvalidRequest) as caught:
        prepare(*items, **parameters)
    assert all(violation.description for violation in caught.value.violations)
    return [violation.field for violation in caught.value.violations]


def only(*items: types_pb2.Item, **parameters: Any) -> types_pb2.ResolvedParameters:
    return prepare(*items, **parameters).items[0].parameters


def test_defaults() -> None:
    """Parameters that are not given get the contract's defaults."""
    assert only(item()) == types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=128)


def test_default_length_is_what_the_context_leaves() -> None:
    """Where 128 tokens do not fit, the default is as many as fit."""
    prepared = prepare(types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[1] * 150))).items[0]

    assert (prepared.parameters.max_new_tokens, prepared.kv_tokens) == (50, 200)


def test_item_wins_field_by_field() -> None:
    """An item's field replaces the batch's, lists and zeros included; others stay. A seed is there only if it was given."""
    batch: dict[str, Any] = {"temperature": 0.5, "top_k": 7, "seed": 5, "stop": ["x"], "stop_token_ids": [3], "logprobs": 4}
    resolved = prepare(item(temperature=0.0, seed=0, stop=["y", "z"]), item(), **batch).items
    seeds = [each.seed if each.HasField("seed") else None for each in prepare(item(), item(seed=0), item(seed=2**64 - 1)).items]

    assert seeds == [None, 0, 2**64 - 1]

    assert (resolved[0].parameters.temperature, resolved[0].parameters.top_k, resolved[0].seed) == (0.0, 7, 0)
    assert (list(resolved[0].parameters.stop), list(resolved[0].parameters.stop_token_ids)) == (["y", "z"], [3])
    assert (resolved[1].parameters.temperature, resolved[1].seed, resolved[1].parameters.logprobs) == (0.5, 5, 4)


def test_item_format_replaces_the_batch_format() -> None:
    """A response format is replaced whole, not merged."""
    schema = types_pb2.ResponseFormat(json_schema="{}")

    assert only(item(response_format=A_REGEX), response_format=schema).response_format == A_REGEX


def test_canonical_form() -> None:
    """Minus zero is zero, ids ascend without duplicates, stops keep their order without duplicates."""
    resolved = only(
        item(temperature=-0.0, min_p=-0.0, stop=["b", "a", "b"], stop_token_ids=[9, 3, 9], bad_words=["z", " a", "a", "z"])
    )

    assert math.copysign(1, resolved.temperature) == math.copysign(1, resolved.min_p) == 1
    assert (list(resolved.stop), list(resolved.stop_token_ids)) == (["b", "a"], [3, 9])
    assert list(resolved.bad_token_ids) == [97, 122]


GOOD = [
    {"temperature": 0.0}, {"temperature": 100.0}, {"top_k": 0}, {"top_k": 1024}, {"top_p": 1.0}, {"top_p": 1e-9},
    {"min_p": 0.0}, {"min_p": 1.0}, {"repetition_penalty": 1e-9}, {"repetition_penalty": 10.0}, {"max_new_tokens": 1},
    {"max_new_tokens": 197}, {"min_new_tokens": 0}, {"min_new_tokens": 128}, {"logprobs": 0}, {"logprobs": 20},
    {"stop": ["x" * 256]}, {"stop": [str(i) for i in range(16)]}, {"stop_token_ids": list(range(32))},
    {"stop_token_ids": [261]}, {"bad_words": ["a"] * 32}, {"response_format": A_REGEX},
]  # fmt: skip

BAD = [
    ({"temperature": -0.1}, "temperature"), ({"temperature": 100.1}, "temperature"), ({"temperature": NAN}, "temperature"),
    ({"temperature": INF}, "temperature"), ({"temperature": -INF}, "temperature"),
    ({"top_k": -1}, "top_k"), ({"top_k": 1025}, "top_k"), ({"top_k": 2**31 - 1}, "top_k"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": -0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": NAN}, "top_p"),
    ({"min_p": -0.1}, "min_p"), ({"min_p": 1.1}, "min_p"), ({"min_p": NAN}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"repetition_penalty": 10.1}, "repetition_penalty"),
    ({"repetition_penalty": NAN}, "repetition_penalty"), ({"repetition_penalty": -1.0}, "repetition_penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": -5}, "max_new_tokens"),
    ({"max_new_tokens": 200}, "max_new_tokens"), ({"max_new_tokens": 198}, "max_new_tokens"),
    ({"min_new_tokens": -1}, "min_new_tokens"), ({"min_new_tokens": 129}, "min_new_tokens"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
    ({"logprobs": -1}, "logprobs"), ({"logprobs": 21}, "logprobs"),
    ({"stop": [""]}, "stop[0]"), ({"stop": ["ok", "x" * 257]}, "stop[1]"), ({"stop": ["é" * 129]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"), ({"stop_token_ids": [1] * 33}, "stop_token_ids"),
    ({"stop_token_ids": [1, 262]}, "stop_token_ids[1]"), ({"stop_token_ids": [2**32 - 1]}, "stop_token_ids[0]"),
    ({"bad_words": ["a"] * 33}, "bad_words"), ({"bad_words": ["a", "two"]}, "bad_words[1]"),
    ({"bad_words": [""]}, "bad_words[0]"), ({"bad_words": ["<|end|>"]}, "bad_words[0]"),
    ({"parse": [types_pb2.PARSE_TOOLS] * 3}, "parse"),
    ({"response_format": types_pb2.ResponseFormat()}, "response_format"),
    ({"response_format": types_pb2.ResponseFormat(regex="")}, "response_format.regex"),
    ({"response_format": types_pb2.ResponseFormat(regex="bad")}, "response_format.regex"),
    ({"response_format": types_pb2.ResponseFormat(json_schema="bad")}, "response_format.json_schema"),
    ({"response_format": types_pb2.ResponseFormat(json_schema="x" * 65537)}, "response_format.json_schema"),
    ({"response_format": A_REGEX, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": A_REGEX, "min_new_tokens": 1}, "min_new_tokens"),
]  # fmt: skip


@pytest.mark.parametrize("parameters", GOOD)
def test_bounds_are_inclusive(parameters: dict[str, Any]) -> None:
    """A value on its bound is accepted."""
    assert prepare(item(**parameters)).items


@pytest.mark.parametrize(("parameters", "path"), BAD)
def test_bad_value_of_an_item(parameters: dict[str, Any], path: str) -> None:
    """A value out of bounds is refused under the item's path."""
    assert paths(item(), item(**parameters)) == [f"items[1].parameters.{path}"]


@pytest.mark.parametrize(("parameters", "path"), BAD)
def test_bad_value_of_the_batch(parameters: dict[str, Any], path: str) -> None:
    """The same value in the batch's parameters is refused under the batch's path, once if it is wrong by itself."""
    assert set(paths(item(), item(), **parameters)) == {f"parameters.{path}"}


def test_all_violations_are_listed() -> None:
    """One error names everything that is wrong, in all items."""
    found = paths(item("", top_p=2.0), item(top_k=-1), types_pb2.Item(), temperature=-1.0)

    assert found == [
        "parameters.temperature",
        "items[0].parameters.top_p",
        "items[0].text",
        "items[1].parameters.top_k",
        "items[2]",
    ]


def test_batch_size() -> None:
    """A batch has 1 to batch_items_max items; of too many none is judged."""
    assert paths() == ["items"]
    assert paths(*[item(top_k=-1)] * 5) == ["items"]
    assert len(prepare(*[item()] * 4).items) == 4


IDS = types_pb2.TokenIds(ids=[1, 2])
CHAT = types_pb2.Chat(messages=[types_pb2.Message(role="user", content="hi")])

PROMPTS = [
    (types_pb2.Item(), "items[0]"),
    (types_pb2.Item(text="x", token_ids=IDS), "items[0]"),
    (types_pb2.Item(text="x", token_ids=IDS, chat=CHAT), "items[0]"),
    (types_pb2.Item(text=""), "items[0].text"),
    (types_pb2.Item(text="x" * 199), "items[0].text"),
    (types_pb2.Item(text="x" * 1001), "items[0].text"),
    (types_pb2.Item(token_ids=types_pb2.TokenIds()), "items[0].token_ids"),
    (types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[1] * 200)), "items[0].token_ids"),
    (types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[1, 262])), "items[0].token_ids.ids[1]"),
    (types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[2**32 - 1])), "items[0].token_ids.ids[0]"),
    (types_pb2.Item(chat=types_pb2.Chat()), "items[0].chat"),
    (types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="robot")])), "items[0].chat"),
    (types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="<|end|>")])), "items[0].chat.messages[0].role"),
    (types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user", content="x" * 1001)])), "items[0].chat"),
    (
        types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role=role) for role in ("user", "system")])),
        "items[0].chat",
    ),
]


@pytest.mark.parametrize(("bad", "path"), PROMPTS)
def test_bad_prompts(bad: types_pb2.Item, path: str) -> None:
    """No prompt or two, empty and long ones, unknown tokens and roles, and template errors are named by their paths."""
    assert paths(bad) == [path]


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    """A text's tokens are checked against the model's size too: the engine would read beyond its embeddings."""

    class Larger(ByteVocabulary):
        size = 105

    with pytest.raises(InvalidRequest) as caught:
        preparer(Larger()).prepare(engine_pb2.PrepareRequest(items=[item("hi"), types_pb2.Item(chat=CHAT)]))

    assert [violation.field for violation in caught.value.violations] == ["items[0].text", "items[1].chat"]
    assert "is not below the vocabulary's 105" in caught.value.violations[0].description


def test_a_text_that_can_never_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text or a rendered chat of more bytes than the context's tokens can stand for is refused by its length."""
    limits = replace(LIMITS, prompt_bytes_max=1 << 20)
    judge = preparer(limits=limits)
    monkeypatch.setattr(ByteVocabulary, "encode", lambda *_, **__: pytest.fail("tokenised"))
    most = LIMITS.context_tokens * ByteVocabulary.source_bytes_max

    long_chat = types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user", content="x" * most)]))

    for bad, path in ((types_pb2.Item(text="x" * (most + 1)), "text"), (long_chat, "chat")):
        with pytest.raises(InvalidRequest, match=f"at most {most} bytes") as refused:
            judge.prepare(engine_pb2.PrepareRequest(items=[bad]))
        assert [violation.field for violation in refused.value.violations] == [f"items[0].{path}"]


def test_the_chats_of_a_request_have_one_time_to_be_rendered() -> None:
    """When the time of a request is over, its other chats are refused by name; texts are not, nor the next request."""
    chats = [types_pb2.Item(chat=CHAT)] * 2
    items = [types_pb2.Item(text="a"), *chats]
    with pytest.raises(InvalidRequest, match="more than render_seconds_max, 1e-09 s") as refused:
        preparer(limits=replace(LIMITS, render_seconds_max=1e-9)).prepare(engine_pb2.PrepareRequest(items=items))
    good = preparer()

    assert [violation.field for violation in refused.value.violations] == ["items[1].chat", "items[2].chat"]
    assert len(good.prepare(engine_pb2.PrepareRequest(items=items)).items) == 3


def test_a_grammar_is_judged_once() -> None:
    """Equal grammars of a request are compiled once, and more different ones than a request may have are refused unseen."""
    judged = list[str]()
    limits = replace(LIMITS, batch_items_max=64)
    judge = preparer(limits=limits, check=lambda given: judged.append(given.regex))

    def items(*regexes: str) -> list[types_pb2.Item]:
        return [item(response_format=types_pb2.ResponseFormat(regex=regex)) for regex in regexes]

    judge.prepare(engine_pb2.PrepareRequest(items=items(*"aabbab")))
    assert judged == ["a", "b"]
    with pytest.raises(InvalidRequest) as refused:
        judge.prepare(engine_pb2.PrepareRequest(items=items(*map(str, range(FORMATS_MAX + 2)))))

    assert judged == ["a", "b", *map(str, range(FORMATS_MAX))]
    assert [each.field for each in refused.value.violations] == [
        f"items[{FORMATS_MAX + extra}].parameters.response_format.regex" for extra in (0, 1)
    ]


def test_what_is_not_wanted_is_not_prepared() -> None:
    """A batch whose caller has left ends before its next item."""
    seen = list[int]()

    def wanted() -> bool:
        seen.append(1)
        return len(seen) < 3

    with pytest.raises(Cancelled):
        preparer().prepare(engine_pb2.PrepareRequest(items=[types_pb2.Item(text="x")] * 4), wanted)

    assert len(seen) == 3


def test_chat_without_template() -> None:
    """A model without a template refuses chats."""
    with pytest.raises(InvalidRequest, match="no chat template"):
        preparer(chat=False).prepare(engine_pb2.PrepareRequest(items=[types_pb2.Item(chat=CHAT)]))


def test_kinds_of_prompts() -> None:
    """Text begins with the model's begin token, ids are taken as they are, chats are rendered with their control tokens. A
    control token that is written in a text is text."""
    response = prepare(item("hi"), types_pb2.Item(token_ids=IDS), types_pb2.Item(chat=CHAT), item("<|end|>"))
    prepared = response.items

    assert response.model_digest == b"m" * 32
    assert list(prepared[3].token_ids) == [BEGIN, *b"<|end|>"]

    assert list(prepared[0].token_ids) == [BEGIN, 104, 105]
    assert list(prepared[1].token_ids) == [1, 2]
    user, assistant = CONTROLS["<|user|>"], CONTROLS["<|assistant|>"]
    assert list(prepared[2].token_ids) == [BEGIN, user, 104, 105, END, assistant]


def test_prompt_and_answer_must_fit() -> None:
    """A batch's max_new_tokens that does not fit one item is refused, and the description names the item."""
    with pytest.raises(InvalidRequest) as caught:
        prepare(item(), item("x" * 100), max_new_tokens=150)

    assert [violation.field for violation in caught.value.violations] == ["parameters.max_new_tokens"]
    assert caught.value.violations[0].description.startswith("items[1]: ")


def test_tokenize_knows_the_same_prompts() -> None:
    """Tokenize returns the token ids of Prepare, and refuses the same prompts."""
    response = preparer().tokenize(generation_pb2.TokenizeRequest(items=[item("hi"), types_pb2.Item(chat=CHAT)]))

    assert [list(each.ids) for each in response.results] == [
        list(p.token_ids) for p in prepare(item("hi"), types_pb2.Item(chat=CHAT)).items
    ]
    with pytest.raises(InvalidRequest):
        preparer().tokenize(generation_pb2.TokenizeRequest(items=[item("")]))


class Words(ByteVocabulary):
    """Bytes, and some longer tokens."""

    longer = (b"the", b" the", b"\n the", b"THE", b"the end", b" ", b"  ", b"\xe9\xbe\x98\xe9", b"x" * 9)
    size = ByteVocabulary.size + len(longer)
    pieces: Sequence[bytes] = (*ByteVocabulary.pieces, *longer)


@pytest.mark.parametrize(
    ("word", "pieces"),
    [
        ("the", [b"the", b" the", b"\n the"]),
        (" the", [b"the", b" the", b"\n the"]),
        ("THE", [b"THE"]),
        (" ", [b" ", b" "]),
        ("xx", []),
    ],
)
def test_bad_word_is_all_its_tokens(word: str, pieces: list[bytes]) -> None:
    """A word stands for every token whose text is the word, white space before it ignored."""
    vocabulary = Words()

    assert [vocabulary.pieces[token_id] for token_id in Lexicon(vocabulary).ids_of(word)] == pieces


def test_text_bytes_of_the_longest_token() -> None:
    """Each byte of a broken character may become three; whole characters keep their length."""
    assert Lexicon(Words()).text_bytes_max == 12
    assert Lexicon(ByteVocabulary()).text_bytes_max == 3


@given(
    st.lists(st.integers(0, Words.size - 1), min_size=1, max_size=40),
    st.none() | st.integers(0, 20),
    st.lists(st.text(min_size=1, max_size=5), max_size=2),
)
def test_result_is_never_larger_than_promised(tokens: list[int], logprobs: int | None, stops: list[str]) -> None:
    """No serialised result is larger than result_bytes."""
    vocabulary = Words()
    parameters = types_pb2.ResolvedParameters(max_new_tokens=len(tokens), ignore_eos=True, stop=stops, logprobs=logprobs)
    answer = Answer(parameters, vocabulary)
    top = [types_pb2.TopLogprob(token_id=vocabulary.size - 1, logprob=-1.5)] * (logprobs or 0)
    for token in tokens:
        if answer.accept(token, None if logprobs is None else types_pb2.TokenLogprobs(logprob=-1.5, top=top)):
            break
    big = 2**64 - 1
    kind, result = types_pb2.LOGPROB_KIND_RAW, types_pb2.Result(receipt=biggest_receipt(), sequence=big, attempt=2**32 - 1)
    output = types_pb2.Output(seed=big, engine_seed=big, prompt_tokens=2**32 - 1, logprob_kind=kind)
    answer.put_into(output)
    result.output.CopyFrom(output)

    assert result.ByteSize() <= result_bytes(parameters, Lexicon(vocabulary).text_bytes_max, vocabulary.size)


def biggest_receipt() -> types_pb2.Receipt:
    big, digest = 2**64 - 1, b"d" * 32
    header = types_pb2.EntryHeader(
        index=big, kind=types_pb2.ENTRY_KIND_COMPLETED, log_id="0" * 32, writer="w" * 128, epoch=big, sequence=big,
        first_sequence=big, count=2**32 - 1, attempt=2**32 - 1, time_unix_millis=big, seed=big, grade=types_pb2.GRADE_EXACT,
        input_digest=digest, output_digest=digest, logprobs_digest=digest, fingerprint_digest=digest, payload_digest=digest,
    )  # fmt: skip
    receipt = types_pb2.Receipt(header=header, previous_hash=digest, entry_hash=digest)
    assert receipt.ByteSize() < RECEIPT_BYTES
    return receipt


floats = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 0.5, 2.0, 100.0])
whole = st.integers(-3, 250) | st.sampled_from([-(2**31), 2**31 - 1])
texts = st.text(alphabet="ab é", max_size=4)
any_parameters = st.builds(
    types_pb2.Parameters,
    seed=st.none() | st.integers(0, 2**64 - 1),
    temperature=st.none() | floats,
    top_k=st.none() | whole,
    top_p=st.none() | floats,
    min_p=st.none() | floats,
    repetition_penalty=st.none() | floats,
    max_new_tokens=st.none() | whole,
    min_new_tokens=st.none() | whole,
    stop=st.lists(texts, max_size=3),
    stop_token_ids=st.lists(st.integers(0, 300), max_size=3),
    bad_words=st.lists(texts, max_size=2),
    ignore_eos=st.none() | st.booleans(),
    logprobs=st.none() | st.integers(-1, 22),
)
any_item = st.builds(
    types_pb2.Item,
    text=st.none() | st.text(max_size=20),
    token_ids=st.none() | st.builds(types_pb2.TokenIds, ids=st.lists(st.integers(0, 270), max_size=5)),
    parameters=any_parameters,
)


@given(st.lists(any_item, max_size=5), any_parameters)
def test_either_all_is_good_or_something_is_named(items: list[types_pb2.Item], batch: types_pb2.Parameters) -> None:
    """Every request gets a complete and valid response, or violations, each with an existing path."""
    try:
        response = preparer().prepare(engine_pb2.PrepareRequest(items=items, parameters=batch))
    except InvalidRequest as error:
        named = [violation.field for violation in error.violations]
    else:
        named = []
        assert_whole(items, response)
    assert all(field.startswith(("items", "parameters")) for field in named)


def assert_whole(items: list[types_pb2.Item], response: engine_pb2.PrepareResponse) -> None:
    assert len(response.items) == len(items)
    for prepared in response.items:
        made = prepared.parameters
        assert made.max_new_tokens >= 1
        assert made.min_new_tokens <= made.max_new_tokens
        assert prepared.kv_tokens == len(prepared.token_ids) + made.max_new_tokens <= LIMITS.context_tokens
        assert 0 <= made.temperature <= 100
        assert 0 < made.top_p <= 1
        assert list(made.stop_token_ids) == sorted(set(made.stop_token_ids))


@given(any_item, any_parameters)
def test_preparing_is_a_function(one: types_pb2.Item, batch: types_pb2.Parameters) -> None:
    """The same request gives the same bytes, so twins have one input digest."""
    request = engine_pb2.PrepareRequest(items=[one, one], parameters=batch)
    try:
        first, second = preparer().prepare(request).items
    except InvalidRequest:
        return
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
