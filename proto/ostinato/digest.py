"""The digests: what was asked, what went in, what came out, on what it ran; the seed nobody gave, and lots.

Field order is fixed by docs/protocol.md; test vectors stand in tests/ostinato/vectors.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from google.protobuf.message import Message

from ostinato.canonical import array, blob, digest, f64, i64, ids, maybe, text, u64
from ostinato.v1 import generation_pb2, types_pb2

T = TypeVar("T")

REMEMBERED_BYTES_MAX = 1_024
"""Of an item's parameters; those with a grammar are longer."""


def request_digest(request: generation_pb2.GenerateRequest) -> bytes:
    """Of the batch as sent, less request_id and idempotency_key: equal digests are one request."""
    return digest(
        "request",
        array(_item, request.items),
        maybe(_parameters, _set(request, "parameters", request.parameters)),
        i64(request.required_grade),
        u64(request.verify),
    )


def input_digest(token_ids: Sequence[int], parameters: types_pb2.ResolvedParameters, seed: int) -> bytes:
    """Of all that a request adds to the fingerprint: two runs with equal ones may be compared."""
    return digest("input", ids(token_ids), _resolved(parameters), u64(seed))


def unseeded_input_digest(token_ids: Sequence[int], parameters: types_pb2.ResolvedParameters) -> bytes:
    """Of the input but for its seed: where two of these are equal and both seeds were derived, outputs should differ."""
    return digest("unseeded-input", ids(token_ids), _resolved(parameters))


def output_digest(output: types_pb2.Output) -> bytes:
    """Of token ids, finish reason and matched stop. The text follows from them."""
    return digest("output", ids(output.token_ids), i64(output.finish_reason), text(output.matched_stop))


def logprobs_digest(output: types_pb2.Output) -> bytes:
    """Of the logprobs' bits; empty where there are none."""
    if not output.logprobs:
        return b""
    return digest("logprobs", array(_logprobs, output.logprobs))


def fingerprint_digest(fields: Mapping[str, str]) -> bytes:
    """Of names and values, ascending by the names' UTF-8 bytes."""
    pairs = sorted((name.encode(), value.encode()) for name, value in fields.items())
    return digest("fingerprint", array(lambda pair: blob(pair[0]) + blob(pair[1]), pairs))


def model_digest(fields: Mapping[str, str]) -> bytes:
    """Of the part of a fingerprint that makes it another model: what was prepared for one must not run on another."""
    return digest("model", *(text(fields.get(name, "")) for name in ("model", "weights", "tokenizer", "template")))


def derived_seed(log_id: str, sequence: int) -> int:
    """The seed of an item that came without one: unique in its log, and known to whoever knows the number."""
    return int.from_bytes(digest("seed", text(log_id), u64(sequence))[:8])


def sampling_hash(lot: str, log_id: str, sequence: int) -> int:
    """What an item draws in a lot ("audit"): a uint64, the same whoever asks and whenever."""
    return int.from_bytes(digest(lot, text(log_id), u64(sequence))[:8])


def is_sampled(lot: str, log_id: str, sequence: int, rate: float) -> bool:
    """Whether the item belongs to this share, 0 to 1, of all items."""
    return sampling_hash(lot, log_id, sequence) < int(rate * 2**64)


def _set(message: Message, field: str, value: T) -> T | None:
    return value if message.HasField(field) else None


def _item(item: types_pb2.Item) -> bytes:
    return b"".join(
        (
            maybe(text, _set(item, "text", item.text)),
            maybe(lambda prompt: ids(prompt.ids), _set(item, "token_ids", item.token_ids)),
            maybe(lambda chat: array(_message, chat.messages), _set(item, "chat", item.chat)),
            maybe(_parameters, _set(item, "parameters", item.parameters)),
        )
    )


def _message(message: types_pb2.Message) -> bytes:
    return text(message.role) + text(message.content)


def _parameters(given: types_pb2.Parameters) -> bytes:
    return b"".join(
        (
            maybe(u64, _set(given, "seed", given.seed)),
            maybe(f64, _set(given, "temperature", given.temperature)),
            maybe(i64, _set(given, "top_k", given.top_k)),
            maybe(f64, _set(given, "top_p", given.top_p)),
            maybe(f64, _set(given, "min_p", given.min_p)),
            maybe(f64, _set(given, "repetition_penalty", given.repetition_penalty)),
            maybe(i64, _set(given, "max_new_tokens", given.max_new_tokens)),
            maybe(i64, _set(given, "min_new_tokens", given.min_new_tokens)),
            array(text, given.stop),
            ids(given.stop_token_ids),
            array(text, given.bad_words),
            maybe(u64, _set(given, "ignore_eos", given.ignore_eos)),
            maybe(i64, _set(given, "logprobs", given.logprobs)),
            maybe(_format, _set(given, "response_format", given.response_format)),
        )
    )


def _resolved(resolved: types_pb2.ResolvedParameters) -> bytes:
    # Most items are asked for with few parameters, and the same ones; to serialise them costs a fifth of this.
    serialised = resolved.SerializeToString(deterministic=True)
    return _parsed(serialised) if len(serialised) <= REMEMBERED_BYTES_MAX else _encoded(resolved)


@lru_cache(maxsize=256)
def _parsed(serialised: bytes) -> bytes:
    return _encoded(types_pb2.ResolvedParameters.FromString(serialised))


def _encoded(resolved: types_pb2.ResolvedParameters) -> bytes:
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
            maybe(u64, _set(resolved, "logprobs", resolved.logprobs)),
            maybe(_format, _set(resolved, "response_format", resolved.response_format)),
        )
    )


def _format(constraint: types_pb2.ResponseFormat) -> bytes:
    match constraint.WhichOneof("format"):
        case "json_schema":
            return u64(1) + text(constraint.json_schema)
        case "regex":
            return u64(2) + text(constraint.regex)
        case _:
            return u64(0)


def _logprobs(position: types_pb2.TokenLogprobs) -> bytes:
    return f64(position.logprob) + array(lambda top: u64(top.token_id) + f64(top.logprob), position.top)
