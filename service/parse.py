"""What an output's text holds besides plain content: reasoning, and calls of tools.

The form in which a model writes calls is known from its chat template. Two are known:

    hermes    <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of them: Hermes, Qwen 2.5 and 3, and others
    llama     the whole text is {"name": "f", "parameters": {…}}, or several with ; between; <|python_tag|> may precede: Llama 3

Reasoning stands between <think> and </think>; the first may be the end of the prompt. Parsing changes neither the text nor the
token ids, and what it finds is in no digest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ostinato.v1 import engine_pb2, types_pb2

from service.answer import BY_TOKEN
from service.engines.base import Vocabulary

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_THINK, _THOUGHT = "<think>", "</think>"
_LAST_TOKENS = 8
"""Of the prompt: enough for <think>, in several tokens, and white space."""


class Call(NamedTuple):
    name: str
    arguments: str
    """JSON text."""


class Found(NamedTuple):
    """Of a text with calls."""

    content: str
    calls: list[Call]
    fault: str
    """Why a part is not a call; it is in the content. Empty: nothing is wrong."""


def form_of(template: str | None) -> str | None:
    """The form in which a model with this chat template writes calls; None: it is not known."""
    if template is None:
        return None
    if "<tool_call>" in template:
        return "hermes"
    return "llama" if _PYTHON_TAG in template or ("ipython" in template and '"parameters"' in template) else None


def hermes(text: str) -> Found:
    calls: list[Call] = []
    fault = ""

    def take(found: re.Match[str]) -> str:
        nonlocal fault
        try:
            calls.append(_call(json.loads(found[1]), "arguments"))
        except (ValueError, RecursionError) as error:
            fault = fault or f"call {len(calls) + 1}: {error}"
            return found[0]
        return ""

    content = _HERMES.sub(take, text)
    return Found(content.strip() if calls else content, calls, fault)


def llama(text: str) -> Found:
    written = text.strip()
    if not written.startswith((_PYTHON_TAG, "{")):
        return Found(text, [], "")
    rest, calls = written.removeprefix(_PYTHON_TAG).strip(), []
    try:
        while rest:
            value, end = json.JSONDecoder().raw_decode(rest)
            calls.append(_call(value, "parameters"))
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
    except (ValueError, RecursionError) as error:
        return Found(text, [], f"call {len(calls) + 1}: {error}")
    return Found("", calls, "")


FORMS: Mapping[str, Callable[[str], Found]] = {"hermes": hermes, "llama": llama}


def _call(value: object, arguments: str) -> Call:
    """Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("is not an object with a name")
    given = value.get(arguments, {})
    if not isinstance(given, dict):
        raise ValueError(f"{arguments} is not an object")
    call = Call(value["name"], json.dumps(given, ensure_ascii=False, separators=(",", ":")))
    "".join(call).encode()  # a ValueError for half of a surrogate pair
    return call


def split_reasoning(text: str, *, inside: bool) -> tuple[str, str]:
    """Reasoning, and the rest. `inside`: the prompt ended with <think>."""
    begun, _, after = text.partition(_THINK)
    if _THINK in text and not begun.strip():
        text, inside = after, True
    if not inside:
        return "", text
    reasoning, _, rest = text.partition(_THOUGHT)
    return reasoning.strip(), rest.lstrip()


@dataclass(frozen=True, slots=True)
class Parser:
    """Pure."""

    vocabulary: Vocabulary
    form: str | None
    """One of FORMS; None: calls cannot be parsed."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Parser:
        return cls(vocabulary, form_of(vocabulary.template))

    def parsed(self, output: types_pb2.Output, submit: engine_pb2.Submit) -> types_pb2.Parsed:
        """What the run's parameters ask for. Ids of calls follow from the sequence: they are the same in every run."""
        text, reasoning, wanted = self._text(output, submit.parameters), "", submit.parameters.parse
        if types_pb2.PARSE_REASONING in wanted:
            prompt = self._written(submit.token_ids[-_LAST_TOKENS:])
            reasoning, text = split_reasoning(text, inside=prompt.rstrip().endswith(_THINK))
        found = Found(text, [], "")
        if types_pb2.PARSE_TOOLS in wanted:
            assert self.form is not None, "Prepare refuses to parse calls of no known form"
            found = FORMS[self.form](text)
        return types_pb2.Parsed(
            content=found.content,
            reasoning=reasoning,
            tool_calls=[
                types_pb2.ToolCall(id=f"call_{submit.sequence}_{index}", name=call.name, arguments=call.arguments)
                for index, call in enumerate(found.calls)
            ],
            fault=found.fault,
        )

    def _text(self, output: types_pb2.Output, parameters: types_pb2.ResolvedParameters) -> str:
        """With control tokens, but without what ended the output."""
        ids = output.token_ids[:-1] if output.finish_reason in BY_TOKEN else output.token_ids
        text = self._written(ids)
        return text.rpartition(output.matched_stop)[0] if output.matched_stop else text

    def _written(self, token_ids: Iterable[int]) -> str:
        return b"".join(map(self.vocabulary.written, token_ids)).decode(errors="replace")
