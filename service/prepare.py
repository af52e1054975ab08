"""Items in, token ids and resolved parameters out, or every reason why not. Runs nothing and remembers nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ostinato.errors import Internal, InvalidRequest, OstinatoError, Violation, invalid, to_status
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from service.answer import Lexicon
from service.engines.base import ROLES, Vocabulary
from service.observe import prepare_span

_log = logging.getLogger(__name__)

RECEIPT_BYTES = 1024
"""Of a serialised Result, all but the output's text, ids and logprobs, at worst."""


@dataclass(frozen=True, slots=True)
class Preparer:
    """Safe in any thread."""

    prompts: Prompts
    lexicon: Lexicon
    check_format: Callable[[types_pb2.ResponseFormat], None]
    """The engine's: raises ValueError for a grammar that it cannot obey."""
    model_digest: bytes

    @property
    def limits(self) -> Limits:
        return self.prompts.limits

    def prepare(self, request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
        """Raises InvalidRequest with all that is wrong, each by its path."""
        found = _Found()
        self._count(request.items, found)
        found.extend(self._judge(request.parameters, "parameters"))
        sound = not found.violations
        items = [self._item(item, request.parameters, f"items[{i}]", found, sound) for i, item in enumerate(request.items)]
        found.raise_if_any()
        return engine_pb2.PrepareResponse(items=(item for item in items if item is not None), model_digest=self.model_digest)

    def answer(self, request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
        """As `prepare`, for a stream that must outlive a bad request: what that raises is the answer."""
        with prepare_span(request.traceparent) as span:
            try:
                response = self.prepare(request)
            except OstinatoError as error:
                span.fail(error.reason, fault=False)
                response = engine_pb2.PrepareResponse(refused=to_status(error))
            except Exception:  # noqa: BLE001  # whatever it is, the caller gets a code and the log gets the rest
                _log.exception("could not prepare")
                span.fail(Internal.reason)
                response = engine_pb2.PrepareResponse(refused=to_status(Internal("internal error")))
            response.prepare_id = request.prepare_id
            return response

    def tokenize(self, request: generation_pb2.TokenizeRequest) -> generation_pb2.TokenizeResponse:
        """The prompts' token ids; parameters are not looked at. Raises InvalidRequest."""
        found = _Found()
        self._count(request.items, found)
        ids = [found.ids(self.prompts, item, f"items[{index}]") for index, item in enumerate(request.items)]
        found.raise_if_any()
        return generation_pb2.TokenizeResponse(results=(types_pb2.TokenIds(ids=each) for each in ids))

    def _count(self, items: Sequence[types_pb2.Item], found: _Found) -> None:
        """Raises at once: of too many items, none is looked at."""
        if not 1 <= len(items) <= self.limits.batch_items_max:
            found.add(Violation("items", f"must be 1 to {self.limits.batch_items_max}, are {len(items)}"))
            found.raise_if_any()

    def _item(
        self, item: types_pb2.Item, batch: types_pb2.Parameters, path: str, found: _Found, sound: bool
    ) -> engine_pb2.PreparedItem | None:
        """None: something is wrong with it, or with the batch's parameters (not `sound`), and relations cannot be judged."""
        before = len(found.violations)
        found.extend(self._judge(item.parameters, f"{path}.parameters"))
        ids = found.ids(self.prompts, item, path)
        if not sound or len(found.violations) > before:
            return None
        sources = Sources(batch, item.parameters, path)
        merged = sources.merged()
        found.extend(relations(merged, sources, len(ids), self.limits))
        if len(found.violations) > before:
            return None
        parameters = resolved(merged, len(ids), self.limits, self.lexicon)
        return engine_pb2.PreparedItem(
            token_ids=ids,
            parameters=parameters,
            seed=merged.seed if merged.HasField("seed") else None,
            kv_tokens=len(ids) + parameters.max_new_tokens,
            result_bytes=result_bytes(parameters, self.lexicon.text_bytes_max, self.prompts.vocabulary.size),
        )

    def _judge(self, given: types_pb2.Parameters, path: str) -> list[Violation]:
        """What is wrong with these by themselves, by the engine's judgement too."""
        if not given.ListFields():
            return []
        found = list(problems(given, path, self.limits, self.lexicon, self.prompts.vocabulary.size))
        where = f"{path}.response_format"
        if given.HasField("response_format") and not any(violation.field.startswith(where) for violation in found):
            try:
                self.check_format(given.response_format)
            except ValueError as error:
                found.append(Violation(f"{where}.{given.response_format.WhichOneof('format')}", str(error)))
        return found


@dataclass(slots=True)
class _Found:
    """Violations so far."""

    violations: list[Violation] = field(default_factory=list)

    def add(self, violation: Violation) -> None:
        self.violations.append(violation)

    def extend(self, violations: Iterable[Violation]) -> None:
        self.violations.extend(violations)

    def ids(self, prompts: Prompts, item: types_pb2.Item, path: str) -> Sequence[int]:
        """The item's token ids; none where they are what is wrong."""
        try:
            return prompts.token_ids(item, path)
        except InvalidRequest as error:
            self.extend(error.violations)
            return ()

    def raise_if_any(self) -> None:
        if self.violations:
            raise InvalidRequest(violations=self.violations)


def result_bytes(parameters: types_pb2.ResolvedParameters, text_bytes_max: int, vocabulary_size: int) -> int:
    """Bytes of the serialised Result at worst: every token the longest, every varint at its widest."""
    id_bytes = max(1, ((vocabulary_size - 1).bit_length() + 6) // 7)
    per_token = id_bytes + text_bytes_max
    if parameters.HasField("logprobs"):
        # A double has 9 bytes with its tag; a message has its tag and a length of one or two bytes.
        per_token += 3 + 9 + parameters.logprobs * (2 + 1 + id_bytes + 9)
    stop_bytes = max((len(stop.encode()) for stop in parameters.stop), default=0)
    return RECEIPT_BYTES + stop_bytes + parameters.max_new_tokens * per_token


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds, each inclusive. The engine and the settings give the first five; the rest are the contract's."""

    context_tokens: int
    new_tokens_max: int
    top_k_max: int
    batch_items_max: int
    prompt_bytes_max: int
    """Of one prompt's text, before it is tokenised."""
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
        for descriptor, _ in self.item.ListFields():
            merged.ClearField(descriptor.name)  # type: ignore[arg-type]  # a name that is known only here
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


@dataclass(frozen=True, slots=True)
class Prompts:
    """Pure, and safe in any thread."""

    vocabulary: Vocabulary
    limits: Limits
    chat: bool
    """Whether chats can be rendered."""

    def token_ids(self, item: types_pb2.Item, path: str) -> Sequence[int]:
        """1 to context_tokens - 1 ids. Raises InvalidRequest that names what is wrong under `path`, such as `items[3]`."""
        given = [name for name in ("text", "token_ids", "chat") if item.HasField(name)]
        if len(given) != 1:
            text = f"has {len(given)} prompts ({', '.join(given)})" if given else "has no prompt"
            raise invalid(path, f"{text}: exactly one of text, token_ids and chat is wanted")
        where = f"{path}.{given[0]}"
        match given[0]:
            case "text":
                ids: Sequence[int] = self._text(item.text, where)
            case "token_ids":
                ids = self._ids(item.token_ids.ids, where)
            case _:
                ids = self._chat(item.chat.messages, where)
        most, size = self.limits.context_tokens - 1, self.vocabulary.size
        if not 1 <= len(ids) <= most:
            raise invalid(where, f"must be 1 to {most} tokens, is {len(ids)}")
        if (highest := max(ids)) >= size:  # a tokenizer may have more tokens than its model has rows for
            raise invalid(where, f"has a token, {highest}, that is not below the vocabulary's {size}")
        return ids

    def _text(self, text: str, where: str) -> Sequence[int]:
        if not text:
            raise invalid(where, "is empty")
        self._bounded(len(text.encode()), where)
        return self.vocabulary.encode(text, special=False)

    def _ids(self, ids: Sequence[int], where: str) -> Sequence[int]:
        size = self.vocabulary.size
        if ids and max(ids) >= size:
            index = next(index for index, token_id in enumerate(ids) if token_id >= size)
            raise invalid(f"{where}.ids[{index}]", f"{ids[index]} is not below the vocabulary's {size}")
        return ids

    def _chat(self, messages: Sequence[types_pb2.Message], where: str) -> Sequence[int]:
        if not self.chat:
            raise invalid(where, "this model has no chat template")
        if not messages:
            raise invalid(where, "has no messages")
        unknown = [
            Violation(f"{where}.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
            for index, message in enumerate(messages)
            if message.role not in ROLES
        ]
        if unknown:
            raise InvalidRequest(violations=unknown)
        self._bounded(sum(len(message.content.encode()) for message in messages), where)
        try:
            text = self.vocabulary.render(messages)
        except ValueError as error:
            raise invalid(where, f"the model's template refuses it: {error}") from error
        self._bounded(len(text.encode()), where)
        return self.vocabulary.encode(text, special=True)

    def _bounded(self, size: int, where: str) -> None:
        if size > self.limits.prompt_bytes_max:
            raise invalid(where, f"must be at most {self.limits.prompt_bytes_max} bytes of text, is {size}")
