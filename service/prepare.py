"""Items in, token ids and resolved parameters out, or every reason why not. Runs nothing and remembers nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ostinato.errors import Internal, InvalidRequest, OstinatoError, Violation, to_status
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from service.lexicon import Lexicon
from service.limits import Limits
from service.parameters import Sources, problems, relations, resolved
from service.prompts import Prompts
from service.spans import prepare_span

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
