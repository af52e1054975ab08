"""What the service asks of an engine, and what an engine is given.

An engine owns its runs from submit to their end. It calls `Run.answer.accept` for every token it makes, in the thread it
likes, and reports immutable events on the event loop; nobody else touches a run while it lives there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Metric

from ostinato.errors import EngineFailed, to_status
from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer, TokenTable

ROLES = ("system", "user", "assistant", "tool")
"""Whose a chat's messages may be."""


class Vocabulary(TokenTable, Protocol):
    """A model's tokenizer. Every method is pure and may be called from any thread."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`, behind the begin tokens if the model wants any and the text has not written them out. With
        `special` control tokens in the text are recognised, as a rendered chat needs it; without, the text is only text and
        cannot forge a turn."""
        ...

    def render(self, messages: Sequence[types_pb2.Message]) -> str:
        """The chat as text, ready for the assistant's turn. Raises ValueError with what the template says against it."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Hugging Face's tokenizer.json and tokenizer_config.json, which make the same token ids of a text and of a chat; takes
        up to a second. Raises ValueError where there can be none, saying why."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as handed to an engine."""

    run_id: int
    """Unique in this process."""
    sequence: int
    """The item's number; of a second run the item it repeats, or 0."""
    attempt: int
    purpose: engine_pb2.Purpose.ValueType
    token_ids: tuple[int, ...]
    parameters: types_pb2.ResolvedParameters
    seed: int
    """In effect, a uint64."""
    stream: bool
    """Whether Tokens events are wanted."""
    answer: Answer
    """Grows with every token; decides where the answer ends."""

    def started(self) -> engine_pb2.RunEvent:
        return engine_pb2.RunEvent(run_id=self.run_id, started=engine_pb2.Started())

    def news(self) -> Events:
        """Tokens that were not reported yet, where they are wanted."""
        new = self.answer.take() if self.stream else None
        return [] if new is None else [engine_pb2.RunEvent(run_id=self.run_id, tokens=new)]

    def finished(
        self, engine_seed: int, logprob_kind: types_pb2.LogprobKind.ValueType, cached_tokens: int = 0
    ) -> engine_pb2.RunEvent:
        """Of a complete answer. `engine_seed`: the seed as the engine folds it. `cached_tokens`: of the prompt, those that the
        engine did not have to compute."""
        output = self.answer.output(
            seed=self.seed, engine_seed=engine_seed, prompt_tokens=len(self.token_ids), logprob_kind=logprob_kind
        )
        output.cached_tokens = cached_tokens
        return engine_pb2.RunEvent(run_id=self.run_id, finished=engine_pb2.Finished(output=output))

    def failed(self, why: str) -> engine_pb2.RunEvent:
        return engine_pb2.RunEvent(run_id=self.run_id, failed=to_status(EngineFailed(why)))


Events = list[engine_pb2.RunEvent]
"""Of one engine step. RunEvent.run_id is Run.run_id; Output.grade is left for the service to fill in."""


class Engine(Protocol):
    """A loaded model. Constructed by the factory in `service.engines`, which may raise `EngineUnusable`."""

    @property
    def name(self) -> str:
        """One of "llama", "turbomind" and "scripted"."""
        ...

    @property
    def model_name(self) -> str: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context_tokens(self) -> int:
        """Prompt and answer of one run together."""
        ...

    @property
    def top_k_max(self) -> int: ...

    @property
    def chat(self) -> bool:
        """Whether `Vocabulary.render` can work."""
        ...

    @property
    def logprob_kind(self) -> types_pb2.LogprobKind.ValueType: ...

    @property
    def capacity(self) -> engine_pb2.Capacity: ...

    @property
    def prefix_cache(self) -> bool:
        """Whether a prompt's beginning may come from an earlier one, in blocks of `Capacity.block_tokens`: the self-test then
        asks for that too."""
        ...

    @property
    def fields(self) -> Mapping[str, str]:
        """The fingerprint's fields. "model", "weights", "tokenizer" and "template", as far as there are any, say which model it
        is; items prepared under one are never run under another."""
        ...

    @property
    def ceiling(self) -> tuple[types_pb2.Grade.ValueType, str]:
        """The best grade that this configuration could earn, and why not better: the self-test does not test for more."""
        ...

    @property
    def proof_seconds(self) -> float:
        """Of loading, what it took to prove what the ceiling says; 0 where nothing has to be."""
        ...

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        """Raises ValueError if this grammar cannot be obeyed. May be called from any thread."""
        ...

    def collect(self) -> Iterable[Metric]:
        """What only this engine counts, for a Prometheus registry; perhaps nothing. Any thread."""
        ...

    def start(self, on_events: Callable[[Events], None], on_grade: Callable[[types_pb2.Grade.ValueType, str], None]) -> None:
        """Begin to work, on the running event loop; both are called there.

        `on_grade` says that from now on no better than this grade is held, and why; the service never raises it again. An
        engine that cannot notice such a thing never calls it.
        """
        ...

    def submit(self, run: Run) -> None:
        """Queue a run. Order of calls is order of admission into the batch; never blocks, never refuses."""
        ...

    def cancel(self, run_id: int) -> None:
        """Stop a run within one step and report nothing more of it. Unknown and ended runs are ignored."""
        ...

    async def close(self) -> None:
        """Stop all runs, silently, and free the model."""
        ...


class EngineUnusable(Exception):
    """This engine cannot run here; the message says what to do about it."""
