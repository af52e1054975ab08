"""Texts, chats and formats of answers in the llama engine."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from ostinato.v1 import types_pb2

from tests.service.llama_kit import LACKING, Bench, bits, on_the_loop, regex, schema

if LACKING:
    pytest.skip(f"the llama engine's packages are not installed: {LACKING}", allow_module_level=True)

from service.engines.llama.checker import explanation
from service.engines.llama.template import ChatTemplate
from service.engines.sources import SOURCE_BYTES_MAX

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("text", ["Hello, world", "wörld 🧬龘 \n\t x\0y", " two  spaces ", "<|im_end|> is text"])
@on_the_loop
async def test_text_comes_back(bench: Bench, text: str) -> None:
    """The pieces of a text's tokens are the text, and none of them is a control token."""
    vocabulary = bench.engine.vocabulary
    ids = vocabulary.encode(text, special=False)

    assert b"".join(map(vocabulary.piece, ids)) == text.encode()
    assert vocabulary.end_ids.isdisjoint(ids)


@on_the_loop
async def test_a_chat_becomes_control_tokens(bench: Bench) -> None:
    """A rendered chat has the template's own first turn, ends ready to answer, and its control tokens are recognised."""
    vocabulary = bench.engine.vocabulary
    text = vocabulary.render([types_pb2.Message(role="user", content="Hi")])
    ids = vocabulary.encode(text, special=True)

    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert vocabulary.piece(ids[0]) == b""
    assert len(vocabulary.end_ids.intersection(ids)) == 1


def test_templates_refuse() -> None:
    """A role that there is not, what the template itself refuses, and a template that fails are each told as ValueError."""
    user = [types_pb2.Message(role="user", content="x")]
    with pytest.raises(ValueError, match="'wizard' is no role"):
        ChatTemplate("", begin="", end="").render([types_pb2.Message(role="wizard")])
    with pytest.raises(ValueError, match="system first"):
        ChatTemplate("{{ raise_exception('system first') }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="division"):
        ChatTemplate("{{ 1 / 0 }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="cannot be used"):
        ChatTemplate("{% if %}", begin="", end="")


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
    """The whole answer matches, in company with different grammars, as it does alone."""
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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (schema("{"), "is not JSON: Expecting"),
        (schema('{"const": NaN}'), "NaN is no JSON value"),
        (schema("[" * 60_000), "nested too deeply"),
        (schema("5"), "a schema is an object"),
        (schema('{"type": "wizard"}'), "Invalid type: wizard"),
        (schema('{"not": {}}'), r'Unimplemented keys: \["not"\]'),
        (schema('{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum .5. is greater than maximum .3."),
        (schema('{"type": "string", "pattern": "("}'), "unclosed group"),
        (schema(" " * (SOURCE_BYTES_MAX + 1)), "at most 65536 bytes"),
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"[^\s\S]"), "allows no answer"),
        (regex("a\0"), "NUL"),
        (schema('{"type": "integer", "multipleOf": 999983}'), "more than 0.5 s to compile"),
        (types_pb2.ResponseFormat(), "is empty"),
    ],
)
@on_the_loop
async def test_bad_formats_are_refused(bench: Bench, given: types_pb2.ResponseFormat, told: str) -> None:
    """What cannot be obeyed is refused with a reason, the process that dies of one is replaced, and good ones pass after it."""
    with pytest.raises(ValueError, match=told):
        await asyncio.to_thread(bench.engine.check_format, given)


def test_explanations_are_short() -> None:
    """Of what llguidance writes, a caller gets the reason, without a dump of its state and in one line."""
    assert explanation("llg error: a\n  ^\n   1 | b\n c\n<state>\n" + "x" * 999) == "cannot be obeyed: a c"
    assert len(explanation("word " * 200)) < 330
