"""The runs of the turbomind engine, with a fake TurboMind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import EngineFailed, OstinatoError, from_status
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Run
from service.engines.grammars import Checker
from service.engines.scripted import END
from service.engines.turbomind import PIECE_TOKENS, TurbomindOptions
from service.engines.turbomind.batching import (
    PAGE_BYTES,
    Batching,
    block_bytes,
    blocks_promised,
    pieces_after_first,
)
from service.engines.turbomind.grammars import Formats
from service.engines.turbomind.metrics import Meter
from service.engines.turbomind.native import FINISHED, RUNNING, Native
from tests.service.turbomind_kit import CANCELLED, MODEL, VOCABULARY, FakeHandle, FakeNative, run_of


@dataclass
class Stage:
    """A batching, its events and the runs that it started."""

    batching: Batching
    native: FakeNative
    events: list[engine_pb2.RunEvent]
    meter: Meter

    @property
    def handles(self) -> dict[int, FakeHandle]:
        """Of started runs, in that order."""
        return self.native.handles

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what another thread or task does soon."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    async def begin(self, *runs: Run) -> None:
        for run in runs:
            self.batching.submit(run)
        await self.rest()

    async def make(self, run_id: int, tokens: str | Iterable[int], status: int = RUNNING) -> None:
        self.handles[run_id].make(tokens, status)
        await self.rest()

    async def rest(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def of(self, run_id: int, kind: str) -> list[engine_pb2.RunEvent]:
        return [event for event in self.events if event.run_id == run_id and event.WhichOneof("event") == kind]

    def output(self, run_id: int) -> types_pb2.Output:
        (event,) = self.of(run_id, "finished")
        return event.finished.output

    def failure(self, run_id: int) -> OstinatoError:
        (event,) = self.of(run_id, "failed")
        return from_status(event.failed)


@asynccontextmanager
async def staged(
    *, runs: int = 4, blocks: int = 100, compile_format: Callable[[str], object] = str, scheduled: bool = True
) -> AsyncIterator[Stage]:
    turbomind, events = FakeNative(scheduled=scheduled), list[engine_pb2.RunEvent]()
    compiler = SimpleNamespace(compile_json_schema=compile_format, compile_regex=compile_format)
    checker = cast(Checker, SimpleNamespace(check=lambda kind, source: None, close=lambda: None))
    formats = Formats(checker, compiler)
    meter = Meter(4096, turbomind.load)
    batching = Batching(
        cast(Native, turbomind),
        formats,
        meter,
        end_ids=VOCABULARY.end_ids,
        runs=runs,
        blocks=blocks,
        block_tokens=4,
        on_events=events.extend,
        before_events=lambda: None,
    )
    feeding = asyncio.create_task(batching.feed())
    yield Stage(batching, turbomind, events, meter)
    feeding.cancel()
    await asyncio.gather(feeding, return_exceptions=True)
    formats.close()


async def test_runs_enter_in_order_as_slots_become_free() -> None:
    """A slot is free only after TurboMind has reported the end of its run."""
    async with staged(runs=2) as stage:
        await stage.begin(*(run_of(run_id) for run_id in (3, 1, 2)))
        before = [*stage.handles]
        await stage.make(1, "x" * 8, FINISHED)

    assert (before, [*stage.handles]) == ([3, 1], [3, 1, 2])
    assert [event.run_id for event in stage.events if event.HasField("started")] == [3, 1, 2]


async def test_the_head_waits_for_room_and_nothing_overtakes_it() -> None:
    """Room is counted in blocks for the longest answer. A small run behind a large one waits too."""
    async with staged(blocks=5) as stage:
        stage.batching.submit(run_of(1))  # 2 + 8 tokens: 3 blocks of 4
        stage.batching.submit(run_of(2, prompt=b"abcdef"))  # 4 blocks
        stage.batching.submit(run_of(3, max_new_tokens=1))  # 1 block
        await stage.rest()
        before = [*stage.handles]
        await stage.make(1, "x" * 8, FINISHED)

    assert (before, [*stage.handles]) == ([1], [1, 2, 3])


async def test_a_run_that_can_never_fit_fails_and_lets_others_pass() -> None:
    """A run that never fits is refused, because it would wait forever."""
    async with staged(blocks=2) as stage:
        await stage.begin(run_of(1), run_of(2, max_new_tokens=4))

    assert "3 blocks of the KV cache, which has 2" in stage.failure(1).message
    assert [*stage.handles] == [2]


async def test_a_run_that_is_not_streamed_is_reported_once_with_every_token() -> None:
    """The tokens include the stop token, at which TurboMind ends the run."""
    async with staged() as stage:
        await stage.begin(run_of(1))
        await stage.make(1, [*b"hey", END], FINISHED)

    output = stage.output(1)
    assert (output.text, [*output.token_ids]) == ("hey", [*b"hey", END])
    assert (output.finish_reason, output.prompt_tokens) == (types_pb2.FINISH_REASON_END_OF_SEQUENCE, 2)
    assert (output.seed, output.engine_seed, output.logprob_kind) == (5, 5, types_pb2.LOGPROB_KIND_PROCESSED)
    assert (stage.handles[1].request.each_step, stage.of(1, "tokens")) == (False, [])


async def test_a_streamed_runs_tokens_come_as_they_are_made() -> None:
    """Several reports before the loop runs are one event."""
    async with staged() as stage:
        await stage.begin(run_of(1, stream=True))
        await stage.make(1, "a")
        stage.handles[1].make("b")
        await stage.make(1, "c")
        await stage.make(1, "defgh", FINISHED)

    assert [event.tokens.text for event in stage.of(1, "tokens")] == ["a", "bc", "defgh"]
    assert stage.output(1).finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_an_answer_that_ends_here_stops_turbomind() -> None:
    """The batching finds stop strings, drops the tokens behind, and keeps the slot until TurboMind has ended the run."""
    async with staged(runs=1) as stage:
        await stage.begin(run_of(1, stop=["!"]), run_of(2))
        await stage.make(1, "ab!cd")
        handed_over, cancelled = [*stage.handles], stage.handles[1].cancelled
        await stage.make(1, "e", CANCELLED)

    assert (stage.output(1).text, stage.output(1).matched_stop) == ("ab", "!")
    assert [*stage.output(1).token_ids] == [*b"ab!"]
    assert (handed_over, cancelled, [*stage.handles]) == ([1], True, [1, 2])


async def test_least_tokens_are_kept_even_if_turbomind_makes_an_end_before() -> None:
    """TurboMind cannot ban every end, so it is never given the ends of such a run."""
    async with staged() as stage:
        await stage.begin(run_of(1, min_new_tokens=3))
        await stage.make(1, [END, *b"xy", END])

    assert [*stage.output(1).token_ids] == [END, *b"xy", END]
    assert (stage.handles[1].request.stop_ids, stage.handles[1].cancelled) == ((), True)


async def test_a_cancelled_run_is_silent() -> None:
    """A run may be cancelled while it waits, while it runs, and after its end."""
    async with staged(runs=1) as stage:
        await stage.begin(*(run_of(run_id, stream=True) for run_id in (1, 2, 3)))
        for run_id in (2, 1, 1, 99):
            stage.batching.cancel(run_id)
        await stage.make(1, "late")
        await stage.make(1, "later", CANCELLED)

    assert [event.WhichOneof("event") for event in stage.events if event.run_id == 1] == ["started"]
    assert ([*stage.handles], stage.handles[1].cancelled) == ([1, 3], True)
    assert not [event for event in stage.events if event.run_id == 2]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (11, "no room for the run in its KV cache"),
        (5, "had an internal error"),
        (6, "longer than its context"),
        (CANCELLED, "by itself"),
        (FINISHED, "before the answer was complete"),
        (77, "with status 77"),
    ],
)
async def test_a_bad_end_is_an_engine_failure_with_its_reason(status: int, text: str) -> None:
    """A bad end fails the run and frees its slot."""
    async with staged(runs=1) as stage:
        await stage.begin(run_of(1), run_of(2))
        await stage.make(1, "a", status)

    assert isinstance(stage.failure(1), EngineFailed)
    assert text in stage.failure(1).message
    assert [*stage.handles] == [1, 2]


async def test_logprobs_are_those_that_were_drawn_from() -> None:
    """Logprobs are of the chosen token and of the likeliest ones, ties by id, without impossible tokens."""
    async with staged() as stage:
        await stage.begin(run_of(1, logprobs=2, max_new_tokens=2))
        stage.handles[1].rows = [{98: -0.5, 99: -1.0, 97: -1.0, 0: -np.inf}, {97: 0.0}]
        await stage.make(1, "ca", FINISHED)

    first, second = stage.output(1).logprobs
    assert (first.logprob, [(each.token_id, each.logprob) for each in first.top]) == (-1.0, [(98, -0.5), (97, -1.0)])
    assert (second.logprob, [(each.token_id, each.logprob) for each in second.top]) == (0.0, [(97, 0.0)])


async def test_a_token_without_a_logprob_fails_the_run_alone() -> None:
    """A run without a logprob of its token fails, and the other run goes on."""
    async with staged() as stage:
        await stage.begin(run_of(1, logprobs=0), run_of(2))
        stage.handles[1].rows = [{98: 0.0}]
        stage.handles[1].make("a")
        await stage.make(2, "x" * 8, FINISHED)

    assert "no logprob for the token 97" in stage.failure(1).message
    assert (stage.handles[1].cancelled, stage.output(2).text) == (True, "x" * 8)


async def test_a_grammar_is_compiled_before_its_run_and_holds_its_place() -> None:
    """Later runs wait meanwhile, because runs start in order of submission."""
    async with staged(compile_format=lambda source: f"compiled {source}") as stage:
        stage.batching.submit(run_of(1, response_format=types_pb2.ResponseFormat(regex="a+")))
        stage.batching.submit(run_of(2))
        await stage.until(lambda: len(stage.handles) == 2)

    assert [(run_id, handle.grammar) for run_id, handle in stage.handles.items()] == [(1, "compiled a+"), (2, None)]


async def test_a_grammar_that_cannot_be_obeyed_fails_its_run() -> None:
    """A format that cannot be compiled fails the run: TurboMind would only warn and ignore it."""

    def refuse(source: str) -> object:
        raise RuntimeError("no such thing")

    async with staged(compile_format=refuse) as stage:
        stage.batching.submit(run_of(1, response_format=types_pb2.ResponseFormat(json_schema="{}")))
        await stage.until(lambda: bool(stage.of(1, "failed")))

    assert "parameters.response_format cannot be obeyed: no such thing" in stage.failure(1).message
    assert stage.handles == {}


async def test_a_prompt_of_one_token_starts_when_no_other_prompt_is_under_way() -> None:
    """Neither before it nor after it: beside a longer one TurboMind would compute it with another kernel."""
    async with staged(scheduled=False) as stage:
        stage.batching.submit(run_of(1))
        stage.batching.submit(run_of(2, prompt=b"a"))
        stage.batching.submit(run_of(3))
        seen: list[list[int]] = []
        for run_id in (1, 2, 3):
            await stage.until(lambda: len(stage.handles) > len(seen))
            await asyncio.sleep(0.01)  # time for the next one to start
            seen.append([*stage.handles])
            stage.handles[run_id].scheduled = True

    assert seen == [[1], [1, 2], [1, 2, 3]]


async def test_a_prompt_of_one_token_waits_for_all_pieces_of_a_long_one() -> None:
    """A prompt of three pieces is computed two steps after the one that it was first in, which may be published late."""
    async with staged(blocks=2000) as stage:
        stage.batching.submit(run_of(1, prompt=bytes(2 * PIECE_TOKENS + 2)))
        stage.batching.submit(run_of(2, prompt=b"a"))
        for _ in range(3):
            await asyncio.sleep(0.01)
            assert [*stage.handles] == [1]
            stage.native.tick += 1
        await stage.until(lambda: 2 in stage.handles)


@pytest.mark.parametrize(("prompt", "more"), [(1, 0), (2048, 0), (2049, 0), (2050, 1), (4097, 1), (4098, 2), (32_000, 15)])
def test_pieces_of_a_prompt_are_counted(prompt: int, more: int) -> None:
    """A piece never has one token, so a prompt of one token more than a piece is a single one."""
    assert pieces_after_first(prompt) == more


async def test_a_one_token_prompt_that_is_cancelled_while_it_waits_does_not_start() -> None:
    """A waiting run may be cancelled at any time."""
    async with staged(scheduled=False) as stage:
        stage.batching.submit(run_of(1))
        stage.batching.submit(run_of(2, prompt=b"a"))
        await asyncio.sleep(0.005)
        stage.batching.cancel(2)
        stage.handles[1].scheduled = True
        await asyncio.sleep(0.01)

    assert [*stage.handles] == [1]


async def test_a_runs_account_is_taken_when_it_leaves() -> None:
    """With LMDeploy's names. A run succeeded if it came to its end, also if the batching stopped it; a cancelled one did
    not."""
    async with staged() as stage:
        await stage.begin(*(run_of(run_id, stop=["b"] if run_id == 2 else [], max_new_tokens=3) for run_id in (1, 2, 3)))
        stage.handles[1].make("xyz", FINISHED)
        await stage.make(2, "ab")
        stage.handles[2].make("", CANCELLED)
        stage.batching.cancel(3)
        await stage.make(3, "x", CANCELLED)
        found = {each.name: each.value for metric in stage.meter.collect(None) for each in metric.samples if not each.labels}

    assert (found["lmdeploy_num_requests_succeeded"], found["lmdeploy_num_requests_failed"]) == (2, 1)
    assert (found["lmdeploy_prompt_tokens_total"], found["lmdeploy_generation_tokens_total"]) == (6, 6)
    assert (found["lmdeploy_request_generation_tokens_count"], found["lmdeploy_request_generation_tokens_sum"]) == (2, 5)
    assert (found["lmdeploy_request_queue_time_seconds_sum"], found["lmdeploy_cached_tokens_total"]) == (2.0, 0)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((32, 8, 128), {}, 8 * MIB),
        ((30, 3, 64), {}, 1_474_560),
        ((80, 8, 128), {}, 20 * MIB),
        ((80, 8, 128), {"tp": 2}, 10 * MIB),
        ((32, 8, 128), {"kv_bits": 8}, 4 * MIB + 131_072),
    ],
)
def test_a_block_has_keys_and_values_of_every_layer(
    shape: tuple[int, int, int], options: dict[str, Any], expected: int
) -> None:
    """A block of 64 tokens of an 8B model has 8 MiB."""
    model = replace(MODEL, layers=shape[0], kv_heads=shape[1], head_dim=shape[2])
    assert block_bytes(model, TurbomindOptions(**options)) == expected


@pytest.mark.parametrize(
    ("share", "mib", "runs", "expected"),
    [
        (8 * MIB / (100 * PAGE_BYTES), 8, 16, 99 * 4 - 16),
        (20 * MIB / (100 * PAGE_BYTES), 20, 10, 6 * 25 - 10),
        *((share, 8, 256, 1) for share in (0.0, -1.0, 1.5, 0.9)),
    ],
)
def test_blocks_fill_whole_pages(share: float, mib: int, runs: int, expected: int) -> None:
    """Four blocks of an 8B model fit in a page, one page is lost to alignment, and one block per run is subtracted. Blocks of
    20 MiB fit 25 times into a slab of 16 pages, and 100 pages have six slabs. An unknown or impossible share promises one."""
    assert blocks_promised(share=share, size=mib * MIB, runs=runs) == expected


@given(size=st.integers(1, 1 << 28), count=st.integers(2, 20_000), runs=st.integers(1, 1024))
def test_never_more_is_promised_than_the_region_holds(size: int, count: int, runs: int) -> None:
    """The promise never exceeds the memory, the subtracted blocks included."""
    found = blocks_promised(share=1 / count, size=size, runs=runs)

    assert found == 1 or found + runs <= count
