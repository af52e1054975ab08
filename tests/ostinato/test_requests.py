"""Requests from Python values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ostinato import requests
from ostinato.v1 import generation_pb2, types_pb2

HI: dict[str, Any] = {"role": "user", "content": "hi"}
_HI_ITEM = types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(**HI)]))


def _tokens(*ids: int) -> types_pb2.Item:
    return types_pb2.Item(token_ids=types_pb2.TokenIds(ids=ids))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", [types_pb2.Item(text="a")]),
        (["a", "b"], [types_pb2.Item(text="a"), types_pb2.Item(text="b")]),
        ([[1, 2], (3,)], [_tokens(1, 2), _tokens(3)]),
        ([[HI]], [_HI_ITEM]),
        ([[types_pb2.Message(**HI)]], [_HI_ITEM]),
        (types_pb2.Item(text="a"), [types_pb2.Item(text="a")]),
        (["a", [1]], [types_pb2.Item(text="a"), _tokens(1)]),
    ],
)
def test_every_form_of_prompt_becomes_its_item(prompts: Any, expected: list[types_pb2.Item]) -> None:
    """Texts, token ids, chats and items become items in order, also mixed."""
    assert requests.items(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        (None, TypeError, "prompts: must be a text, an item or a list of prompts, not NoneType"),
        (b"a", TypeError, "prompts: must be"),
        ([], ValueError, "prompts: empty"),
        ([1, 2], TypeError, r"prompts\[0\]: must be a text, a list of token ids"),
        ([HI], TypeError, r"prompts\[0\]: must be a text, a list of token ids"),
        (["a", []], ValueError, r"prompts\[1\]: empty"),
        ([[1, -1]], ValueError, r"prompts\[0\]\[1\]: -1 is not from 0 to 4294967295"),
        ([[1, "a"]], TypeError, r"prompts\[0\]\[1\]: must be an int, not str"),
        ([[True]], TypeError, r"prompts\[0\]\[0\]: must be an int, not bool"),
        ([[{"role": "user"}]], ValueError, r"prompts\[0\]\[0\].content: missing"),
        (
            [[HI | {"nick": "x"}]],
            TypeError,
            r"prompts\[0\]\[0\].nick: no such field; a message has role, content, tool_calls, name",
        ),
        ([[HI | {"name": 1}]], TypeError, r"prompts\[0\]\[0\].name: must be a str, not int"),
        (
            [[HI | {"content": [{"type": "image_url"}]}]],
            ValueError,
            r"must be a part of type text, is image_url: images",
        ),
        ([[HI | {"content": ["a"]}]], ValueError, r"content\[0\]: must be a part of type text, is str"),
        ([[HI | {"tool_calls": [1]}]], TypeError, r"tool_calls\[0\]: must be a tool call with function"),
        ([[HI | {"tool_calls": [{"function": {}}]}]], TypeError, r"tool_calls\[0\].function.name: must be a str, not NoneType"),
        ([[HI, "a"]], TypeError, r"prompts\[0\]\[1\]: must be a message"),
        ([[{"role": "user", "content": 1}]], TypeError, r"prompts\[0\]\[0\].content: must be a str, not int"),
        (["a\ud800"], ValueError, r"prompts\[0\]: character 1 is half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompts: Any, kind: type[Exception], message: str) -> None:
    """An error about a prompt names its position and field."""
    with pytest.raises(kind, match=message):
        requests.items(prompts)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"temprature": 1}, TypeError, "temprature: no such parameter; there are seed, temperature, top_k"),
        ({"seed": -1}, ValueError, "seed: -1 is not from 0 to 18446744073709551615"),
        ({"seed": 2**64}, ValueError, "seed: 18446744073709551616 is not from"),
        ({"seed": 1.0}, TypeError, "seed: must be an int, not float"),
        ({"seed": True}, TypeError, "seed: must be an int, not bool"),
        ({"top_k": 2**31}, ValueError, "top_k: 2147483648 is not from"),
        ({"temperature": "1"}, TypeError, "temperature: must be a number, not str"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos: must be a bool, not int"),
        ({"stop": [1]}, TypeError, r"stop\[0\]: must be a str, not int"),
        ({"stop": b"a"}, TypeError, "stop: must be a list, not bytes"),
        ({"stop_token_ids": "1"}, TypeError, "stop_token_ids: must be a list, not str"),
        ({"stop_token_ids": [2**32]}, ValueError, r"stop_token_ids\[0\]: 4294967296 is not from"),
        ({"response_format": {"regex": "a", "json_schema": "{}"}}, TypeError, "response_format: must be"),
        ({"response_format": {"regex": 1}}, TypeError, "response_format.regex: must be a str"),
        ({"response_format": "json"}, TypeError, "response_format: must be"),
        (
            {"response_format": {"lark": "x"}},
            TypeError,
            "response_format: must be an object with one of json_schema",
        ),
        ({"response_format": {"json_schema": {1, 2}}}, ValueError, "response_format.json_schema: cannot be written as JSON"),
        ({"parse": ["tool"]}, ValueError, r"parse\[0\]: 'tool' is not one of tools, reasoning"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    """An unknown name, a wrong type and a value out of range raise errors that begin with the parameter's name."""
    with pytest.raises(kind, match=f"^{message}"):
        requests.parameters(given)


def test_every_parameter_is_taken() -> None:
    """There is a keyword for each field of Parameters, and each is set."""
    given: dict[str, Any] = {
        "seed": 5,
        "temperature": 1,
        "top_k": 2,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "max_new_tokens": 7,
        "min_new_tokens": 3,
        "stop": "\n",
        "stop_token_ids": (8, 9),
        "bad_words": ["x", "y"],
        "ignore_eos": False,
        "logprobs": 0,
        "response_format": {"json_schema": {"type": "object"}},
        "include_stop": True,
        "skip_special_tokens": False,
        "parse": ["tools", "reasoning"],
    }
    fields = types_pb2.Parameters.DESCRIPTOR.fields_by_name

    made = requests.parameters(given)

    assert set(fields) == set(given) == set(requests.Sampling.__annotations__)
    assert made is not None
    assert {field.name for field, _ in made.ListFields()} == set(given)
    assert made.stop == ["\n"]
    assert made.response_format.json_schema == '{"type": "object"}'


def test_a_chat_of_openai_s_form_is_taken_whole() -> None:
    """Parts, tool calls with arguments as text or object, results, reasoning, tools and arguments of the template are taken."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    made = requests.chat(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, {"function": {"name": "g", "arguments": {"é": 1}}}]},
            {"role": "tool", "content": "c", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "d", "reasoning_content": "r"},
        ],
        tools=[{"type": "function", "function": {"name": "f"}}],
        template_kwargs={"enable_thinking": False},
        continue_final_message=True,
    )

    assert list(made.messages[0].parts) == ["a", "b"]
    assert [(each.id, each.name, each.arguments) for each in made.messages[1].tool_calls] == [
        ("1", "f", '{"a":1}'),
        ("", "g", '{"é": 1}'),
    ]
    assert (made.messages[2].tool_call_id, made.messages[2].name, made.messages[3].reasoning) == ("1", "f", "r")
    assert made.tools == '[{"type": "function", "function": {"name": "f"}}]'
    assert made.template_kwargs == '{"enable_thinking": false}'
    assert made.continue_final_message


def test_none_is_unset_and_zero_is_not() -> None:
    """A parameter that is None is left out; a zero is sent, and so is the largest seed."""
    assert requests.parameters({"seed": None, "stop": None}) is None
    assert requests.parameters({"seed": 0, "temperature": 0}) == types_pb2.Parameters(seed=0, temperature=0)
    assert requests.parameters({"seed": 2**64 - 1}) == types_pb2.Parameters(seed=2**64 - 1)


def test_a_whole_request_is_taken_as_it_is() -> None:
    """A GenerateRequest is sent unchanged, and other arguments with it are refused."""
    whole = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="a")], verify=True)

    assert requests.batch(whole) is whole
    for name, value in {"key": "k", "required_grade": "exact", "sampling": {"seed": 1}}.items():
        with pytest.raises(TypeError, match="belongs in the GenerateRequest"):
            requests.batch(whole, **{name: value})  # type: ignore[arg-type]


def test_grades_have_names() -> None:
    """A grade is one of the enum's names in lower case, or its value."""
    assert [requests.grade(name) for name in ("best-effort", "serial", "exact", None)] == [1, 2, 3, types_pb2.GRADE_UNSPECIFIED]
    for given in ("best", "EXACT", 7):
        with pytest.raises(ValueError, match=r"required_grade: .* is not one of exact, serial, best-effort"):
            requests.grade(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e10, "1", True])
def test_a_deadline_that_is_none_is_refused(timeout: Any) -> None:
    """A timeout is a number above zero that gRPC does not take for one that has passed, or None."""
    with pytest.raises((TypeError, ValueError), match=r"^timeout: must be"):
        requests.seconds(timeout)


@pytest.mark.parametrize(("first", "last"), [(0, None), (3, 2), (1, 2**64), (None, 3)])
def test_an_empty_range_is_refused(first: Any, last: Any) -> None:
    """A range of sequences begins at 1 or later and ends at its beginning or later."""
    with pytest.raises((TypeError, ValueError), match=r"^(first|last): "):
        requests.span(first, last)
