"""What an output's text holds besides plain content: reasoning, and calls of tools.

The form in which a model writes calls is known from its chat template. Two are known:

    hermes    <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of them: Hermes, Qwen 2.5 and 3, and others
    llama     the whole text is {"name": "f", "parameters": {…}}, or several with ; between; <|python_tag|> may precede: Llama 3

Reasoning stands between <think> and </think>; the first may be the end of the prompt. Parsing changes neither the text nor the
token ids, so it is in no comparison. A receipt's text digest covers what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Vocabulary
from service.strict_json import DECODER, check_depth

_CALL, _CALLED = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_THINK, _THOUGHT = "<think>", "</think>"
_LAST_TOKENS = 8
"""Of the prompt: enough for <think>, in several tokens, and white space."""


Form = Callable[[str], types_pb2.Parsed]
"""From a text to its content and calls, without ids, and why a part of the content is not a call."""


def hermes(text: str) -> types_pb2.Parsed:
    content, calls = list[str](), list[types_pb2.ToolCall]()
    fault, place = "", 0
    while (begin := text.find(_CALL, place)) >= 0:
        content.append(text[place:begin])
        place = begin + len(_CALL)
        try:
            value, end = _decoded(text, place)
            if not (rest := text[end:]).lstrip().startswith(_CALLED) and rest.strip():
                raise ValueError("something follows its object")
            calls.append(_call(value, "arguments"))
            place = len(text) if not rest.strip() else text.index(_CALLED, end) + len(_CALLED)
        except (ValueError, RecursionError) as error:
            fault = fault or f"call {len(calls) + 1}: {error}"
            content.append(_CALL)
    content.append(text[place:])
    return types_pb2.Parsed(content="".join(content).strip() if calls else text, tool_calls=calls, fault=fault)


def llama(text: str) -> types_pb2.Parsed:
    written = text.strip()
    if not written.startswith((_PYTHON_TAG, "{")):
        return types_pb2.Parsed(content=text)
    rest, calls = written.removeprefix(_PYTHON_TAG).strip(), list[types_pb2.ToolCall]()
    try:
        while rest:
            value, end = _decoded(rest, 0)
            calls.append(_call(value, "parameters"))
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
    except (ValueError, RecursionError) as error:
        return types_pb2.Parsed(content=text, fault=f"call {len(calls) + 1}: {error}")
    return types_pb2.Parsed(content="" if calls else text, tool_calls=calls)


def form_of(template: str | None) -> Form | None:
    """The form in which a model with this chat template writes calls; None: it is not known."""
    if template is None:
        return None
    if _CALL in template:
        return hermes
    return llama if _PYTHON_TAG in template or ("ipython" in template and '"parameters"' in template) else None


def _decoded(text: str, place: int) -> tuple[object, int]:
    """The JSON value that begins there, after white space, and where it ends. Raises ValueError and RecursionError."""
    while text[place : place + 1].isspace():
        place += 1
    return DECODER.raw_decode(text, place)


def _call(value: object, arguments: str) -> types_pb2.ToolCall:
    """Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("is not an object with a name")
    given = value.get(arguments, {})
    if not isinstance(given, dict):
        raise ValueError(f"{arguments} is not an object")
    check_depth(given, f"{arguments} ")
    text = json.dumps(given, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    (value["name"] + text).encode()  # a ValueError for half of a surrogate pair
    return types_pb2.ToolCall(name=value["name"], arguments=text)


def split_reasoning(text: str, *, inside: bool) -> tuple[str, str]:
    """Reasoning, and the rest. `inside`: the prompt ended with <think>."""
    begun, _, after = text.partition(_THINK)
    if _THINK in text and not begun.strip():
        text, inside = after, True
    if not inside:
        return "", text
    reasoning, _, rest = text.partition(_THOUGHT)
    return reasoning.strip(), rest.lstrip()


def parsed(vocabulary: Vocabulary, form: Form | None, output: types_pb2.Output, submit: engine_pb2.Submit) -> types_pb2.Parsed:
    """What the run's parameters ask for. Ids of calls follow from the sequence: they are the same in every run."""
    text, reasoning, wanted = output.text, "", submit.parameters.parse
    if types_pb2.PARSE_REASONING in wanted:
        last = b"".join(vocabulary.written[token_id] for token_id in submit.token_ids[-_LAST_TOKENS:])
        reasoning, text = split_reasoning(text, inside=last.rstrip().endswith(_THINK.encode()))
    found = types_pb2.Parsed(content=text)
    if types_pb2.PARSE_TOOLS in wanted:
        assert form is not None, "Prepare refuses to parse calls of no known form"
        found = form(text)
    for index, call in enumerate(found.tool_calls):
        call.id = f"call_{submit.sequence}_{index}"
    found.reasoning = reasoning
    return found
