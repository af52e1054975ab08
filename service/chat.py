"""Chats to text, by the model's own template.

A template is rendered as transformers' `apply_chat_template` renders it, except for the date, on which a prompt should not
depend. A template that can do without the date does not get it. One that calls `strftime_now` without asking whether it exists
gets the date of `template_kwargs.today`, else today's.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ostinato.errors import invalid
from ostinato.v1 import types_pb2

from service.strict_json import Json, check_depth, loads

RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""Arguments of a template that fields of the chat give."""
ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Which of these a template accepts is for the template to say. Some build a control token from a role."""
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the last message ends in a rendered chat. The space tells whether the template strips messages."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given."""

    messages: Sequence[Mapping[str, Json]]
    tools: Sequence[Mapping[str, Json]] | None = None
    arguments: Mapping[str, Json] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @classmethod
    def of(cls, chat: types_pb2.Chat, path: str) -> Conversation:
        """Raises InvalidRequest with the path of what is wrong."""
        if not chat.messages:
            raise invalid(path, "has no messages")
        messages = [_message(message, f"{path}.messages[{index}]") for index, message in enumerate(chat.messages)]
        tools, arguments = (
            _parsed(chat.tools, list, f"{path}.tools"),
            _parsed(chat.template_kwargs, dict, f"{path}.template_kwargs"),
        )
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, dict):
                raise invalid(f"{path}.tools[{index}]", "must be a JSON object")
        for name in arguments or ():
            if name in RESERVED:
                raise invalid(f"{path}.template_kwargs.{name}", "is given by a field of the chat")
        ready = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
        if ready and chat.continue_final_message:
            raise invalid(f"{path}.continue_final_message", "cannot be combined with add_generation_prompt")
        if chat.continue_final_message and not (chat.messages[-1].content or chat.messages[-1].parts):
            raise invalid(f"{path}.continue_final_message", "the last message has no content to continue")
        return cls(messages, tools or None, arguments or {}, ready, chat.continue_final_message)

    def mapped(self, change: Callable[[str], str]) -> Conversation:
        """With every string of the caller changed."""
        return replace(
            self,
            messages=_mapped(self.messages, change),
            tools=_mapped(self.tools, change),
            arguments=_mapped(self.arguments, change),
        )

    def strings(self) -> list[str]:
        """Every string of the caller, also the names in objects."""
        found = list[str]()

        def note(string: str) -> str:
            found.append(string)
            return string

        self.mapped(note)
        return found


def _message(message: types_pb2.Message, path: str) -> Mapping[str, Json]:
    """As OpenAI's API has it, but with parsed arguments: templates print them as JSON."""
    if not ROLE.fullmatch(message.role):
        raise invalid(f"{path}.role", "must be 1 to 64 ASCII letters, digits, _ and -")
    if message.content and message.parts:
        raise invalid(f"{path}.parts", "cannot be combined with content")
    turn: dict[str, Json] = {"role": message.role}
    if message.parts:
        turn["content"] = [{"type": "text", "text": part} for part in message.parts]
    elif message.content or not message.tool_calls:
        turn["content"] = message.content
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn["reasoning_content"] = turn["thinking"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)]
    return turn


def _call(call: types_pb2.ToolCall, path: str) -> Mapping[str, Json]:
    if not call.name:
        raise invalid(f"{path}.name", "is empty")
    function = {"name": call.name, "arguments": _parsed(call.arguments or "{}", dict, f"{path}.arguments")}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}


def _parsed(text: str, kind: type[list[Json] | dict[str, Json]], path: str) -> Any:
    """JSON text of this kind; None: it is empty. Names in objects keep their order, which templates print."""
    if not text:
        return None
    try:
        value = loads(text)
        if not isinstance(value, kind):
            raise ValueError(f"must be a JSON {'array' if kind is list else 'object'}")
        check_depth(value)
    except ValueError as error:
        raise invalid(path, str(error)) from None
    return value


def _mapped(value: Json, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in value.items()}
    return value


class OutOfBounds(ValueError):
    """A chat takes more than it may while it is rendered. The message says what."""


class RenderBounds:
    """What the renderings of one request's chats may take. Belongs to one thread."""

    def __init__(
        self, bytes_max: int = sys.maxsize, seconds_max: float = math.inf, clock: Callable[[], float] = time.thread_time
    ) -> None:
        """`bytes_max`: of one rendering's text. `seconds_max`: of processor time, on which other load has no influence, for all
        renderings together."""
        self._bytes_max, self._seconds_max = bytes_max, seconds_max
        self._clock, self._spent, self._begun = clock, 0.0, 0.0

    @contextmanager
    def rendering(self) -> Iterator[None]:
        """Counts the time until the context ends."""
        self._begun = self._clock() - self._spent
        try:
            yield
        finally:
            self._spent = self._clock() - self._begun

    def check_time(self) -> None:
        """Within `rendering`. Raises OutOfBounds."""
        if self._clock() - self._begun > self._seconds_max:
            raise OutOfBounds(
                f"the request's chats take more than render_seconds_max, {self._seconds_max:g} s, in the model's template"
            )

    def check_size(self, size: int) -> None:
        """Of a text so far, in bytes. Raises OutOfBounds."""
        if size > self._bytes_max:
            raise OutOfBounds(f"must be at most {self._bytes_max} bytes of text, as the model's template renders it")


class ChatTemplate:
    """A model's template. Pure and thread-safe."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """`tokens`: the model's control tokens by their names in templates, such as bos_token. Raises ValueError for an invalid
        template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters |= {"tojson": _to_json, _CHECK: _check_time}
        environment.globals |= {"raise_exception": _raise_exception, **tokens}
        self._needs_date = "strftime_now" in source and "strftime_now is defined" not in source
        try:
            parsed = environment.parse(source)
            repeated: Any
            for repeated in parsed.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                check = nodes.Filter(nodes.Const(None), _CHECK, [], [], None, None, lineno=repeated.lineno)
                repeated.body.insert(0, nodes.ExprStmt(check, lineno=repeated.lineno))
            self._template = environment.from_string(parsed)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be used: {error}") from error

    def render(self, given: Conversation, bounds: RenderBounds) -> str:
        """The chat as text. Raises ValueError with the template's message, and OutOfBounds: the time is checked in every pass
        of a loop or macro, the size with every part of the text."""
        messages = list(given.messages)
        arguments: dict[str, Json] = {"documents": None, **given.arguments}
        if given.continue_final_message:
            messages[-1] = _continued(messages[-1])
        if self._needs_date:
            arguments["strftime_now"] = _today(arguments.pop("today", None)).strftime
        arguments |= {"messages": messages, "tools": given.tools, "add_generation_prompt": given.add_generation_prompt}
        parts, size = list[str](), 0
        try:
            with bounds.rendering():
                for part in self._template.generate(arguments | {_BOUNDS: bounds}):
                    parts.append(part)
                    size += len(part.encode())
                    bounds.check_size(size)
        except OutOfBounds:
            raise
        except Exception as error:  # a template is a program and can fail in any way
            raise ValueError(str(error) or type(error).__name__) from error
        text = "".join(parts)
        return _cut(text, given.messages[-1]["content"]) if given.continue_final_message else text


_CHECK, _BOUNDS = " check", " bounds"
"""Of a filter, and of an argument: no template can name them."""


@jinja2.pass_context
def _check_time(context: jinja2.runtime.Context, _: None) -> None:
    context[_BOUNDS].check_time()


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training. Here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _today(given: Json) -> dt.date:
    """The date that is given as YYYY-MM-DD, else today's. Raises ValueError."""
    if given is None:
        return dt.datetime.now(dt.UTC).date()
    try:
        return dt.date.fromisoformat(given)
    except (TypeError, ValueError):
        raise ValueError("template_kwargs.today must be a date, YYYY-MM-DD") from None


def _to_json(
    value: Json, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own, without escapes for HTML, and in the given order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _continued(message: Mapping[str, Json]) -> Mapping[str, Json]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUED}
    return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CONTINUED}]}


def _cut(text: str, content: Json) -> str:
    """Without what the template writes after the last message, whose content this is."""
    end = text.rfind(_CONTINUED.strip())
    last = content if isinstance(content, str) else content[-1]["text"]
    if end < 0 or last.strip() not in text:
        raise ValueError("it leaves out the last message, which cannot be continued")
    return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()
