"""The turbomind engine inside the service, with a small fake TurboMind."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from ostinato.v1 import engine_pb2, types_pb2
from serving.metrics import registry

from service.answer import Answer
from service.description import HeldGrade
from service.engines.base import Run
from service.engines.scripted import ByteVocabulary
from service.engines.turbomind import engine as engine_module
from service.engines.turbomind.engine import TurbomindEngine
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.grammars import Formats
from service.engines.turbomind.model import HuggingFaceVocabulary, Model
from service.engines.turbomind.native import Account, Load, Native, Progress, Status
from service.engines.turbomind.options import TurbomindOptions
from service.engines.turbomind.overrides import Counters, Overrides
from service.engines.turbomind.request import Request
from service.grade import self_test
from service.observe import Metrics
from service.stream import Runs

MODEL = Model(Path("/models/tiny"), 4096, 262, 2, 2, 2, 16, "none", 0, 1, frozenset({256}), "0" * 64)
OPTIONS = TurbomindOptions(model=MODEL.path, runs=32)
ACCOUNT = Account(queued=100.0, scheduled=101.0, cached=0)


@dataclass
class FakeOverrides:
    """Only the counters."""

    uncovered: int = 0
    omitted: frozenset[str] = frozenset()

    @property
    def counters(self) -> Counters:
        return Counters({"split_count": 4, "top_k": 5, "gemm": 6}, 7, self.uncovered)


@dataclass
class FakeHandle:
    """Makes one token per step, from its prompt, seed and position, and from the other runs if told to."""

    prompt: tuple[int, ...]
    request: Request
    on_change: Callable[[], None]
    made: list[int] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    ended: bool = False
    news: Progress | None = None
    scheduled = True
    account: Account = ACCOUNT
    rounds_otherwise: bool = False
    """As for a prompt of which the cache has all but one token."""

    def step(self, company: int) -> None:
        spice = f"{self.prompt}{dataclasses.replace(self.request, each_step=False)}{len(self.made)}{company}"
        spice += "otherwise" * self.rounds_otherwise
        digest = sha256(spice.encode()).digest()
        self.made.append(digest[0])
        self.rows.append(-digest[1] / 256)
        self.ended = len(self.made) == self.request.max_new_tokens
        if self.ended or self.request.each_step:
            self.report(Status.FINISHED if self.ended else Status.RUNNING)

    def report(self, status: int) -> None:
        self.news = Progress(status, len(self.prompt) + len(self.made))
        self.on_change()

    def poll(self) -> Progress | None:
        news, self.news = self.news, None
        return news

    def ids(self, first: int, last: int) -> list[int]:
        return [*self.prompt, *self.made][first:last]

    def logprobs(self, index: int) -> tuple[Any, Any]:
        return np.array([self.made[index]], np.int32), np.array([self.rows[index]], np.float32)

    def cancel(self) -> None:
        if not self.ended:
            self.ended = True
            self.report(Status.CANCELLED)


NO_FORMATS = cast(Formats, SimpleNamespace(close=lambda: None))


@dataclass
class FakeNative:
    """Makes a step of all runs whenever the loop is idle."""

    mixes: bool = False
    """Whether tokens depend on the other runs."""
    stuck: bool = False
    closed: bool = False
    tick: int = 0
    waiting: int = 0
    cached: int = 0
    caches: bool = False
    """Whole blocks of prompts are cached, but never a prompt's last token."""
    corrects: bool = True
    """As the override does: one token less than all but one."""
    tells: bool = True
    """Whether it reports how much of a prompt came from its cache."""
    blocks: set[tuple[int, ...]] = field(default_factory=set)
    handles: list[FakeHandle] = field(default_factory=list)

    def start(
        self, run_id: int, ids: Sequence[int], request: Request, grammar: object, change: Callable[[], None]
    ) -> FakeHandle:
        cached = self.resume(tuple(ids)) if self.caches else self.cached
        told = dataclasses.replace(ACCOUNT, cached=cached if self.tells else 0)
        handle = FakeHandle(tuple(ids), request, change, account=told, rounds_otherwise=self.caches and cached == len(ids) - 1)
        self.handles.append(handle)
        if len(self.handles) == 1 and not self.stuck:
            asyncio.get_running_loop().call_soon(self.step)
        return handle

    def resume(self, ids: tuple[int, ...]) -> int:
        """Tokens that come from the cache. The prompt's blocks are cached from now on."""
        whole = [ids[:end] for end in range(64, len(ids) + 1, 64)]
        found = min(64 * sum(block in self.blocks for block in whole), len(ids) - 1)
        self.blocks.update(whole)
        return found - (self.corrects and found > 1 and found == len(ids) - 1)

    def step(self) -> None:
        self.tick += 1
        self.handles = [handle for handle in self.handles if not handle.ended]
        company = len(self.handles) if self.mixes else 1
        for handle in self.handles:
            handle.step(company)
        if self.handles:
            asyncio.get_running_loop().call_soon(self.step)

    def load(self) -> Load:
        return Load(self.tick, 0.25, len(self.handles), self.waiting, 0.0)

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def engine_of(
    native: FakeNative,
    overrides: FakeOverrides | None,
    options: TurbomindOptions = OPTIONS,
    end_process: Callable[[int], object] = sys.exit,
) -> AsyncIterator[TurbomindEngine]:
    exactness = Exactness(options, MODEL, cast(Overrides, overrides))
    vocabulary = cast(HuggingFaceVocabulary, ByteVocabulary())
    engine = TurbomindEngine(
        options, cast(Native, native), vocabulary, exactness, NO_FORMATS, blocks=4096, fields={"engine": "turbomind"},
        prefix_cache=native.caches, end_process=end_process,
    )  # fmt: skip
    yield engine
    await engine.close()


async def earned(native: FakeNative, overrides: FakeOverrides | None = None, **options: Any) -> tuple[str, str]:
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
        (FakeNative(), 0, "EXACT", "the same tokens and logprob bits"),
        (
            FakeNative(caches=True),
            0,
            "EXACT",
            "48 behind a cached beginning with rests of 0, 1, 2, 63, 64, 65 tokens gave the same",
        ),
        (FakeNative(mixes=True), 0, "BEST_EFFORT", "together with the other prompts"),
        (FakeNative(), 1, "BEST_EFFORT", "a product had to be served by an algorithm that is not permitted"),
        (FakeNative(waiting=1), 0, "BEST_EFFORT", "TurboMind took a run out of its batch"),
        (FakeNative(cached=64), 0, "BEST_EFFORT", "TurboMind took part of a prompt from a cache, which is off"),
        (FakeNative(caches=True, corrects=False), 0, "BEST_EFFORT", "when its beginning came from the cache"),
        (FakeNative(caches=True, tells=False), 0, "BEST_EFFORT", "the prefix cache supplied nothing, so that it is not tested"),
    ],
)
async def test_the_self_test_finds_what_an_engine_is(native: FakeNative, uncovered: int, grade: str, reason: str) -> None:
    """An engine whose runs keep to themselves is EXACT, also with a prefix cache. One that depends on the batch is not,
    whatever the overrides report; nor one with an uncovered product, a preemption, or a cache that is off and hit, on and
    never hit, or wrong for a rest of one token. The grade falls before an answer is reported, even if the tokens are equal."""
    found, why = await earned(native, FakeOverrides(uncovered=uncovered))

    assert (found, reason in why) == (grade, True), why


async def test_one_rest_of_one_token_takes_the_grade() -> None:
    """A rest of one token lowers the grade whatever the answer, since it was computed as a decode."""
    native = FakeNative(caches=True, corrects=False)
    async with engine_of(native, FakeOverrides()) as engine:
        falls: list[str] = []
        done = asyncio.Event()
        engine.start(
            lambda events: done.set() if events[-1].HasField("finished") else None, lambda grade, why: falls.append(why)
        )
        for run_id in (1, 2):
            engine.submit(dataclasses.replace(run_like_those_of_the_self_test(tokens=129, new=2), run_id=run_id))
            await asyncio.wait_for(done.wait(), 30)
            done.clear()

    assert falls == ["TurboMind took all but one token of a prompt from its cache, and computed that one as a decode's"]


@pytest.mark.parametrize(
    ("options", "grade", "reason"),
    [
        ({"exact": False}, "BEST_EFFORT", "exact mode is off"),
        ({"tp": 2}, "BEST_EFFORT", "not yet proved on any host"),
        ({"tp": 4}, "BEST_EFFORT", "several GPUs add up in an order of their own"),
        ({"runs": 1}, "SERIAL", "twice, one at a time"),
    ],
)
async def test_what_a_configuration_cannot_be_is_not_tested_for(options: dict[str, Any], grade: str, reason: str) -> None:
    """A service below EXACT says why."""
    native, overrides = FakeNative(), FakeOverrides()
    async with engine_of(native, overrides, dataclasses.replace(OPTIONS, **options)) as engine:
        if options.get("exact") is False:
            engine.exactness.load()
        runs = Runs(engine, HeldGrade(), Metrics(registry()))
        runs.start()
        finding = await self_test(runs, asyncio.get_running_loop().time, 30)

    assert types_pb2.Grade.Name(finding.grade) == f"GRADE_{grade}"
    assert reason in finding.reason


async def test_a_turbomind_that_stands_still_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stalled TurboMind ends the process, but only while it has work."""
    monkeypatch.setattr(engine_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(engine_module, "END_SECONDS", 0.05)
    codes: list[int] = []
    async with engine_of(FakeNative(stuck=True), None, end_process=codes.append) as engine:
        engine.start(lambda events: None, lambda grade, reason: None)
        await asyncio.sleep(0.1)
        idle = [*codes]
        engine.submit(run_like_those_of_the_self_test())
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
    async with engine_of(FakeNative(tick=3), FakeOverrides(uncovered=2)) as engine:
        own.register(engine)
        values = {
            name: own.get_sample_value(name)
            for name in ("ostinato_engine_override_uncovered_total", "ostinato_engine_override_plans_total")
        }
        calls = own.get_sample_value("ostinato_engine_override_calls_total", {"override": "gemm"})

    assert values == {"ostinato_engine_override_uncovered_total": 2, "ostinato_engine_override_plans_total": 7}
    assert calls == 6
    assert own.get_sample_value("ostinato_engine_preemptions_total") is None  # closed: TurboMind may not be called any more


async def test_closing_frees_the_model_and_ends_what_runs() -> None:
    """Closing frees the model and ends runs without events."""
    native = FakeNative()
    events: list[Any] = []
    async with engine_of(native, None) as engine:
        engine.start(events.extend, lambda grade, reason: None)
        engine.submit(run_like_those_of_the_self_test())
        await asyncio.sleep(0)

    assert native.closed
    assert [handle for handle in native.handles if not handle.ended] == []
    assert not [event for event in events if event.WhichOneof("event") in ("finished", "failed")]


def run_like_those_of_the_self_test(tokens: int = 3, new: int = 1000) -> Run:
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=new, ignore_eos=True)
    ids = tuple(number % 256 for number in range(tokens))
    return Run(1, 0, 1, engine_pb2.PURPOSE_UNSPECIFIED, ids, parameters, 1, True, Answer(parameters, ByteVocabulary()))
