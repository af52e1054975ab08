"""Reasoning and calls of tools are parsed out of an output's text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ostinato.v1 import engine_pb2, types_pb2

from service.chat import ChatTemplate, Conversation, RenderBounds
from service.engines.scripted import ByteVocabulary
from service.parse import form_of, hermes, llama, parsed, split_reasoning
from tests.service.test_chat import TEMPLATES, TOKENS

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>{};"), max_size=8)
NAME = st.text("abc_-é", min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(TEXT, max_size=2), max_size=3)


def call_of(name: str, arguments: str) -> types_pb2.ToolCall:
    return types_pb2.ToolCall(name=name, arguments=arguments)


CALLS = st.lists(st.tuples(NAME, ARGUMENTS), min_size=1, max_size=3)


def answer_in(template: str, *, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template writes for an answer of the assistant, without the turn around it."""
    turn = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in calls],
    }
    user = {"role": "user", "content": "?"}
    rendered = ChatTemplate(TEMPLATES[template], TOKENS)
    before = rendered.render(Conversation([user]), RenderBounds())
    return rendered.render(Conversation([user, turn], add_generation_prompt=False), RenderBounds()).removeprefix(before)


@given(TEXT.map(str.strip), CALLS)
def test_hermes_calls_come_back(content: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """What the template writes for an assistant's calls is parsed into the same calls and content."""
    written = answer_in("hermes", content=content, calls=calls).removesuffix("<|im_end|>\n")
    found = hermes(written.removeprefix("<think>\n\n</think>\n\n"))

    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls
    assert (found.content, found.fault) == (content, "")


@given(CALLS.map(lambda calls: calls[:1]))
def test_llama_s_call_comes_back(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """The same for Llama's form, whose template writes one call."""
    found = llama(answer_in("llama", content="", calls=calls).removesuffix("<|eot_id|>"))

    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls
    assert (found.content, found.fault) == ("", "")


@given(st.text("<>{}/\"':,;atool_cpymenrg |th\n", max_size=40))
@example("<|python_tag|>")
def test_any_text_is_parsed(text: str) -> None:
    """No text is an error, and one without calls is the content unchanged."""
    for parse in (hermes, llama):
        found = parse(text)
        if not found.tool_calls:
            assert found.content == text
    reasoning, rest = split_reasoning(text, inside=False)
    assert (reasoning, rest) == ("", text) or text.lstrip().startswith("<think>")


@pytest.mark.parametrize(
    ("text", "content", "calls", "fault"),
    [
        ('a <tool_call>{"name": "f"}</tool_call> b', "a  b", [call_of("f", "{}")], ""),
        ('<tool_call>{"name": "f", "arguments": {"a": [1, "é"]}}', "", [call_of("f", '{"a":[1,"é"]}')], ""),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            [call_of("f", '{"a":"</tool_call>"}')],
            "",
        ),
        ('<tool_call>{"name": "f"} x</tool_call>', None, [], "call 1: something follows its object"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, [], "call 1: NaN is not a JSON value"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', None, [], "call 1: Out of range float values"),
        (
            '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}",
            None,
            [],
            "call 1: arguments is nested deeper",
        ),
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", [], "call 1: Expecting value"),
        ("<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", [], "call 1: is not an object with a name"),
        ('<tool_call>{"name": "f", "arguments": 1}</tool_call>', None, [], "call 1: arguments is not an object"),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', None, [], "call 1: 'utf-8' codec"),
        ("<tool_call>" + "[" * 100_000, None, [], "call 1: "),
    ],
)
def test_hermes(text: str, content: str | None, calls: list[types_pb2.ToolCall], fault: str) -> None:
    """A part that is not a call stays in the content, and the fault says why."""
    found = hermes(text)
    assert (found.content, [*found.tool_calls]) == (text if content is None else content, calls)
    assert found.fault.startswith(fault)
    assert bool(found.fault) == bool(fault)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [call_of("f", '{"a":1}')]),
        ('<|python_tag|>{"name": "f"}; {"name": "g", "parameters": {}}', [call_of("f", "{}"), call_of("g", "{}")]),
        ('I call {"name": "f", "parameters": {}}', []),
        ('{"name": "f", "parameters": {}} and so on', []),
        ('{"a": 1}', []),
    ],
)
def test_llama(text: str, calls: list[types_pb2.ToolCall]) -> None:
    """Calls are the whole text, or it is content."""
    found = llama(text)
    assert ([*found.tool_calls], found.content) == (calls, "" if calls else text)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>a</think>\n\nb", False, ("a", "b")),
        ("a\n</think>\nb", True, ("a", "b")),
        ("a", True, ("a", "")),
        ("<think>\n\n</think>\n\nb", False, ("", "b")),
        ("b <think>a</think>", False, ("", "b <think>a</think>")),
        ("a</think>b", False, ("", "a</think>b")),
    ],
)
def test_reasoning(text: str, inside: bool, expected: tuple[str, str]) -> None:
    """Reasoning is what stands before </think>, if it was begun by the output or the prompt."""
    assert split_reasoning(text, inside=inside) == expected


def test_forms_are_known_by_the_template() -> None:
    """The form of calls follows from the chat template."""
    assert [form_of(TEMPLATES[name]) for name in ("hermes", "llama", "deepseek")] == [hermes, llama, None]
    assert form_of(None) is None


def test_what_is_parsed_is_the_text() -> None:
    """Content, reasoning and calls together are parts of the text, however it ended; ids of calls follow from the sequence."""
    vocabulary = ByteVocabulary()
    submit = engine_pb2.Submit(sequence=7, token_ids=vocabulary.encode("Hi<think>\n", special=False))
    submit.parameters.parse.extend([types_pb2.PARSE_TOOLS, types_pb2.PARSE_REASONING])
    output = types_pb2.Output(text='r</think>x<tool_call>{"name": "f"}</tool_call>', matched_stop="x")

    found = parsed(vocabulary, hermes, output, submit)

    assert (found.content, found.reasoning) == ("x", "r")
    assert [(call.id, call.name, call.arguments) for call in found.tool_calls] == [("call_7_0", "f", "{}")]
