"""The turbomind engine inside the service, with a small fake TurboMind."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from ostinato.v1 import types_pb2
from serving.metrics import registry

from service.description import HeldGrade
from service.engines.turbomind import TurbomindOptions
from service.engines.turbomind import engine as engine_module
from service.engines.turbomind.engine import TurbomindEngine
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.grammars import Formats
from service.engines.turbomind.model import HuggingFaceVocabulary
from service.engines.turbomind.native import FINISHED, RUNNING, Native
from service.engines.turbomind.overrides import Overrides
from service.engines.turbomind.request import Request
from service.grade import self_test
from service.observe import Metrics
from service.stream import Runs
from tests.service.turbomind_kit import CANCELLED, MODEL, VOCABULARY, FakeHandle, FakeNative, FakeOverrides, run_of

OPTIONS = TurbomindOptions(model=MODEL.path, runs=32)


NO_FORMATS = cast(Formats, SimpleNamespace(close=lambda: None))


class SteppedHandle(FakeHandle):
    """Makes one token per step, from its prompt, seed and position, and from the other runs if told to."""

    rounds_otherwise = False
    """As for a prompt of which the cache has all but one token."""
    ended = False

    def step(self, company: int) -> None:
        spice = f"{self.prompt}{dataclasses.replace(self.request, each_step=False)}{len(self.made)}{company}"
        digest = sha256((spice + "otherwise" * self.rounds_otherwise).encode()).digest()
        self.rows.append({digest[0]: -digest[1] / 256})
        self.ended = len(self.made) + 1 == self.request.max_new_tokens
        if self.ended or self.request.each_step:
            self.make([digest[0]], FINISHED if self.ended else RUNNING)
        else:
            self.made.append(digest[0])

    def cancel(self) -> None:
        if not self.ended:
            super().cancel()
            self.ended = True
            self.make([], CANCELLED)


@dataclass
class Stepping(FakeNative):
    """Makes a step of all runs whenever the loop is idle."""

    mixes: bool = False
    """Whether tokens depend on the other runs."""
    stuck: bool = False
    closed: bool = False
    cached: int = 0
    """Tokens of each prompt that it says were cached."""
    corrects: bool = True
    """As the override does: one token less than all but one."""
    tells: bool = True
    """Whether it reports how much of a prompt came from its cache."""

    def start(
        self, run_id: int, ids: Sequence[int], request: Request, grammar: object, change: Callable[[], None]
    ) -> SteppedHandle:
        begun = super().start(run_id, ids, request, grammar, change)
        cached = begun.account.cached
        told = dataclasses.replace(begun.account, cached=(cached or self.cached) * self.tells)
        handle = SteppedHandle(run_id, begun.prompt, request, grammar, change, told, True)
        handle.rounds_otherwise = self.caches and cached == len(ids) - 1
        self.handles[run_id] = handle
        if len(self.handles) == 1 and not self.stuck:
            asyncio.get_running_loop().call_soon(self.step)
        return handle

    def cached_of(self, ids: tuple[int, ...]) -> int:
        found = super().cached_of(ids)
        return found - (self.corrects and found > 1 and found == len(ids) - 1)

    def step(self) -> None:
        self.tick += 1
        running = [each for each in self.handles.values() if isinstance(each, SteppedHandle) and not each.ended]
        self.handles = {handle.run_id: handle for handle in running}
        for handle in running:
            handle.step(len(running) if self.mixes else 1)
        if running:
            asyncio.get_running_loop().call_soon(self.step)

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def engine_of(
    native: Stepping,
    overrides: FakeOverrides | None,
    options: TurbomindOptions = OPTIONS,
    end_process: Callable[[int], object] = sys.exit,
) -> AsyncIterator[TurbomindEngine]:
    exactness = Exactness(options, MODEL, cast(Overrides, overrides))
    if not options.exact:
        exactness.load()
    vocabulary = cast(HuggingFaceVocabulary, VOCABULARY)
    engine = TurbomindEngine(
        options, cast(Native, native), vocabulary, exactness, NO_FORMATS, blocks=4096, fields={"engine": "turbomind"},
        prefix_cache=native.caches, end_process=end_process,
    )  # fmt: skip
    yield engine
    await engine.close()


async def earned(native: Stepping, overrides: FakeOverrides, **options: Any) -> tuple[str, str]:
    """The grade that the service's self-test gives, and its reason."""
    async with engine_of(native, overrides, dataclasses.replace(OPTIONS, **options)) as engine:
        held = HeldGrade()
        runs = Runs(engine, held, Metrics(registry()))
        runs.start()
        finding = await self_test(runs, asyncio.get_running_loop().time, 30)
        held.earn(finding.grade, finding.reason)
    return types_pb2.Grade.Name(held.grade).removeprefix("GRADE_"), held.reason


@pytest.mark.parametrize(
    ("native", "uncovered", "grade", "reason"),
    [
        (Stepping(), 0, "EXACT", "the same tokens and logprob bits"),
        (
            Stepping(caches=True),
            0,
            "EXACT",
            "48 behind a cached beginning with rests of 0, 1, 2, 63, 64, 65 tokens gave the same",
        ),
        (Stepping(mixes=True), 0, "BEST_EFFORT", "together with the other prompts"),
        (Stepping(), 1, "BEST_EFFORT", "a product had to be served by an algorithm that is not permitted"),
        (Stepping(waiting=1), 0, "BEST_EFFORT", "TurboMind took a run out of its batch"),
        (Stepping(cached=64), 0, "BEST_EFFORT", "TurboMind took part of a prompt from a cache, which is off"),
        (Stepping(caches=True, corrects=False), 0, "BEST_EFFORT", "when its beginning came from the cache"),
        (Stepping(caches=True, tells=False), 0, "BEST_EFFORT", "the prefix cache supplied nothing, so that it is not tested"),
    ],
)
async def test_the_self_test_finds_what_an_engine_is(native: Stepping, uncovered: int, grade: str, reason: str) -> None:
    """An engine whose runs keep to themselves is EXACT, also with a prefix cache. One that depends on the batch is not,
    whatever the overrides report; nor one with an uncovered product, a preemption, or a cache that is off and hit, on and
    never hit, or wrong for a rest of one token. The grade falls before an answer is reported, even if the tokens are equal."""
    found, why = await earned(native, FakeOverrides(uncovered=uncovered))

    assert (found, reason in why) == (grade, True), why


async def test_one_rest_of_one_token_takes_the_grade() -> None:
    """A rest of one token lowers the grade whatever the answer, since it was computed as a decode."""
    native = Stepping(caches=True, corrects=False)
    async with engine_of(native, FakeOverrides()) as engine:
        falls: list[str] = []
        done = asyncio.Event()
        engine.start(
            lambda events: done.set() if events[-1].HasField("finished") else None, lambda grade, why: falls.append(why)
        )
        for run_id in (1, 2):
            engine.submit(run_of(run_id, prompt=range(129), stream=True, max_new_tokens=2))
            await asyncio.wait_for(done.wait(), 30)
            done.clear()

    assert falls == ["TurboMind took all but one token of a prompt from its cache, and computed that one as a decode's"]


@pytest.mark.parametrize(
    ("options", "grade", "reason"),
    [
        ({"exact": False}, "BEST_EFFORT", "exact mode is off"),
        ({"tp": 2, "communicator": "cuda-ipc"}, "BEST_EFFORT", "round otherwise for large batches"),
        ({"tp": 4}, "BEST_EFFORT", "more than two GPUs add in an order that depends on the batch"),
        ({"runs": 1}, "SERIAL", "twice, one at a time"),
    ],
)
async def test_what_a_configuration_cannot_be_is_not_tested_for(options: dict[str, Any], grade: str, reason: str) -> None:
    """A service below EXACT says why."""
    found, why = await earned(Stepping(), FakeOverrides(), **options)

    assert (found, reason in why) == (grade, True), why


async def test_a_turbomind_that_stands_still_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stalled TurboMind ends the process, but only while it has work."""
    monkeypatch.setattr(engine_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(engine_module, "END_SECONDS", 0.05)
    codes: list[int] = []
    async with engine_of(Stepping(stuck=True), None, end_process=codes.append) as engine:
        engine.start(lambda events: None, lambda grade, reason: None)
        await asyncio.sleep(0.1)
        idle = [*codes]
        engine.submit(run_of(1, stream=True, max_new_tokens=1000, ignore_eos=True))
        async with asyncio.timeout(30):
            while not codes:
                await asyncio.sleep(0.005)
    said = [vars(record)["why"] for record in caplog.records if record.message == "engine stalled"]
    caplog.clear()

    assert (idle, codes, len(said)) == ([], [1], 1)
    assert "has made no step" in said[0]


async def test_the_counters_are_metrics() -> None:
    """The counters have the metric names that the alerts use."""
    own = CollectorRegistry()
    async with engine_of(Stepping(tick=3), FakeOverrides(uncovered=2)) as engine:
        own.register(engine)
        values = {
            name: own.get_sample_value(name)
            for name in ("ostinato_engine_override_uncovered_total", "ostinato_engine_override_plans_total")
        }
        calls = own.get_sample_value("ostinato_engine_override_calls_total", {"override": "gemm"})

    assert values == {"ostinato_engine_override_uncovered_total": 2, "ostinato_engine_override_plans_total": 7}
    assert calls == 1
    assert own.get_sample_value("ostinato_engine_preemptions_total") is None  # closed: TurboMind may not be called any more


async def test_closing_frees_the_model_and_ends_what_runs() -> None:
    """Closing frees the model and ends runs without events."""
    native = Stepping()
    events: list[Any] = []
    async with engine_of(native, None) as engine:
        engine.start(events.extend, lambda grade, reason: None)
        engine.submit(run_of(1, stream=True, max_new_tokens=1000, ignore_eos=True))
        await asyncio.sleep(0)

    assert native.closed
    assert [each for each in native.handles.values() if not each.cancelled] == []
    assert not [event for event in events if event.WhichOneof("event") in ("finished", "failed")]
