"""Items to token ids and resolved parameters, or every reason why not. Runs nothing and keeps nothing.

Sampling parameters are judged by one table (bounds.py): a client's in `Preparer.prepare`, and those that a sidecar submits in
`Preparer.check_submit`. What takes long is done in the threads of `Workers`.

In a chat, what a caller writes is data: a control token in a message, a tool or an argument is ordinary text, unless the chat
allows control tokens. To tell the template's own control tokens from others, the chat is rendered again with marks in the
caller's strings. A token that is not a control token, such as `<think>` in many models, is recognised everywhere, as in a text.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from ostinato.digest import by_content
from ostinato.errors import Cancelled, Internal, InvalidRequest, OstinatoError, QueueFull, Violation, invalid, to_status
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from service.bounds import Limits, ParameterBounds
from service.chat import Conversation, OutOfBounds, RenderBounds
from service.engines.base import Span, TooManyTokens, Vocabulary
from service.observe import prepare_span
from service.parse import form_of

Wanted = Callable[[], bool]
"""Whether a caller still waits for the result."""
FORMATS_MAX = 16
"""Different grammars in one request. Each may take half a second to compile."""
NEW_TOKENS_DEFAULT = 128
RECEIPT_BYTES = 1024
"""The most that a serialised Result takes besides the output's text, ids and logprobs."""
RETRY_SECONDS = 1.0
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})
"""May be the name of a control token, as in `<|user|>`."""
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Code points without a meaning, for marks."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def always() -> bool:
    return True


class Preparer:
    """Safe in any thread."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        limits: Limits,
        check_format: Callable[[types_pb2.ResponseFormat], None],
        model_digest: bytes,
        *,
        chat: bool,
    ) -> None:
        """`check_format`: the engine's, which raises ValueError for a grammar that it does not support. `chat`: whether the
        vocabulary can render chats."""
        self.vocabulary, self.lexicon, self.chats = vocabulary, Lexicon(vocabulary), ChatTokenizer(vocabulary)
        self.limits, self.check_format, self.chat, self._model_digest = limits, check_format, chat, model_digest
        no_calls = "" if form_of(vocabulary.template) else "the chat template has no form of tool calls that is known here"
        parses = {types_pb2.PARSE_TOOLS: no_calls, types_pb2.PARSE_REASONING: ""}
        self.bounds = ParameterBounds(limits, vocabulary.size, parses)
        most = vocabulary.source_bytes_max
        self.text_bytes_max = min(limits.prompt_bytes_max, limits.context_tokens * (most or limits.prompt_bytes_max))
        # The operator may have lowered new_tokens_max since the run was recorded. The context is what the engine can hold.
        engine_limits = replace(limits, new_tokens_max=limits.context_tokens - 1)
        self._submit_bounds = bounds = ParameterBounds(engine_limits, vocabulary.size, parses)
        judged = by_content(types_pb2.ResolvedParameters)
        self._submit_violations = judged(lambda given: list(bounds.violations(given, "parameters")))

    def prepare(self, request: engine_pb2.PrepareRequest, wanted: Wanted = always) -> engine_pb2.PrepareResponse:
        """Raises InvalidRequest with everything that is wrong, each by its path; Cancelled when it is not wanted any more."""
        response = engine_pb2.PrepareResponse(model_digest=self._model_digest)
        _Request(self, request.items, wanted).prepare(request.parameters, response)
        return response

    def answer(self, request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
        """As `prepare`, for a stream: an error is part of the response, because it must not end the stream."""
        with prepare_span(request.traceparent) as span:
            try:
                response = self.prepare(request)
            except OstinatoError as error:
                span.fail(error.reason, fault=False)
                response = engine_pb2.PrepareResponse(refused=to_status(error))
            except Exception:  # noqa: BLE001  # the caller gets a code, the log the rest
                _log.exception("could not prepare")
                span.fail(Internal.reason)
                response = engine_pb2.PrepareResponse(refused=to_status(Internal("internal error")))
            response.prepare_id = request.prepare_id
            return response

    def tokenize(self, request: generation_pb2.TokenizeRequest, wanted: Wanted = always) -> generation_pb2.TokenizeResponse:
        """The prompts' token ids; parameters are ignored. Raises InvalidRequest and Cancelled as `prepare`."""
        ids = _Request(self, request.items, wanted).token_ids()
        return generation_pb2.TokenizeResponse(results=(types_pb2.TokenIds(ids=each) for each in ids))

    def check_submit(self, submit: engine_pb2.Submit) -> InvalidRequest | None:
        """Why the engine cannot take this run. Prepare has checked it already, but perhaps in an earlier service with another
        model; and some of these values would crash the process."""
        found: list[Violation] = []
        highest = max(submit.token_ids)
        if highest >= self.vocabulary.size:
            found.append(Violation("token_ids", f"{highest} is not below the vocabulary's {self.vocabulary.size}"))
        found += self._submit_violations(submit.parameters)
        if not found:
            conflicts = self._submit_bounds.conflicts(submit.parameters, len(submit.token_ids))
            found += [Violation(f"parameters.{name}", text) for name, text in conflicts]
        return InvalidRequest(violations=found) if found else None


class _Request:
    """One request while it is prepared: what is wrong with it so far, and what is bounded over all of its items."""

    def __init__(self, preparer: Preparer, items: Sequence[types_pb2.Item], wanted: Wanted) -> None:
        most = preparer.limits.batch_items_max
        if not 1 <= len(items) <= most:
            raise invalid("items", f"must be 1 to {most}, are {len(items)}")
        self._vocabulary, self._lexicon, self._limits = preparer.vocabulary, preparer.lexicon, preparer.limits
        self._preparer, self._items, self._wanted = preparer, items, wanted
        self._found: list[Violation] = []
        self._formats: dict[bytes, str] = {}
        """What is wrong with each grammar so far; empty: nothing."""
        self._shared: dict[tuple[bytes, int], engine_pb2.PreparedItem] = {}
        """By an item's own parameters, and the length of answers without one."""
        self._rendering = RenderBounds(preparer.text_bytes_max, self._limits.render_seconds_max)

    def prepare(self, batch: types_pb2.Parameters, response: engine_pb2.PrepareResponse) -> None:
        """With the batch's parameters. Equal items are prepared once. Raises as `Preparer.prepare`."""
        self._judge(batch, "parameters")
        good_batch, known = not self._found, dict[bytes, engine_pb2.PreparedItem]()
        for path, item in self._each():
            key = item.SerializeToString(deterministic=True)
            prepared = known.get(key) or self._item(item, batch, path, good_batch=good_batch)
            if prepared is not None and not self._found:
                known[key] = prepared
                response.items.append(prepared)
        self._raise_found()

    def token_ids(self) -> list[Sequence[int]]:
        """Raises as `Preparer.prepare`."""
        ids = [self._token_ids(item, path) for path, item in self._each()]
        self._raise_found()
        return ids

    def _each(self) -> Iterator[tuple[str, types_pb2.Item]]:
        """The items with their paths."""
        for index, item in enumerate(self._items):
            if not self._wanted():
                raise Cancelled("the caller went away")
            yield f"items[{index}]", item

    def _raise_found(self) -> None:
        if self._found:
            raise InvalidRequest(violations=self._found)

    def _item(
        self, item: types_pb2.Item, batch: types_pb2.Parameters, path: str, *, good_batch: bool
    ) -> engine_pb2.PreparedItem | None:
        """None: the item or the batch's parameters are out of bounds; conflicts are not judged."""
        before = len(self._found)
        self._judge(item.parameters, f"{path}.parameters")
        ids = self._token_ids(item, path)
        if not good_batch or len(self._found) > before:
            return None
        prepared = engine_pb2.PreparedItem()
        prepared.CopyFrom(self._without_prompt(batch, item.parameters, len(ids)))
        for name, text in self._preparer.bounds.conflicts(prepared.parameters, len(ids)):
            if batch.HasField(name) and not item.parameters.HasField(name):
                self._found.append(Violation(f"parameters.{name}", f"{path}: {text}"))
            else:
                self._found.append(Violation(f"{path}.parameters.{name}", text))
        prepared.token_ids.extend(ids)
        prepared.kv_tokens = len(ids) + prepared.parameters.max_new_tokens
        return prepared

    def _without_prompt(
        self, batch: types_pb2.Parameters, own: types_pb2.Parameters, prompt_tokens: int
    ) -> engine_pb2.PreparedItem:
        """What items with the same parameters share, made once. `prompt_tokens` matter only to the default length."""
        new_tokens = min(NEW_TOKENS_DEFAULT, self._limits.new_tokens_max, self._limits.context_tokens - prompt_tokens)
        key = own.SerializeToString(deterministic=True), new_tokens
        if key not in self._shared:
            merged = _merged(batch, own)
            parameters = self._resolved(merged, new_tokens)
            self._shared[key] = engine_pb2.PreparedItem(
                parameters=parameters,
                seed=merged.seed if merged.HasField("seed") else None,
                result_bytes=result_bytes(parameters, self._token_bytes_max(parameters), self._vocabulary.size),
            )
        return self._shared[key]

    def _judge(self, given: types_pb2.Parameters, path: str) -> None:
        """A client's parameters by themselves. Each value is judged where it is given: the batch's as `parameters.top_p`, an
        item's as `items[3].parameters.top_p`."""
        if not given.ListFields():
            return
        found = list(self._preparer.bounds.violations(given, path))
        for index, word in enumerate(given.bad_words):
            if not self._lexicon.ids_of(word):
                found.append(Violation(f"{path}.bad_words[{index}]", f"{_short(word)} is not one token of the model"))
        format_path = f"{path}.response_format"
        judged = given.HasField("response_format") and not any(each.field.startswith(format_path) for each in found)
        if judged and (problem := self._format_problem(given.response_format)):
            found.append(Violation(f"{format_path}.{given.response_format.WhichOneof('format')}", problem))
        self._found += found

    def _format_problem(self, given: types_pb2.ResponseFormat) -> str:
        """What is wrong with a grammar, which is judged once; empty: nothing."""
        key = given.SerializeToString(deterministic=True)
        if key not in self._formats:
            if len(self._formats) >= FORMATS_MAX:
                return f"is one more than the {FORMATS_MAX} different ones that a request may have"
            try:
                self._preparer.check_format(given)
                self._formats[key] = ""
            except ValueError as error:
                self._formats[key] = str(error)
        return self._formats[key]

    def _resolved(self, merged: types_pb2.Parameters, new_tokens: int) -> types_pb2.ResolvedParameters:
        """The one canonical form of parameters that are within their bounds. `new_tokens`: if they give no length."""
        has = merged.HasField
        return types_pb2.ResolvedParameters(
            temperature=merged.temperature + 0.0 if has("temperature") else 1.0,  # + 0.0 turns -0.0 into 0.0
            top_k=merged.top_k,
            top_p=merged.top_p if has("top_p") else 1.0,
            min_p=merged.min_p + 0.0,
            repetition_penalty=merged.repetition_penalty if has("repetition_penalty") else 1.0,
            max_new_tokens=merged.max_new_tokens if has("max_new_tokens") else new_tokens,
            min_new_tokens=merged.min_new_tokens,
            stop=dict.fromkeys(merged.stop),
            stop_token_ids=sorted(set(merged.stop_token_ids)),
            bad_token_ids=sorted({token_id for word in merged.bad_words for token_id in self._lexicon.ids_of(word)}),
            ignore_eos=merged.ignore_eos,
            logprobs=merged.logprobs if has("logprobs") else None,
            response_format=merged.response_format if has("response_format") else None,
            include_stop=merged.include_stop,
            keep_special_tokens=has("skip_special_tokens") and not merged.skip_special_tokens,
            parse=sorted(set(merged.parse)),
        )

    def _token_bytes_max(self, resolved: types_pb2.ResolvedParameters) -> int:
        """Of the text that one token can add. What is parsed out of the text may have its length once more, and a little for
        each call."""
        text_bytes_max = self._lexicon.text_bytes_max
        if resolved.keep_special_tokens or resolved.parse:
            text_bytes_max = max(text_bytes_max, self._lexicon.control_bytes_max)
        return text_bytes_max * (3 if resolved.parse else 1)

    def _token_ids(self, item: types_pb2.Item, path: str) -> Sequence[int]:
        """1 to context_tokens - 1 ids; none for a bad prompt."""
        try:
            return self._prompt(item, path)
        except InvalidRequest as error:
            self._found += error.violations
            return ()

    def _prompt(self, item: types_pb2.Item, path: str) -> Sequence[int]:
        given = [name for name in ("text", "token_ids", "chat") if item.HasField(name)]
        if len(given) != 1:
            text = f"has {len(given)} prompts ({', '.join(given)})" if given else "has no prompt"
            raise invalid(path, f"{text}: exactly one of text, token_ids and chat is required")
        where, most, size = f"{path}.{given[0]}", self._limits.context_tokens - 1, self._vocabulary.size
        try:
            match given[0]:
                case "text":
                    ids = self._text(item.text, where)
                case "token_ids":
                    ids = self._ids(item.token_ids.ids, where)
                case _:
                    ids = self._rendered(item.chat, where)
        except TooManyTokens as error:
            raise invalid(where, f"must be 1 to {most} tokens, is {error.count} or more") from None
        if not 1 <= len(ids) <= most:
            raise invalid(where, f"must be 1 to {most} tokens, is {len(ids)}")
        if (highest := max(ids)) >= size:  # a tokenizer may have more tokens than its model has rows for
            raise invalid(where, f"has a token, {highest}, that is not below the vocabulary's {size}")
        return ids

    def _text(self, text: str, where: str) -> Sequence[int]:
        if not text:
            raise invalid(where, "is empty")
        _check_prompt_bytes(len(text.encode()), self._preparer.text_bytes_max, where)
        return self._vocabulary.encode(text, special=False, most=self._limits.context_tokens - 1)

    def _ids(self, ids: Sequence[int], where: str) -> Sequence[int]:
        size = self._vocabulary.size
        if ids and max(ids) >= size:
            index = next(index for index, token_id in enumerate(ids) if token_id >= size)
            raise invalid(f"{where}.ids[{index}]", f"{ids[index]} is not below the vocabulary's {size}")
        return ids

    def _rendered(self, chat: types_pb2.Chat, where: str) -> Sequence[int]:
        if not self._preparer.chat:
            raise invalid(where, "this model has no chat template")
        _check_prompt_bytes(chat.ByteSize(), self._limits.prompt_bytes_max, where)
        conversation, most = Conversation.of(chat, where), self._limits.context_tokens - 1
        try:
            return self._preparer.chats.token_ids(
                conversation, self._rendering, allow_control_tokens=chat.allow_control_tokens, most=most
            )
        except OutOfBounds as error:
            raise invalid(where, str(error)) from None
        except ValueError as error:
            raise invalid(where, f"the model's template refuses it: {error}") from error


def _check_prompt_bytes(size: int, most: int, where: str) -> None:
    """A text that can never fit the context is not tokenised."""
    if size > most:
        raise invalid(where, f"must be at most {most} bytes of text, is {size}")


def result_bytes(parameters: types_pb2.ResolvedParameters, text_bytes_max: int, vocabulary_size: int) -> int:
    """The most bytes that the serialised Result can have: every token the longest, every varint at its widest."""
    id_bytes = max(1, ((vocabulary_size - 1).bit_length() + 6) // 7)
    per_token = id_bytes + text_bytes_max
    if parameters.HasField("logprobs"):
        # A double has 9 bytes with its tag; a message has its tag and a length of one or two bytes.
        per_token += 3 + 9 + parameters.logprobs * (2 + 1 + id_bytes + 9)
    stop_bytes = max((len(stop.encode()) for stop in parameters.stop), default=0)
    return RECEIPT_BYTES + stop_bytes + parameters.max_new_tokens * per_token


def _merged(batch: types_pb2.Parameters, item: types_pb2.Parameters) -> types_pb2.Parameters:
    """Field by field, an item's replaces the batch's. The result is read only: it may be `batch`."""
    if not item.ListFields():
        return batch
    merged = types_pb2.Parameters()
    merged.CopyFrom(batch)
    for descriptor, _ in item.ListFields():
        merged.ClearField(descriptor.name)  # type: ignore[arg-type]  # a name that is known only here
    merged.MergeFrom(item)
    return merged


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


# ---- chats


class ChatTokenizer:
    """Chats to token ids. Safe in any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._begin, self._control_ids = vocabulary.encode("", special=True), frozenset(vocabulary.controls.values())
        longest_first = sorted(vocabulary.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._firsts = frozenset(control[0] for control in longest_first)
        self._names = frozenset(name for control in longest_first if (name := _name(control)) not in ROLES)

    def token_ids(
        self, given: Conversation, bounds: RenderBounds, *, allow_control_tokens: bool, most: int = sys.maxsize
    ) -> list[int]:
        """Of the rendered chat. Only the template's own control tokens are control tokens, unless others are allowed.

        Raises ValueError with the template's message, or if the two cannot be told apart, or for a role that is the name of a
        control token, because some templates build control tokens from roles; OutOfBounds; and TooManyTokens, perhaps, for more
        than `most`.
        """
        for message in given.messages:
            if message["role"] in self._names:
                raise ValueError(f"the role {message['role']} is the name of a control token")
        text = self._vocabulary.render(given, bounds)
        vocabulary, every = self._vocabulary, _spans(self._control, text)
        own = every if allow_control_tokens else self._own(given, bounds, text, every)
        if own == every:
            ids = vocabulary.encode(text, special=True, most=most)
            written = [vocabulary.controls[text[first:last]] for first, last in own]
            found = [token_id for token_id in ids if token_id in self._control_ids]
            # A tokenizer may find others than `every`: it may change the text before it looks for them.
            if allow_control_tokens or found in (written, self._begin + written):
                return ids
        return vocabulary.encode_at(text, own, most=most)

    def _own(self, given: Conversation, bounds: RenderBounds, text: str, every: list[Span]) -> list[Span]:
        """Where the template's own control tokens are: all, if the caller's strings cannot make any.

        The caller's strings are marked in two ways. If the first characters of control tokens are marked wherever they stand,
        strings that are put together cannot make a control token either; but the template may look for such characters. If only
        whole control tokens are marked, it rarely does; then it must write the same control tokens as with the other marks.
        """
        if not any(first in string for string in given.strings() for first in self._firsts):
            return every
        marks = self._marks(text, given)
        plain = str.maketrans({mark: first for first, mark in marks.items()})
        everywhere = str.maketrans(marks)
        marked = self._vocabulary.render(given.mapped(lambda string: string.translate(everywhere)), bounds)
        if marked.translate(plain) == text:
            return _spans(self._control, marked)
        written = self._control.findall(marked)
        marked = self._vocabulary.render(
            given.mapped(lambda string: self._control.sub(lambda found: marks[found[0][0]] + found[0][1:], string)), bounds
        )
        if marked.translate(plain) != text or self._control.findall(marked) != written:
            raise ValueError("it depends on a control token in a string of the chat; remove it, or set allow_control_tokens")
        return _spans(self._control, marked)

    def _marks(self, text: str, given: Conversation) -> dict[str, str]:
        """A character for each first character of a control token, which neither the text nor the caller's strings have."""
        used = set(text).union(*map(set, given.strings()))
        unused = (chr(point) for point in _PRIVATE if chr(point) not in used)
        marks = dict(zip(sorted(self._firsts), unused, strict=False))
        if len(marks) < len(self._firsts):
            raise ValueError("it has too many characters of the private use area U+F0000")
        return marks


def _name(control: str) -> str:
    """A control token without what stands around its name."""
    return control.strip("<>[]|｜/▁ ")


def _spans(pattern: re.Pattern[str], text: str) -> list[Span]:
    return [found.span() for found in pattern.finditer(text)]


# ---- the vocabulary


class Lexicon:
    """What is computed from a whole vocabulary, once. May be used from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def warm(self) -> None:
        """Compute it now: that takes 0.1 s for a large vocabulary."""
        _ = self._words, self.text_bytes_max

    def ids_of(self, word: str) -> tuple[int, ...]:
        """All tokens whose text is this word; white space before it is ignored. May be empty."""
        return self._words.get(_bare(word), ())

    @cached_property
    def text_bytes_max(self) -> int:
        """The most bytes of UTF-8 that one token can add to an answer's text, whatever tokens are beside it."""
        return max(map(_text_bytes, self._vocabulary.pieces), default=0)

    @cached_property
    def control_bytes_max(self) -> int:
        """The most bytes that one control token adds, where control tokens are kept."""
        return max((len(text.encode()) for text in self._vocabulary.controls), default=0)

    @cached_property
    def _words(self) -> Mapping[str, tuple[int, ...]]:
        words: dict[str, tuple[int, ...]] = {}
        for token_id, piece in enumerate(self._vocabulary.pieces):
            try:
                word = _bare(piece.decode())
            except UnicodeDecodeError:
                continue
            if word:
                words[word] = (*words.get(word, ()), token_id)
        return words


def _bare(word: str) -> str:
    """Without white space before it. White space alone stays as it is."""
    return word.lstrip() or word


def _text_bytes(piece: bytes) -> int:
    """Of whole characters, their own bytes; of a broken one, three (U+FFFD) for each byte at worst."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return sum(1 if byte < 0x80 else 3 for byte in piece)
    return len(piece)


# ---- threads


class Workers:
    """A bounded number of threads with a bounded queue, for work that would block the event loop."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._max = threads + queue_max
        self._now = 0

    async def run(self, work: Callable[[Wanted], T]) -> T:
        """What `work` returns or raises, done in a thread. Raises QueueFull. When the caller is cancelled, work that waits is
        dropped, and work that has begun is not wanted any more."""
        if self._now >= self._max:
            raise QueueFull(f"{self._now} requests are being prepared", retry_after=RETRY_SECONDS)
        self._now += 1
        gone = threading.Event()
        job = self._pool.submit(work, lambda: not gone.is_set())
        done = asyncio.wrap_future(job)
        done.add_done_callback(self._count_down)  # not when the caller is cancelled: its thread goes on
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            gone.set()
            job.cancel()
            raise

    def _count_down(self, done: asyncio.Future[T]) -> None:
        self._now -= 1
        if not done.cancelled():
            done.exception()  # retrieved here, because the caller may have been cancelled

    def close(self) -> None:
        """Cancels what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
