"""The llama engine's tokens depend on the seed, the parameters and the grammar, and not on other runs."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import pytest

from ostinato.v1 import types_pb2

from tests.service.llama_kit import LACKING, Bench, bits, on_the_loop, regex, schema

if LACKING:
    pytest.skip(f"the llama engine's packages are not installed: {LACKING}", allow_module_level=True)

import numpy as np

from service.chat import Conversation, RenderBounds
from service.engines.llama.sampling import Grammar, explanation, fold_seed, source_of, token_logprobs

pytestmark = pytest.mark.llama

ANY: dict[str, Any] = {"type": "any_text"}
CALL = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"n": {"const": "f"}}, "required": ["n"]}}
TRIGGERED: dict[str, Any] = {
    "type": "triggered_tags",
    "triggers": ["<call"],
    "tags": [
        {"type": "tag", "begin": "<call>", "content": CALL, "end": "</call>"},
        {"begin": "<call/>", "content": ANY, "end": "!"},
    ],
}


def tags(text: str) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(structural_tag=text)


def structure(given: dict[str, Any]) -> types_pb2.ResponseFormat:
    return tags(json.dumps({"type": "structural_tag", "format": given}))


def deep(levels: int) -> dict[str, Any]:
    return {"type": "sequence", "elements": [deep(levels - 1)]} if levels else ANY


MIXES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.0},
)


@pytest.mark.parametrize(
    ("seed", "folded"),
    [
        (0, 0),
        (7, 7),
        (2**32 - 2, 2**32 - 2),
        (2**32 - 1, 597867875),
        (2**32, 1739479891),
        (2**63, 1523102845),
        (2**64 - 1, 4103576),
    ],
)
def test_seeds_fold(seed: int, folded: int) -> None:
    """A seed that fits is itself; any other is folded, by a rule that never changes, to one that is not the reserved one."""
    assert fold_seed(seed) == folded < 2**32 - 1


def test_the_likeliest_are_ordered_by_id_where_equal() -> None:
    """Logprobs are the log-softmax of the whole row, the likeliest first, ties by id, also at the edge."""
    logits = np.array([1, 3, 2, 3, 2, 2], np.float32)

    found = token_logprobs(logits, 0, 4)

    norm = math.log(sum(math.exp(value) for value in logits))
    assert [top.token_id for top in found.top] == [1, 3, 2, 4]
    assert found.logprob == pytest.approx(1 - norm, abs=1e-12)
    assert found.top[2].logprob == pytest.approx(2 - norm, abs=1e-12)


@on_the_loop
async def test_other_runs_change_nothing(bench: Bench) -> None:
    """Equal seeded requests give equal tokens and logprob bits alone, in a full batch, and among other runs that start and
    end."""
    words = "the quick brown fox jumps over the lazy dog and runs home " * 22
    prompts = ("Once upon a time", "def fib(n):", words, "A haiku:")
    wanted: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": 2**63 + index, "logprobs": 5, "max_new_tokens": 10} | MIXES[index]
        for index, prompt in enumerate(prompts)
    ]
    assert len(bench.engine.vocabulary.encode(words, special=False)) > 257  # attention's kernels change at 64 and 257

    alone = [bits(await bench.answer(**one)) for one in wanted]
    together = [bench.start(**wanted[index]) for index in (0, 1, 3, 2, 3, 1, 0, 1)]
    full = [bits(await bench.output(run_id)) for run_id in together]

    others = [bench.start(f"Other {index} says", seed=index, stream=True, max_new_tokens=9 * index) for index in (1, 3, 5)]
    staggered = []
    for one in reversed(wanted):
        staggered.append(bench.start(**one))
        await bench.until(staggered[-1], "started")
    await bench.until(others[-1], "tokens")
    bench.engine.cancel(others[-1])
    among = [bits(await bench.output(run_id)) for run_id in reversed(staggered)]

    assert full == [alone[index] for index in (0, 1, 3, 2, 3, 1, 0, 1)]
    assert among == alone


@on_the_loop
async def test_seeds_decide(bench: Bench) -> None:
    """Another seed gives another answer; the record holds the seed as given and as folded."""
    seeds = (0, 1, 2**32, 2**64 - 1)
    runs = [bench.start("My favourite", seed=seed, max_new_tokens=8) for seed in seeds]
    outputs = [await bench.output(run_id) for run_id in runs]

    assert len({tuple(output.token_ids) for output in outputs}) == len(seeds)
    assert [(output.seed, output.engine_seed) for output in outputs] == [(seed, fold_seed(seed)) for seed in seeds]
    assert [output.prompt_tokens for output in outputs] == [2] * len(seeds)


@on_the_loop
async def test_greedy(bench: Bench) -> None:
    """Temperature 0 takes the likeliest token each time, whatever the seed."""
    one, other = [await bench.answer("Two and two", temperature=0.0, logprobs=1, seed=seed) for seed in (1, 2)]

    assert one.token_ids == other.token_ids == [position.top[0].token_id for position in one.logprobs]


@on_the_loop
async def test_logprobs_do_not_depend_on_how_many_are_wanted(bench: Bench) -> None:
    """The chosen token's logprob has the same bits with 0 and with 20 alternatives; without the parameter there is none."""
    none, few, many = [await bench.answer("The sea", seed=3, **n) for n in ({}, {"logprobs": 0}, {"logprobs": 20})]

    assert [position.logprob for position in few.logprobs] == [position.logprob for position in many.logprobs]
    assert [len(position.top) for position in many.logprobs] == [20] * 8
    assert not none.logprobs
    assert none.token_ids == few.token_ids == many.token_ids


@on_the_loop
async def test_the_penalty_avoids_repetition(bench: Bench) -> None:
    """With the strongest penalty, a greedy answer has no token twice."""
    prompt = "no no no no no no no no"
    plain, penalised = [
        await bench.answer(prompt, temperature=0.0, repetition_penalty=penalty, max_new_tokens=12) for penalty in (1.0, 10.0)
    ]

    assert len(set(plain.token_ids)) < 12
    assert len(set(penalised.token_ids)) == 12


@on_the_loop
async def test_bad_tokens_never_appear(bench: Bench) -> None:
    """A forbidden token never comes, even if it is always the likeliest."""
    plain = await bench.answer("One, two, three,", temperature=0.0)
    forbidden = sorted(set(plain.token_ids))
    output = await bench.answer("One, two, three,", temperature=0.0, bad_token_ids=forbidden, max_new_tokens=12)

    assert set(output.token_ids).isdisjoint(forbidden)


@on_the_loop
async def test_ends_that_may_not_come_yet(bench: Bench) -> None:
    """Neither the model's end nor a stop token comes before min_new_tokens; with ignore_eos the model's end never comes."""
    vocabulary = bench.engine.vocabulary
    asked = Conversation([{"role": "user", "content": "Say OK."}])
    chat = vocabulary.encode(vocabulary.render(asked, RenderBounds()), special=True)
    about: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24}
    plain = await bench.answer(chat, ignore_eos=False, **about)
    made = len(plain.token_ids)
    longer = await bench.answer(chat, ignore_eos=False, min_new_tokens=made + 3, **about)
    stopped = await bench.answer(chat, min_new_tokens=3, stop_token_ids=sorted(set(plain.token_ids[:2])), **about)
    endless = await bench.answer(chat, ignore_eos=True, **about)

    assert plain.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert longer.token_ids[: made - 1] == plain.token_ids[: made - 1]
    assert vocabulary.end_ids.isdisjoint(longer.token_ids[: made + 3])
    assert set(stopped.token_ids[:3]).isdisjoint(plain.token_ids[:2])
    assert len(endless.token_ids) == 24
    assert vocabulary.end_ids.isdisjoint(endless.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@on_the_loop
async def test_json_obeys_its_schema(bench: Bench, temperature: float) -> None:
    """The answer is JSON of the schema's shape, and ends by itself."""
    wanted = schema(
        '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0,'
        ' "maximum": 99}}, "required": ["name", "age"], "additionalProperties": false}'
    )
    bench.engine.check_format(wanted)

    output = await bench.answer(
        "A person as JSON: ", temperature=temperature, response_format=wanted, max_new_tokens=60, ignore_eos=False
    )

    person = json.loads(output.text)
    assert sorted(person) == ["age", "name"]
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 99
    assert output.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE


@on_the_loop
async def test_regex_is_obeyed(bench: Bench) -> None:
    """The whole answer matches, alone and beside runs with other grammars."""
    patterns = (r"[0-9]{3}-[a-c]+/[xyz]{2}", r"(yes|no), (sir|madam)", r"[A-Z][a-z]{2,5}")
    runs = [
        bench.start("Say", response_format=regex(each), ignore_eos=False, max_new_tokens=40, seed=4) for each in patterns * 2
    ]
    outputs = [await bench.output(run_id) for run_id in runs]
    alone = await bench.answer("Say", response_format=regex(patterns[0]), ignore_eos=False, max_new_tokens=40, seed=4)

    for pattern, output in zip(patterns * 2, outputs, strict=True):
        if output.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE:
            assert re.fullmatch(pattern, output.text), output.text
        bench.engine.check_format(regex(pattern))
    assert types_pb2.FINISH_REASON_END_OF_SEQUENCE in [output.finish_reason for output in outputs]
    assert bits(outputs[0]) == bits(outputs[3]) == bits(alone)


NAMED = '{"n": "f"}'
ONE = {"type": "const_string", "value": 'a"/\n'}
OR = {"type": "or", "elements": [ONE, {"type": "regex", "pattern": "b/[0-9]{2}"}]}


@pytest.mark.parametrize(
    ("given", "text", "after"),
    [
        (types_pb2.ResponseFormat(ebnf='start: "a" n\nn: "b" n | "c"'), "abbc", "end"),
        (types_pb2.ResponseFormat(ebnf='start: "a" n\nn: "b" n | "c"'), "abd", "refused"),
        (structure(ONE), 'a"/\n', "end"),
        (structure(OR), "b/12", "end"),
        (structure(OR), "b/1a", "refused"),
        (structure({"type": "regex", "pattern": r"https:\/\/[a-z]"}), "https://a", "end"),
        (structure({"type": "sequence", "elements": [OR, ONE]}), 'b/12a"/\n', "end"),
        (structure({"type": "sequence", "elements": [ONE, ANY]}), 'a"/\nand so on', "end"),
        (structure(TRIGGERED), "no calls < at all", "end"),
        (structure(TRIGGERED), f"two <call>{NAMED}</call> and <call>{NAMED}</call> calls", "end"),
        (structure(TRIGGERED), f"one <call>{NAMED}", "more"),
        (structure(TRIGGERED), 'a <call>{"n": "g"', "refused"),
        (structure(TRIGGERED), "a <call/>whatever <call> it is! b", "end"),
        (structure(TRIGGERED), "a <call2", "refused"),
        (structure(TRIGGERED | {"at_least_one": True}), "none", "more"),
        (structure(TRIGGERED | {"stop_after_first": True}), f"a <call>{NAMED}</call>", "end"),
        (structure(TRIGGERED | {"stop_after_first": True}), f"a <call>{NAMED}</call> b", "refused"),
        (structure(TRIGGERED | {"stop_after_first": True, "at_least_one": True}), "a", "more"),
    ],
)
@on_the_loop
async def test_a_grammar_allows_what_it_says(bench: Bench, given: types_pb2.ResponseFormat, text: str, after: str) -> None:
    """A text is allowed to its end, where the answer may end or not, or it is refused on the way."""
    bench.engine.check_format(given)
    vocabulary = bench.engine.vocabulary
    grammar = Grammar(vocabulary, *source_of(given))
    found = "refused"
    try:
        for token_id in vocabulary.encode(text, special=False):
            if not grammar.allowed()[token_id]:
                break
            grammar.accept(token_id)
        else:
            found = "end" if any(grammar.allowed()[token_id] for token_id in vocabulary.end_ids) else "more"
    finally:
        grammar.close()
    assert found == after


@on_the_loop
async def test_a_structural_tag_is_obeyed(bench: Bench) -> None:
    """An answer that must have one tag has it, and ends with it."""
    wanted = structure(TRIGGERED | {"tags": TRIGGERED["tags"][:1], "stop_after_first": True, "at_least_one": True})
    prompt = f"Example: <call>{NAMED}</call>\nNow you: <ca"
    output = await bench.answer(prompt, response_format=wanted, ignore_eos=False, max_new_tokens=200, temperature=0.0)

    if output.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE:
        assert re.fullmatch(rf"(?s).*<call>{re.escape(NAMED[:-1])}.*\}}</call>", output.text), output.text
    else:
        assert "<call" not in output.text.partition("<call>")[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (schema("{"), "is not JSON: Expecting"),
        (schema('{"const": NaN}'), "NaN is not a JSON value"),
        (schema("[" * 60_000), "nested too deeply"),
        (schema("5"), "a schema is an object"),
        (schema('{"type": "wizard"}'), "Invalid type: wizard"),
        (schema('{"not": {}}'), r'Unimplemented keys: \["not"\]'),
        (schema('{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum .5. is greater than maximum .3."),
        (schema('{"type": "string", "pattern": "("}'), "unclosed group"),
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"[^\s\S]"), "allows no answer"),
        (regex("a\0"), "NUL"),
        (types_pb2.ResponseFormat(ebnf='root ::= "a"'), "cannot be obeyed"),
        (types_pb2.ResponseFormat(ebnf='start: "a\0"'), "NUL"),
        (tags("{"), "is not JSON"),
        (tags("{}"), "must be .*structural_tag"),
        (structure({"type": "wizard"}), 'format.type "wizard" is not one of const_string'),
        (structure({"type": "sequence", "elements": []}), "format.elements must be a list that is not empty"),
        (structure({"type": "sequence", "elements": [ANY, ANY]}), r"format.elements\[0\] is any_text, which something follows"),
        (structure({"type": "json_schema", "json_schema": 5}), "a schema is an object"),
        (structure({"type": "json_schema", "json_schema": {"type": "wizard"}}), "Invalid type: wizard"),
        (structure({"type": "regex", "pattern": "("}), "unclosed group"),
        (structure(TRIGGERED | {"triggers": ["<other>"]}), r"format.tags\[0\].begin does not start with a trigger"),
        (structure(TRIGGERED | {"at_least_one": 1}), "format.at_least_one must be true or false"),
        (structure({"type": "sequence", "elements": [TRIGGERED, ANY]}), "set stop_after_first"),
        (structure(deep(40)), "nested deeper than 32 formats"),
        (schema('{"const": "a<|im_end|>b"}'), r"holds the text of a control token, <\|im_end\|>"),
        (schema('{"properties": {"<\\u007cim_start|>": {}}}'), "holds the text of a control token"),
        (regex(r"tag <\|im_end\|> done"), "holds the text of a control token"),
        (structure({"type": "const_string", "value": "<|im_start|>"}), "holds the text of a control token"),
        (types_pb2.ResponseFormat(ebnf="start: <[1]> /a/"), "allows control tokens"),
        (schema('{"type": "integer", "multipleOf": 999983}'), "more than 0.5 s of processor time to compile"),
        (schema(json.dumps({"properties": {f"p{n}": {} for n in range(1200)}})), "has an object with 1200 optional properties"),
        (regex(r"([a-z]{1,50}){1,50}"), r"too many expressions.*\(after \d+ tokens\)"),
        (regex(r"(a?){500}a{500}"), "too many expressions"),
    ],
)
@on_the_loop
async def test_bad_formats_are_refused(bench: Bench, given: types_pb2.ResponseFormat, told: str) -> None:
    """A format that cannot be obeyed is refused with the reason; a child process that it ends is replaced."""
    with pytest.raises(ValueError, match=told):
        await asyncio.to_thread(bench.engine.check_format, given)


def test_explanations_are_short() -> None:
    """The caller gets llguidance's reason in one line, without the dump of its state."""
    assert explanation("llg error: a\n  ^\n   1 | b\n c\n<state>\n" + "x" * 999) == "cannot be obeyed: a c"
    assert len(explanation("word " * 200)) < 330
