"""The bounds of a request.

`Limits` holds them, and Describe shows them. `ParameterBounds` makes them the one table by which sampling parameters are
judged: those of a client, and those that a sidecar submits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ostinato.errors import Violation
from ostinato.v1 import types_pb2

Conflict = Literal["max_new_tokens", "min_new_tokens", "ignore_eos"]
"""A parameter that may not go together with another."""
ABOVE_ZERO = math.ulp(0.0)
"""The least number above 0."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a request, each inclusive. Those with a default are the contract's; engine and settings give the others."""

    context_tokens: int
    new_tokens_max: int
    top_k_max: int
    batch_items_max: int
    prompt_bytes_max: int
    """Text of one prompt, before it is tokenised."""
    render_seconds_max: float
    """Processor time that the chats of one request take in the model's template."""
    stop_max: int = 16
    stop_bytes_max: int = 256
    stop_token_ids_max: int = 32
    bad_words_max: int = 32
    logprobs_max: int = 20
    format_bytes_max: int = 64 * 1024
    idempotency_key_bytes_max: int = 256
    request_id_bytes_max: int = 256

    def message(self) -> types_pb2.Limits:
        """Those that the contract shows."""
        shown = types_pb2.Limits.DESCRIPTOR.fields_by_name
        return types_pb2.Limits(**{name: getattr(self, name) for name in shown})


class ParameterBounds:
    """The bounds of sampling parameters, as a client gives them and as a sidecar submits them (resolved)."""

    def __init__(self, limits: Limits, vocabulary_size: int, parses: Mapping[types_pb2.Parse.ValueType, str]) -> None:
        """`parses`: what can be asked for, and why not where that is not empty."""
        self._limits, self._vocabulary_size, self._parses = limits, vocabulary_size, parses
        self._numbers: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 100.0),
            "top_k": (0, limits.top_k_max),
            "top_p": (ABOVE_ZERO, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (ABOVE_ZERO, 10.0),
            "max_new_tokens": (1, limits.new_tokens_max),
            "min_new_tokens": (0, limits.new_tokens_max),
            "logprobs": (0, limits.logprobs_max),
        }

    def violations(self, given: types_pb2.Parameters | types_pb2.ResolvedParameters, path: str) -> Iterator[Violation]:
        """What is wrong with each parameter by itself, except what only the engine or the vocabulary's words can tell."""
        for name, (least, most) in self._numbers.items():
            value = getattr(given, name)
            absent = given.DESCRIPTOR.fields_by_name[name].has_presence and not given.HasField(name)  # type: ignore[arg-type]
            if not (least <= value <= most or absent):  # NaN is outside
                low = "above 0" if least == ABOVE_ZERO else _number(least)
                yield Violation(f"{path}.{name}", f"must be {low} to {_number(most)}, is {_number(value)}")
        if given.stop:
            yield from _check_count(given.stop, self._limits.stop_max, f"{path}.stop")
            for index, stop in enumerate(given.stop):
                yield from _check_length(stop, self._limits.stop_bytes_max, f"{path}.stop[{index}]")
        if given.stop_token_ids:
            yield from _check_count(given.stop_token_ids, self._limits.stop_token_ids_max, f"{path}.stop_token_ids")
            yield from self._check_tokens(given.stop_token_ids, f"{path}.stop_token_ids")
        if isinstance(given, types_pb2.Parameters):
            yield from _check_count(given.bad_words, self._limits.bad_words_max, f"{path}.bad_words")
        else:
            yield from self._check_tokens(given.bad_token_ids, f"{path}.bad_token_ids")
        if given.parse:
            yield from self._check_parse(given.parse, f"{path}.parse")
        if given.HasField("response_format"):
            yield from self._check_format(given.response_format, f"{path}.response_format")

    def conflicts(self, given: types_pb2.ResolvedParameters, prompt_tokens: int) -> Iterator[tuple[Conflict, str]]:
        """What is wrong between parameters that are within their bounds, and between them and the prompt: the parameter's name
        and a description."""
        context, most = self._limits.context_tokens, given.max_new_tokens
        if prompt_tokens + most > context:
            text = f"prompt ({prompt_tokens}) and answer ({most}) are more than the context's {context} tokens"
            yield "max_new_tokens", text
        if given.min_new_tokens > most:
            yield "min_new_tokens", f"{given.min_new_tokens} is more than max_new_tokens, {most}"
        if given.HasField("response_format"):
            text = "cannot be combined with response_format: the grammar decides where the answer ends"
            if given.ignore_eos:
                yield "ignore_eos", text
            if given.min_new_tokens:
                yield "min_new_tokens", text

    def _check_tokens(self, token_ids: Sequence[int], path: str) -> Iterator[Violation]:
        for index, token_id in enumerate(token_ids):
            if token_id >= self._vocabulary_size:
                yield Violation(f"{path}[{index}]", f"{token_id} is not below the vocabulary's {self._vocabulary_size}")

    def _check_parse(self, given: Sequence[types_pb2.Parse.ValueType], path: str) -> Iterator[Violation]:
        yield from _check_count(given, len(self._parses), path)
        for index, part in enumerate(given[: len(self._parses)]):
            if why := self._parses.get(part, "must be PARSE_TOOLS or PARSE_REASONING"):
                yield Violation(f"{path}[{index}]", why)

    def _check_format(self, constraint: types_pb2.ResponseFormat, path: str) -> Iterator[Violation]:
        kind = constraint.WhichOneof("format")
        if kind is None:
            yield Violation(path, "holds no grammar: json_schema, regex, ebnf or structural_tag")
        else:
            yield from _check_length(getattr(constraint, kind), self._limits.format_bytes_max, f"{path}.{kind}")


def _check_count(values: Sequence[object], most: int, path: str) -> Iterator[Violation]:
    if len(values) > most:
        yield Violation(path, f"must be at most {most}, are {len(values)}")


def _check_length(text: str, bytes_max: int, path: str) -> Iterator[Violation]:
    size = len(text.encode())
    if not 1 <= size <= bytes_max:
        yield Violation(path, f"must be 1 to {bytes_max} bytes long, is {size}")


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
