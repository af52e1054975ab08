"""Digests of requests, inputs, outputs and fingerprints; hash-based sampling.

Every digest is a SHA-256 over a canonical encoding. The encoding does not depend on protobuf's serialisation, which has no
canonical form. docs/protocol.md specifies it byte for byte; tests/ostinato/vectors.json has test vectors.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array as array_of
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

from google.protobuf.message import Message

from ostinato.v1 import generation_pb2, types_pb2

T = TypeVar("T")
M = TypeVar("M", bound=Message)

DIGEST_BYTES = 32
CACHED_PARAMETER_BYTES_MAX = 1_024
"""Longer parameters, which hold a grammar, are encoded each time."""

# The canonical encoding. The journal encodes about forty integers per item, hence no Python function around the first two.
u64: Callable[[int], bytes] = struct.Struct(">Q").pack
"""8 bytes, big-endian."""

i64: Callable[[int], bytes] = struct.Struct(">q").pack
"""8 bytes, big-endian two's complement. For signed fields and open enums, which may be negative until they are validated."""

_f64: Callable[[float], bytes] = struct.Struct(">d").pack
_NAN = b"\xff" * 8
_EMPTY_ARRAY = bytes(8)


def f64(value: float) -> bytes:
    """IEEE 754 binary64, big-endian. -0.0 is encoded as 0.0, and every NaN as eight bytes 255."""
    return _NAN if math.isnan(value) else _f64(value + 0.0)


def blob(value: bytes) -> bytes:
    """Length as u64, then the bytes."""
    return u64(len(value)) + value


def text(value: str) -> bytes:
    """UTF-8, as a blob."""
    data = value.encode()
    return u64(len(data)) + data


def optional(encode: Callable[[Any], bytes], message: Message, field: str) -> bytes:
    """Byte 0 if the field is not set; byte 1, then the value, otherwise."""
    return b"\1" + encode(getattr(message, field)) if message.HasField(field) else b"\0"


def array(encode: Callable[[T], bytes], values: Iterable[T]) -> bytes:
    """Count as u64, then the values."""
    parts = [encode(value) for value in values]
    return u64(len(parts)) + b"".join(parts)


def ids(values: Sequence[int]) -> bytes:
    """An array of u64; faster than `array` for token ids."""
    if not values:
        return _EMPTY_ARRAY
    numbers = array_of("Q", values[:])  # a slice of a protobuf list is faster to read than its items
    if sys.byteorder == "little":
        numbers.byteswap()
    return u64(len(numbers)) + numbers.tobytes()


def tagged_digest(name: str, *parts: bytes) -> bytes:
    """SHA-256 over `ostinato/<name>/v1`, a zero byte, and the parts. The name separates the domains of the digests."""
    return hashlib.sha256(b"".join((tag(name), *parts))).digest()


@cache
def tag(name: str) -> bytes:
    """What a tagged digest begins with."""
    return f"ostinato/{name}/v1\0".encode()


# The digests. docs/protocol.md fixes the order of the fields.
def request_digest(request: generation_pb2.GenerateRequest) -> bytes:
    """Of the request without request_id and idempotency_key. Equal digests are the same request."""
    return tagged_digest(
        "request",
        array(_item, request.items),
        b"\1" + _parameters(request.parameters) if request.HasField("parameters") else b"\0",
        i64(request.required_grade),
        u64(request.verify),
    )


def input_digest(token_ids: Sequence[int], parameters: types_pb2.ResolvedParameters, seed: int) -> bytes:
    """Of everything but the fingerprint that determines an output. Runs with equal input digests can be compared."""
    return tagged_digest("input", ids(token_ids), _resolved(parameters), u64(seed))


def unseeded_input_digest(token_ids: Sequence[int], parameters: types_pb2.ResolvedParameters) -> bytes:
    """Of the input without its seed. Items with equal ones and different derived seeds should get different outputs."""
    return tagged_digest("unseeded-input", ids(token_ids), _resolved(parameters))


def output_digest(output: types_pb2.Output) -> bytes:
    """Of token ids, finish reason and matched stop string: what a comparison compares."""
    return tagged_digest("output", ids(output.token_ids), i64(output.finish_reason), text(output.matched_stop))


def logprobs_digest(output: types_pb2.Output) -> bytes:
    """Of the bits of the logprobs; empty if there are none."""
    if not output.logprobs:
        return b""
    return tagged_digest("logprobs", array(_logprobs, output.logprobs))


def text_digest(output: types_pb2.Output) -> bytes:
    """Of the text, as the caller got it, and of what was parsed out of it."""
    return tagged_digest("text", text(output.text), optional(_parsed, output, "parsed"))


def fingerprint_digest(fields: Mapping[str, str]) -> bytes:
    """Of names and values, in ascending order of the names' UTF-8 bytes."""
    pairs = sorted((name.encode(), value.encode()) for name, value in fields.items())
    return tagged_digest("fingerprint", array(lambda pair: blob(pair[0]) + blob(pair[1]), pairs))


def model_digest(fields: Mapping[str, str]) -> bytes:
    """Of the fingerprint fields that identify the model. A prompt that was prepared for one model must not run on another."""
    return tagged_digest("model", *(text(fields.get(name, "")) for name in ("model", "weights", "tokenizer", "template")))


def sampling_hash(purpose: str, log_id: str, sequence: int) -> int:
    """A uint64 that decides whether an item is in the sample for a purpose such as "audit". Deterministic."""
    return int.from_bytes(tagged_digest(purpose, text(log_id), u64(sequence))[:8])


def is_sampled(purpose: str, log_id: str, sequence: int, rate: float) -> bool:
    """Whether an item is in the sample that holds this share (0 to 1) of all items."""
    return sampling_hash(purpose, log_id, sequence) < int(rate * 2**64)


def _call(call: types_pb2.ToolCall) -> bytes:
    return text(call.id) + text(call.name) + text(call.arguments)


def _parsed(parsed: types_pb2.Parsed) -> bytes:
    return text(parsed.content) + text(parsed.reasoning) + array(_call, parsed.tool_calls) + text(parsed.fault)


def _item(item: types_pb2.Item) -> bytes:
    return b"".join(
        (
            b"\1" + text(item.text) if item.HasField("text") else b"\0",
            b"\1" + ids(item.token_ids.ids) if item.HasField("token_ids") else b"\0",
            _chat(item.chat) if item.HasField("chat") else b"\0",
            b"\1" + _parameters(item.parameters) if item.HasField("parameters") else b"\0",
        )
    )


EXTENDED = b"\2"
"""Before fields that the contract gained later. They are encoded only if one of them is used: other requests keep their
digests."""


def _chat(chat: types_pb2.Chat) -> bytes:
    if {field.number for field, _ in chat.ListFields()} <= {1} and not any(map(_is_extended, chat.messages)):
        return b"\1" + array(_message, chat.messages)
    return b"".join(
        (
            EXTENDED,
            array(_extended_message, chat.messages),
            text(chat.tools),
            text(chat.template_kwargs),
            optional(u64, chat, "add_generation_prompt"),
            u64(chat.continue_final_message),
            u64(chat.allow_control_tokens),
        )
    )


def _is_extended(message: types_pb2.Message) -> bool:
    return any(field.number > 2 for field, _ in message.ListFields())


def _message(message: types_pb2.Message) -> bytes:
    return text(message.role) + text(message.content)


def _extended_message(message: types_pb2.Message) -> bytes:
    return b"".join(
        (
            _message(message),
            array(text, message.parts),
            text(message.name),
            text(message.tool_call_id),
            array(_call, message.tool_calls),
            text(message.reasoning),
        )
    )


def by_content(kind: type[M]) -> Callable[[Callable[[M], T]], Callable[[M], T]]:
    """Cache a pure function of a message of this type by its serialised bytes.

    Most requests and items have one of a few sets of parameters. To serialise a set takes a fifth of the time to encode it.
    """

    def decorate(function: Callable[[M], T]) -> Callable[[M], T]:
        @lru_cache(maxsize=256)
        def of_bytes(serialised: bytes) -> T:
            return function(kind.FromString(serialised))

        def cached(message: M) -> T:
            serialised = message.SerializeToString(deterministic=True)
            return of_bytes(serialised) if len(serialised) <= CACHED_PARAMETER_BYTES_MAX else function(message)

        return cached

    return decorate


@by_content(types_pb2.Parameters)
def _parameters(given: types_pb2.Parameters) -> bytes:
    return b"".join(
        (
            optional(u64, given, "seed"),
            optional(f64, given, "temperature"),
            optional(i64, given, "top_k"),
            optional(f64, given, "top_p"),
            optional(f64, given, "min_p"),
            optional(f64, given, "repetition_penalty"),
            optional(i64, given, "max_new_tokens"),
            optional(i64, given, "min_new_tokens"),
            array(text, given.stop),
            ids(given.stop_token_ids),
            array(text, given.bad_words),
            optional(u64, given, "ignore_eos"),
            optional(i64, given, "logprobs"),
            optional(_format, given, "response_format"),
            _presentation(given),
        )
    )


def _presentation(given: types_pb2.Parameters) -> bytes:
    """How the output is presented; empty unless one of these is set."""
    if not (given.parse or given.HasField("include_stop") or given.HasField("skip_special_tokens")):
        return b""
    return b"".join(
        (
            EXTENDED,
            optional(u64, given, "include_stop"),
            optional(u64, given, "skip_special_tokens"),
            array(i64, given.parse),
        )
    )


@by_content(types_pb2.ResolvedParameters)
def _resolved(resolved: types_pb2.ResolvedParameters) -> bytes:
    return b"".join(
        (
            f64(resolved.temperature),
            u64(resolved.top_k),
            f64(resolved.top_p),
            f64(resolved.min_p),
            f64(resolved.repetition_penalty),
            u64(resolved.max_new_tokens),
            u64(resolved.min_new_tokens),
            array(text, resolved.stop),
            ids(resolved.stop_token_ids),
            ids(resolved.bad_token_ids),
            u64(resolved.ignore_eos),
            optional(u64, resolved, "logprobs"),
            optional(_format, resolved, "response_format"),
            _resolved_presentation(resolved),
        )
    )


def _resolved_presentation(resolved: types_pb2.ResolvedParameters) -> bytes:
    if not (resolved.include_stop or resolved.keep_special_tokens or resolved.parse):
        return b""
    return EXTENDED + u64(resolved.include_stop) + u64(resolved.keep_special_tokens) + array(i64, resolved.parse)


def _format(constraint: types_pb2.ResponseFormat) -> bytes:
    match constraint.WhichOneof("format"):
        case "json_schema":
            return u64(1) + text(constraint.json_schema)
        case "regex":
            return u64(2) + text(constraint.regex)
        case "ebnf":
            return u64(3) + text(constraint.ebnf)
        case "structural_tag":
            return u64(4) + text(constraint.structural_tag)
        case _:
            return u64(0)


def _logprobs(position: types_pb2.TokenLogprobs) -> bytes:
    return f64(position.logprob) + array(lambda top: u64(top.token_id) + f64(top.logprob), position.top)
