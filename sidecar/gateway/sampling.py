"""A gateway's request as ours: every field mapped, or refused by name. Nothing is dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from ostinato import errors
from ostinato.errors import Violation
from ostinato.v1 import generation_pb2, types_pb2

SEED_MAX = 2**31 - 2
"""Of those that can be what the caller asked for: the gateway turns every larger one into 2**31 - 1."""

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "logprobs": "logprobs",
    "json_schema": "response_format.json_schema",
    "json_object": "response_format.json_schema",
    "regex": "response_format.regex",
    "seed": "seed",
}
"""Theirs, and what it is called here."""
OF_THE_TEXT = frozenset({"skip_special_tokens", "spaces_between_special_tokens", "grammar_from_first_token"})
"""Nothing to do: the gateway makes the text out of the tokens, and a grammar of ours starts at the first token anyway."""
REQUEST = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream"})
_PATHS = {f"parameters.{own}": f"sampling_params.{theirs}" for theirs, own in PARAMETERS.items() if theirs != "json_object"}


def request_of(theirs: vllm.GenerateRequest, items_max: int) -> generation_pb2.GenerateRequest:
    """One item for each of `n`; a given seed is the first one's, and counts up. Raises InvalidRequest with every bad field."""
    given = theirs.sampling_params
    violations = [*_unknown(theirs, REQUEST, ""), *_unknown(given, {*PARAMETERS, *OF_THE_TEXT, "n"}, "sampling_params.")]
    violations += _bad(theirs, items_max)
    if violations:
        raise errors.InvalidRequest(violations=violations)
    prompt = types_pb2.Item()
    if theirs.WhichOneof("input") == "text":
        prompt.text = theirs.text
    else:
        prompt.token_ids.ids.extend(theirs.tokenized.input_ids)
    request = generation_pb2.GenerateRequest(request_id=theirs.request_id, parameters=_parameters(given))
    for index in range(given.n or 1):
        request.items.append(prompt)
        if given.HasField("seed"):
            request.items[-1].parameters.seed = given.seed + index
    return request


def in_their_words(error: errors.OstinatoError) -> errors.OstinatoError:
    """The error, with bad fields called what the gateway calls them."""
    if not isinstance(error, errors.InvalidRequest) or not error.violations:
        return error
    return errors.InvalidRequest(violations=[Violation(_path(each.field), each.description) for each in error.violations])


def _parameters(given: vllm.SamplingParams) -> types_pb2.Parameters:
    """All but the seed, by way of JSON: there a 32-bit number is written as people do, 0.7 and not 0.699999988079071, so that
    a gateway's request is the same input as another client's. A field that reads as zero because it is not set is not there."""
    made: dict[str, Any] = {}
    for theirs, value in json_format.MessageToDict(given, preserving_proto_field_name=True).items():
        match theirs:
            case "json_schema" | "regex":
                made["response_format"] = {theirs: value}
            case "json_object" if value:
                made["response_format"] = {"json_schema": '{"type":"object"}'}
            case _ if theirs in PARAMETERS and theirs not in ("json_object", "seed"):
                made[PARAMETERS[theirs]] = value
    return json_format.ParseDict(made, types_pb2.Parameters())


def _bad(theirs: vllm.GenerateRequest, items_max: int) -> Iterator[Violation]:
    given = theirs.sampling_params
    if theirs.WhichOneof("input") is None:
        yield Violation("tokenized", "is missing, and so is text")
    if given.HasField("seed") and not 0 <= given.seed <= SEED_MAX:
        why = "a gateway cuts others down to 32 bits in silence, so this one may not be the caller's"
        yield Violation("sampling_params.seed", f"must be 0 to {SEED_MAX}, is {given.seed}: {why}")
    if given.n > items_max:
        yield Violation("sampling_params.n", f"must be at most {items_max}, is {given.n}")
    for name in ("top_k", "max_tokens", "min_tokens"):
        if getattr(given, name) >= 1 << 31:
            yield Violation(f"sampling_params.{name}", f"{getattr(given, name)} is too large")


def _unknown(message: Message, known: frozenset[str] | set[str], path: str) -> Iterator[Violation]:
    """Fields that are set and mean nothing here."""
    for field, _ in message.ListFields():
        if field.name not in known:
            yield Violation(f"{path}{field.name}", "is not supported")


def _path(field: str) -> str:
    """Of a field of ours, theirs. All items have one prompt, and their parameters are the batch's."""
    own = re.sub(r"^items\[\d+\]\.(?=parameters\.)", "", field)
    if own.startswith("items["):
        return "tokenized.input_ids"
    if own == "items":
        return "sampling_params.n"
    longest = max((path for path in _PATHS if re.match(rf"{re.escape(path)}\b", own)), key=len, default=None)
    return own if longest is None else _PATHS[longest] + own.removeprefix(longest)
