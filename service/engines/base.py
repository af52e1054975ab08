"""What the service requires of an engine, and what it gives to one.

An engine owns its runs from `submit` to their end: until then only the engine touches a run. It calls `Run.answer.accept` for
every token, in any thread, and reports events on the event loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec
from prometheus_client import Metric

from ostinato.errors import EngineFailed, OstinatoError, to_status
from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer, TokenTable
from service.chat import Conversation, RenderBounds

Span = tuple[int, int]
"""Where something stands in a text: its first character, and the one behind it."""


class EngineUnusable(Exception):
    """This engine cannot run here. The message says what to do about it."""


class TooManyTokens(Exception):
    """A prompt has at least `count` tokens, more than are wanted."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class Vocabulary(TokenTable, Protocol):
    """A model's tokenizer. Every method is pure and thread-safe."""

    controls: Mapping[str, int]
    """The ids of control tokens, by their text."""
    template: str | None
    """The chat template, if the model has one."""

    @property
    def source_bytes_max(self) -> int | None:
        """The most bytes of a prompt's text that become one token, control tokens included. None: any number of them may."""

    def render(self, given: Conversation, bounds: RenderBounds) -> str:
        """The chat as text. Raises ValueError with the template's message, and OutOfBounds."""

    def encode(self, text: str, *, special: bool, most: int = sys.maxsize) -> list[int]:
        """The token ids of `text`, after the model's begin token unless the text starts with it.

        With `special`, control tokens are recognised wherever they stand; without it, nowhere, and a text cannot forge a turn.
        Takes time in proportion to the text, whatever is in it: tenants choose it. May raise TooManyTokens for more than
        `most`, as soon as that is known.
        """

    def encode_at(self, text: str, places: Sequence[Span], *, most: int = sys.maxsize) -> list[int]:
        """As `encode`, but control tokens are recognised at these places only, which are in order. May raise ValueError with
        the reason why they cannot be told apart from the text."""

    def files(self) -> Mapping[str, bytes]:
        """Hugging Face's tokenizer.json and tokenizer_config.json, which give the same token ids for texts and chats. Takes up
        to a second. Raises ValueError with the reason where they cannot be made."""


class Run(msgspec.Struct, frozen=True):
    """One run, as given to an engine."""

    run_id: int
    """Unique in this process."""
    sequence: int
    """The item's sequence number; of a rerun that of the item it repeats, or 0."""
    attempt: int
    purpose: engine_pb2.Purpose.ValueType
    token_ids: tuple[int, ...]
    parameters: types_pb2.ResolvedParameters
    seed: int
    """The seed in effect, a uint64."""
    stream: bool
    """Whether Tokens events are wanted."""
    answer: Answer
    """Grows with every token and decides where the answer ends."""

    def started(self) -> engine_pb2.RunEvent:
        return engine_pb2.RunEvent(run_id=self.run_id, started=engine_pb2.Started())

    def new_tokens(self) -> Events:
        """A Tokens event with what has not been reported yet; empty for a run that does not stream."""
        new = self.answer.take() if self.stream else None
        return [] if new is None else [engine_pb2.RunEvent(run_id=self.run_id, tokens=new)]

    def finished(
        self, engine_seed: int, logprob_kind: types_pb2.LogprobKind.ValueType, cached_tokens: int = 0
    ) -> engine_pb2.RunEvent:
        """Of a complete answer. `engine_seed`: the seed as the engine folds it; `cached_tokens`: prompt tokens that were not
        computed."""
        event = engine_pb2.RunEvent(run_id=self.run_id)
        output = event.finished.output
        self.answer.put_into(output)
        output.seed, output.engine_seed, output.prompt_tokens = self.seed, engine_seed, len(self.token_ids)
        output.logprob_kind, output.cached_tokens = logprob_kind, cached_tokens
        return event

    def failed(self, error: Exception | str) -> engine_pb2.RunEvent:
        """What is not an OstinatoError is an ENGINE_FAILED."""
        told = error if isinstance(error, OstinatoError) else EngineFailed(str(error) or type(error).__name__)
        return engine_pb2.RunEvent(run_id=self.run_id, failed=to_status(told))


Events = list[engine_pb2.RunEvent]
"""Of one engine step. The service fills in Output.grade."""


class Engine(Protocol):
    """A loaded model. Made by `service.engines.load`."""

    name: str
    """One of "llama", "turbomind" and "scripted"."""
    model_name: str
    context_tokens: int
    """Prompt and answer of one run together."""
    top_k_max: int
    chat: bool
    """Whether `Vocabulary.render` works."""
    logprob_kind: types_pb2.LogprobKind.ValueType
    capacity: engine_pb2.Capacity
    prefix_cache: bool
    """Whether a prompt's prefix may be reused from an earlier one, in blocks of `Capacity.block_tokens`. If so, the
    self-test covers it."""
    piece_tokens: int
    """A longer prompt is computed in pieces that end at multiples of this; 0: never. The self-test covers it."""
    proof_seconds: float
    """The part of the load time that proved `ceiling`; 0 where no proof is needed."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def fields(self) -> Mapping[str, str]:
        """The fingerprint's fields. "model", "weights", "tokenizer" and "template", where present, identify the model: an item
        prepared for one model never runs on another."""

    @property
    def ceiling(self) -> tuple[types_pb2.Grade.ValueType, str]:
        """The best grade possible with this configuration, and the reason. The self-test does not test for a better one."""

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        """Raises ValueError if the engine cannot obey this grammar. Thread-safe."""

    def collect(self) -> Iterable[Metric]:
        """The engine's own metrics, for a Prometheus registry. Thread-safe."""

    def start(self, on_events: Callable[[Events], None], on_grade: Callable[[types_pb2.Grade.ValueType, str], None]) -> None:
        """Start to work, on the running event loop; both functions are called there.

        `on_grade` reports that from now on the grade is at most this, and why. The service does not raise it again.
        """

    def submit(self, run: Run) -> None:
        """Queue a run. Runs enter the batch in the order of these calls. Never blocks or refuses."""

    def cancel(self, run_id: int) -> None:
        """Stop a run within one step, without further events. Ignores unknown and ended runs."""

    async def close(self) -> None:
        """Stop all runs without events, and free the model."""
