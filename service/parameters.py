"""Sampling parameters: what is wrong with those given, and what they come to.

Each message of parameters is judged by itself, so that a bad value is named where it stands, once: the batch's as
`parameters.top_p`, an item's as `items[3].parameters.top_p`. Only what is good is merged and resolved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ostinato.errors import Violation
from ostinato.v1 import types_pb2

from service.lexicon import Lexicon
from service.limits import Limits

NEW_TOKENS_DEFAULT = 128

_FLOATS = {
    # name: lowest, whether the lowest itself is allowed, highest
    "temperature": (0.0, True, 100.0),
    "top_p": (0.0, False, 1.0),
    "min_p": (0.0, True, 1.0),
    "repetition_penalty": (0.0, False, 10.0),
}


@dataclass(frozen=True, slots=True)
class Sources:
    """An item's parameters over the batch's."""

    batch: types_pb2.Parameters
    item: types_pb2.Parameters
    item_path: str

    def merged(self) -> types_pb2.Parameters:
        """Field by field: an item's replaces the batch's. To be read only."""
        if not self.item.ListFields():
            return self.batch
        merged = types_pb2.Parameters()
        merged.CopyFrom(self.batch)
        for field, _ in self.item.ListFields():
            merged.ClearField(field.name)  # type: ignore[arg-type]  # a name that is known only here
        merged.MergeFrom(self.item)
        return merged

    def violation(self, field: str, text: str) -> Violation:
        """At the place where the value that holds stands; a default's, where one would set it."""
        if _given(self.batch, field) and not _given(self.item, field):
            return Violation(f"parameters.{field}", f"{self.item_path}: {text}")
        return Violation(f"{self.item_path}.parameters.{field}", text)


def problems(
    given: types_pb2.Parameters, path: str, limits: Limits, lexicon: Lexicon, vocabulary_size: int
) -> Iterator[Violation]:
    """Everything wrong with these parameters by themselves; grammars are left to the engine."""
    for name, (low, closed, high) in _FLOATS.items():
        value = getattr(given, name)
        if given.HasField(name) and not (low < value <= high or (closed and value == low)):  # type: ignore[arg-type]
            yield Violation(f"{path}.{name}", f"must be {'' if closed else 'above '}{low:g} to {high:g}, is {value:g}")
    whole = {
        "top_k": (0, limits.top_k_max),
        "max_new_tokens": (1, limits.new_tokens_max),
        "min_new_tokens": (0, limits.new_tokens_max),
        "logprobs": (0, limits.logprobs_max),
    }
    for name, (least, most) in whole.items():
        value = getattr(given, name)
        if given.HasField(name) and not least <= value <= most:  # type: ignore[arg-type]
            yield Violation(f"{path}.{name}", f"must be {least} to {most}, is {value}")
    yield from _stops(given.stop, f"{path}.stop", limits)
    yield from _many(given.stop_token_ids, f"{path}.stop_token_ids", limits.stop_token_ids_max)
    for index, token_id in enumerate(given.stop_token_ids):
        if token_id >= vocabulary_size:
            yield Violation(f"{path}.stop_token_ids[{index}]", f"{token_id} is not below the vocabulary's {vocabulary_size}")
    yield from _many(given.bad_words, f"{path}.bad_words", limits.bad_words_max)
    for index, word in enumerate(given.bad_words):
        if not lexicon.ids_of(word):
            yield Violation(f"{path}.bad_words[{index}]", f"{_short(word)} is not one token of the model")
    if given.HasField("response_format"):
        yield from _format(given.response_format, f"{path}.response_format", limits)


def relations(merged: types_pb2.Parameters, sources: Sources, prompt_tokens: int, limits: Limits) -> Iterator[Violation]:
    """Everything wrong between parameters that are good by themselves, and between them and the prompt."""
    room = limits.context_tokens - prompt_tokens
    most = merged.max_new_tokens if merged.HasField("max_new_tokens") else new_tokens_default(prompt_tokens, limits)
    if most > room:
        text = f"prompt ({prompt_tokens}) and answer ({most}) are more than the context's {limits.context_tokens} tokens"
        yield sources.violation("max_new_tokens", text)
    if merged.min_new_tokens > most:
        yield sources.violation("min_new_tokens", f"{merged.min_new_tokens} is more than max_new_tokens, {most}")
    if merged.HasField("response_format"):
        for name in ("ignore_eos", "min_new_tokens"):
            if getattr(merged, name):
                yield sources.violation(name, "cannot go with response_format: a grammar ends its answer itself")


def resolved(
    merged: types_pb2.Parameters, prompt_tokens: int, limits: Limits, lexicon: Lexicon
) -> types_pb2.ResolvedParameters:
    """Good parameters in their one canonical form."""
    has = merged.HasField
    made = types_pb2.ResolvedParameters(
        temperature=merged.temperature + 0.0 if has("temperature") else 1.0,  # + 0.0 turns -0.0 into 0.0
        top_k=merged.top_k,
        top_p=merged.top_p if has("top_p") else 1.0,
        min_p=merged.min_p + 0.0,
        repetition_penalty=merged.repetition_penalty if has("repetition_penalty") else 1.0,
        max_new_tokens=merged.max_new_tokens if has("max_new_tokens") else new_tokens_default(prompt_tokens, limits),
        min_new_tokens=merged.min_new_tokens,
        stop=dict.fromkeys(merged.stop),
        stop_token_ids=sorted(set(merged.stop_token_ids)),
        bad_token_ids=sorted({token_id for word in merged.bad_words for token_id in lexicon.ids_of(word)}),
        ignore_eos=merged.ignore_eos,
    )
    if has("logprobs"):
        made.logprobs = merged.logprobs
    if has("response_format"):
        made.response_format.CopyFrom(merged.response_format)
    return made


def new_tokens_default(prompt_tokens: int, limits: Limits) -> int:
    """What an item that does not say gets."""
    return min(NEW_TOKENS_DEFAULT, limits.new_tokens_max, limits.context_tokens - prompt_tokens)


def _given(parameters: types_pb2.Parameters, field: str) -> bool:
    return any(descriptor.name == field for descriptor, _ in parameters.ListFields())


def _stops(stops: Sequence[str], path: str, limits: Limits) -> Iterator[Violation]:
    yield from _many(stops, path, limits.stop_max)
    for index, stop in enumerate(stops):
        if not 1 <= len(stop.encode()) <= limits.stop_bytes_max:
            yield Violation(f"{path}[{index}]", f"must be 1 to {limits.stop_bytes_max} bytes long, is {len(stop.encode())}")


def _many(values: Sequence[object], path: str, most: int) -> Iterator[Violation]:
    if len(values) > most:
        yield Violation(path, f"must be at most {most}, are {len(values)}")


def _format(constraint: types_pb2.ResponseFormat, path: str, limits: Limits) -> Iterator[Violation]:
    kind = constraint.WhichOneof("format")
    if kind is None:
        yield Violation(path, "holds neither json_schema nor regex")
        return
    size = len((constraint.json_schema if kind == "json_schema" else constraint.regex).encode())
    if not 1 <= size <= limits.format_bytes_max:
        yield Violation(f"{path}.{kind}", f"must be 1 to {limits.format_bytes_max} bytes long, is {size}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
