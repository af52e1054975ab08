"""Builds requests from Python values. A value that the message cannot hold raises TypeError or ValueError, which names the
parameter. The model's limits are not checked here: the server knows the model, and refuses."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypedDict

from google.protobuf.descriptor import FieldDescriptor

from ostinato.v1 import generation_pb2, types_pb2

Chat: TypeAlias = Sequence[Mapping[str, object]]
"""Messages as in OpenAI's API, such as `{"role": "user", "content": "Hi"}`."""

Prompt: TypeAlias = str | Sequence[int] | Chat | types_pb2.Item
"""A text, token ids, a chat, or an item, which may have its own parameters."""

Prompts: TypeAlias = str | types_pb2.Item | Sequence[Prompt]
"""A text, an item, or a list of prompts. To send one chat, or one prompt of token ids, put it into a list."""

GradeName: TypeAlias = types_pb2.Grade.ValueType | str
"""`"exact"`, `"serial"`, `"best-effort"`, or the enum's value."""

Check: TypeAlias = Callable[[str, object], object]
"""Gives the value of a parameter of this name as the message holds it. Raises TypeError and ValueError."""

RESPONSE_BYTES_METADATA = "ostinato-max-response-bytes"
"""Metadata of every call: the largest response that the client accepts, in bytes, as decimal digits."""

PORT_MAX = 65535
TIMEOUT_SECONDS_MAX = 1e9
"""32 years. A longer deadline overflows in gRPC, which then has passed at once."""

PARSES: Mapping[str, types_pb2.Parse.ValueType] = {"tools": types_pb2.PARSE_TOOLS, "reasoning": types_pb2.PARSE_REASONING}

GRADES: Mapping[str, types_pb2.Grade.ValueType] = {
    "exact": types_pb2.GRADE_EXACT,
    "serial": types_pb2.GRADE_SERIAL,
    "best-effort": types_pb2.GRADE_BEST_EFFORT,
}


class Sampling(TypedDict, total=False):
    """The fields of `Parameters`; types.proto has their bounds and defaults. None leaves a field out."""

    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    bad_words: str | Iterable[str] | None
    ignore_eos: bool | None
    logprobs: int | None
    response_format: types_pb2.ResponseFormat | Mapping[str, object] | None
    """`{"json_schema": schema}`, with the schema as JSON text or as a value to serialise, or likewise `structural_tag`; or
    `{"regex": pattern}` or `{"ebnf": grammar}`."""
    include_stop: bool | None
    skip_special_tokens: bool | None
    parse: str | Iterable[str] | None
    """`"tools"` and `"reasoning"`."""


def batch(
    prompts: Prompts | generation_pb2.GenerateRequest,
    key: str = "",
    request_id: str = "",
    required_grade: GradeName | None = None,
    sampling: Sampling | None = None,
    verify: bool = False,
) -> generation_pb2.GenerateRequest:
    """A GenerateRequest. If `prompts` is one, it is returned unchanged, and the other arguments must be empty."""
    given: Mapping[str, object] = dict(sampling or {})
    if isinstance(prompts, generation_pb2.GenerateRequest):
        own = {"key": key, "request_id": request_id, "required_grade": required_grade, "verify": verify, **given}
        for name, value in own.items():
            if value not in ("", None, False):
                raise TypeError(f"{name}: belongs in the GenerateRequest that was given")
        return prompts
    request = generation_pb2.GenerateRequest(items=items(prompts), required_grade=grade(required_grade), verify=verify)
    request.idempotency_key, request.request_id = text("key", key), text("request_id", request_id)
    if common := parameters(given):
        request.parameters.CopyFrom(common)
    return request


def items(prompts: Prompts) -> list[types_pb2.Item]:
    if isinstance(prompts, str | types_pb2.Item):
        return [item(prompts)]
    listed = _list("prompts", prompts, "a text, an item or a list of prompts")
    return [item(prompt, f"prompts[{position}]") for position, prompt in enumerate(listed)]


def item(prompt: object, name: str = "prompts") -> types_pb2.Item:
    """The item of one prompt. Errors call it `name`."""
    if isinstance(prompt, types_pb2.Item):
        return prompt
    if isinstance(prompt, str):
        return types_pb2.Item(text=text(name, prompt))
    listed = _list(name, prompt, "a text, a list of token ids, a list of messages or an item")
    if isinstance(listed[0], Mapping | types_pb2.Message):
        return types_pb2.Item(chat=chat(listed, name))
    return types_pb2.Item(token_ids=token_ids(listed, name))


def _list(name: str, given: object, wanted: str) -> Sequence[object]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: must be {wanted}, not {_kind(given)}")
    if not given:
        raise ValueError(f"{name}: empty")
    return given


def token_ids(given: object, name: str = "token_ids") -> types_pb2.TokenIds:
    listed = enumerate(_list(name, given, "a list of token ids"))
    return types_pb2.TokenIds(ids=[integer(f"{name}[{position}]", each, 0, 2**32 - 1) for position, each in listed])


def chat(
    given: object,
    name: str = "messages",
    *,
    tools: object = None,
    template_kwargs: object = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    allow_control_tokens: bool = False,
) -> types_pb2.Chat:
    """A chat of messages as in OpenAI's API. `tools`: a list as there; `template_kwargs`: an object; each may be JSON text. The
    other arguments are as in types.proto."""
    flags = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "allow_control_tokens": allow_control_tokens,
    }
    listed = enumerate(_list(name, given, "a list of messages"))
    return types_pb2.Chat(
        messages=[_message(f"{name}[{position}]", each) for position, each in listed],
        tools=_json_text("tools", tools),
        template_kwargs=_json_text("template_kwargs", template_kwargs),
        **{flag: boolean(flag, value) for flag, value in flags.items() if value is not None},
    )


_TEXTS = {"name": "name", "tool_call_id": "tool_call_id", "reasoning": "reasoning", "reasoning_content": "reasoning"}
"""Optional texts of a message, and their fields."""
_MESSAGE = ("role", "content", "tool_calls", *_TEXTS)


def _message(name: str, given: object) -> types_pb2.Message:
    if isinstance(given, types_pb2.Message):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: must be a message with role and content, not {_kind(given)}")
    for part in given:
        if part not in _MESSAGE:
            raise TypeError(f"{name}.{part}: no such field; a message has {', '.join(_MESSAGE)}")
    content, calls = given.get("content"), given.get("tool_calls")
    for part in ("role",) if calls else ("role", "content"):
        if part not in given:
            raise ValueError(f"{name}.{part}: missing")
    made = types_pb2.Message(role=text(f"{name}.role", given["role"]))
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        made.parts.extend(_text_part(f"{name}.content[{position}]", part) for position, part in enumerate(content))
    elif content is not None or not calls:
        made.content = text(f"{name}.content", content)
    for part, field in _TEXTS.items():
        if given.get(part) is not None:
            setattr(made, field, text(f"{name}.{part}", given[part]))
    if calls:
        listed = _list(f"{name}.tool_calls", calls, "a list of tool calls")
        made.tool_calls.extend(_tool_call(f"{name}.tool_calls[{position}]", call) for position, call in enumerate(listed))
    return made


def _text_part(name: str, given: object) -> str:
    """Of a content part of type text."""
    if not isinstance(given, Mapping) or given.get("type") != "text":
        kind = given.get("type") if isinstance(given, Mapping) else _kind(given)
        raise ValueError(f"{name}: must be a part of type text, is {kind}: images, audio and files are not supported")
    return text(f"{name}.text", given.get("text"))


def _tool_call(name: str, given: object) -> types_pb2.ToolCall:
    if isinstance(given, types_pb2.ToolCall):
        return given
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping):
        raise TypeError(f"{name}: must be a tool call with function, which has name and arguments")
    return types_pb2.ToolCall(
        id=text(f"{name}.id", given.get("id") or ""),
        name=text(f"{name}.function.name", function.get("name")),
        arguments=_json_text(f"{name}.function.arguments", function.get("arguments")),
    )


def _json_text(name: str, given: object, *, ascii_only: bool = False) -> str:
    """Text is taken as it is, another value is serialised; empty for None."""
    if given is None or isinstance(given, str):
        return text(name, given or "")
    try:
        return json.dumps(given, ensure_ascii=ascii_only, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be written as JSON: {error}") from None


def parameters(given: Mapping[str, object]) -> types_pb2.Parameters | None:
    """Parameters from the names of Sampling; None if all are unset."""
    made: dict[str, object] = {}
    for name, value in given.items():
        if name not in _PARAMETERS:
            raise TypeError(f"{name}: no such parameter; there are {', '.join(_PARAMETERS)}")
        if value is not None:
            made[name] = _PARAMETERS[name](name, value)
    return types_pb2.Parameters(**made) if made else None  # type: ignore[arg-type]  # as the descriptor has it


def _response_format(name: str, value: object) -> types_pb2.ResponseFormat:
    if isinstance(value, types_pb2.ResponseFormat):
        return value
    kinds = types_pb2.ResponseFormat.DESCRIPTOR.fields_by_name
    if not isinstance(value, Mapping) or len(value) != 1 or not set(value) <= set(kinds):
        raise TypeError(f"{name}: must be an object with one of {', '.join(kinds)}")
    ((kind, constraint),) = value.items()
    if kind in ("json_schema", "structural_tag") and not isinstance(constraint, str):
        constraint = _json_text(f"{name}.{kind}", constraint, ascii_only=True)
    return types_pb2.ResponseFormat(**{kind: text(f"{name}.{kind}", constraint)})


def grade(name: GradeName | None) -> types_pb2.Grade.ValueType:
    """The enum's value; None is GRADE_UNSPECIFIED, which accepts any grade."""
    if name is None:
        return types_pb2.GRADE_UNSPECIFIED
    value = GRADES.get(name) if isinstance(name, str) else name
    if value not in types_pb2.Grade.values():
        raise ValueError(f"required_grade: {name!r} is not one of {', '.join(GRADES)}")
    return value


def span(first: int | None, last: int | None = None) -> generation_pb2.SequenceRange:
    """The sequences `first` to `last`, both included; without `last`, only `first`."""
    low = integer("first", first, 1, 2**64 - 1)
    return generation_pb2.SequenceRange(first=low, last=low if last is None else integer("last", last, low, 2**64 - 1))


def target(given: str) -> str:
    """The target of a client. Without a port gRPC would use 443, which no sidecar means; one above 65535 it would truncate."""
    _, scheme, address = given.partition("://") if given.startswith(("http://", "https://")) else ("", "", given)
    if given.startswith("https://") and address.rstrip("/"):
        return given
    if not scheme and re.match(r"[a-z][a-z0-9+.-]*:(?!\d*$)", address):  # unix:/path, or another scheme of gRPC's
        return given
    found = re.fullmatch(r"(?:\[[^\[\]\s]+\]|[^:/\[\]\s]+):(\d+)", address.rstrip("/"), re.ASCII)
    if found and 0 < int(found[1]) <= PORT_MAX:
        return given
    raise ValueError(f"target: must be host:port, https://host:port or unix:/path, not {given!r}")


def seconds(timeout: float | None) -> float | None:
    """A timeout. None: no deadline."""
    if timeout is None:
        return None
    value = number("timeout", timeout)
    if not 0 < value <= TIMEOUT_SECONDS_MAX:
        raise ValueError(f"timeout: must be above 0 and at most {TIMEOUT_SECONDS_MAX:g} seconds, not {timeout}")
    return value


def integer(name: str, value: object, low: int, high: int) -> int:
    """The value, if it is an integer from `low` to `high`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: must be an int, not {_kind(value)}")
    whole = operator.index(value)
    if not low <= whole <= high:
        raise ValueError(f"{name}: {whole} is not from {low} to {high}")
    return whole


def boolean(name: str, value: object) -> bool:
    """The value, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be a bool, not {_kind(value)}")
    return value


def number(name: str, value: object) -> float:
    """The value, if it is a float or an int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: must be a number, not {_kind(value)}")
    return float(value)


def text(name: str, value: object) -> str:
    """The value, if it is a str that UTF-8 can carry."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: must be a str, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start} is half of a surrogate pair") from None
    return value


def _kind(value: object) -> str:
    return type(value).__name__


def _parse(name: str, value: object) -> types_pb2.Parse.ValueType:
    if value not in PARSES:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(PARSES)}")
    return PARSES[str(value)]


def _several(check: Check, name: str, value: object) -> list[object]:
    """A list of values that this check takes; a single text is one of them."""
    if isinstance(value, str) and check in (text, _parse):
        return [check(name, value)]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: must be a list, not {_kind(value)}")
    return [check(f"{name}[{position}]", each) for position, each in enumerate(value)]


_CHECKS: Mapping[int, Check] = {
    FieldDescriptor.CPPTYPE_MESSAGE: _response_format,
    FieldDescriptor.CPPTYPE_STRING: text,
    FieldDescriptor.CPPTYPE_ENUM: _parse,
    FieldDescriptor.CPPTYPE_DOUBLE: number,
    FieldDescriptor.CPPTYPE_BOOL: boolean,
    FieldDescriptor.CPPTYPE_INT32: partial(integer, low=-(2**31), high=2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: partial(integer, low=0, high=2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: partial(integer, low=0, high=2**64 - 1),
}
_PARAMETERS: Mapping[str, Check] = {
    field.name: partial(_several, _CHECKS[field.cpp_type]) if field.is_repeated else _CHECKS[field.cpp_type]
    for field in types_pb2.Parameters.DESCRIPTOR.fields
}
"""What a parameter's value has to be, by name."""
