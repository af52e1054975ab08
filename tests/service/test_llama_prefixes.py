"""Reuse of prompt prefixes: what is reused, and that no bit of an answer changes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests.service.llama_kit import LACKING, Bench, bits, on_the_loop, small

if LACKING:
    pytest.skip(f"the llama engine's packages are not installed: {LACKING}", allow_module_level=True)

from service.engines.llama import load
from service.engines.llama.batching import PIECE, Prefixes, Tokens

pytestmark = pytest.mark.llama

SLOTS = 3
TEXT = tuple(random.Random(1).choices(range(100, 40_000), k=270))
LENGTHS = (63, 64, 65, 128, 193)
"""Of prompts that are beginnings of TEXT: around multiples of a piece."""
FORKS = (64, 100)
"""The lengths of TEXT after which a prompt continues differently."""
PROMPTS = [TEXT[:length] for length in LENGTHS] + [TEXT[:fork] + TEXT[200:220] for fork in FORKS]

prompts = st.builds(
    lambda pieces, rest: tuple(piece for number in pieces for piece in [number] * PIECE) + (9,) * rest,
    st.lists(st.integers(0, 1), max_size=4),
    st.integers(0, PIECE - 1),
).filter(len)
"""Few different pieces, so that prefixes are shared often."""


class Memory:
    """A model of the engine's slots with tokens in place of keys and values: an oracle for Prefixes."""

    def __init__(self) -> None:
        self.prefixes = Prefixes(SLOTS)
        self.slots: list[Tokens] = [()] * SLOTS
        self.runs: dict[int, tuple[Tokens, int]] = {}
        """Prompt and tokens computed, by slot."""

    def enter(self, prompt: Tokens) -> None:
        free = [slot for slot in range(SLOTS) if slot not in self.runs]
        if not free:
            return
        slot = free[0]
        spare, source, tokens = self.prefixes.assign(slot, prompt, free)
        if spare is not None:
            assert spare not in (slot, source)
            assert spare in free
            self.slots[spare] = self.slots[slot]
        self.slots[slot] = self.slots[source][:tokens]

        best = max(_common(held, prompt) for held in self.slots)
        assert self.slots[slot] == prompt[:tokens]
        assert tokens % PIECE == 0
        assert tokens < len(prompt)
        assert tokens == best, "the longest there is"
        self.runs[slot] = prompt, tokens

    def compute(self, slot: int) -> None:
        if slot not in self.runs:
            return
        prompt, fed = self.runs[slot]
        new = prompt[fed : fed + PIECE] if fed < len(prompt) else (-1,)  # a token of the answer
        self.slots[slot] += new
        self.prefixes.computed(slot, prompt, fed + len(new))
        self.runs[slot] = prompt, fed + len(new)

    def leave(self, slot: int) -> None:
        if self.runs.pop(slot, None) is not None:
            self.slots[slot] = self.slots[slot][: len(self.prefixes.held[slot])]

    def check(self) -> None:
        for slot, held in enumerate(self.prefixes.held):
            assert len(held) % PIECE == 0
            assert self.slots[slot][: len(held)] == held
            assert slot in self.runs or self.slots[slot] == held, "nothing of an answer is left"


def _common(held: Tokens, prompt: Tokens) -> int:
    """The number of tokens that may be reused, computed the slow way."""
    cuts = range(0, min(len(held) + 1, len(prompt)), PIECE)
    return max(cut for cut in cuts if held[:cut] == prompt[:cut])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), prompts),
            st.tuples(st.just("compute"), st.integers(0, SLOTS - 1)),
            st.tuples(st.just("leave"), st.integers(0, SLOTS - 1)),
        ),
        max_size=60,
    )
)
def test_what_is_said_to_be_held_is_there(steps: list[tuple[str, Any]]) -> None:
    """Each slot holds what Prefixes says, and a run gets the longest prefix that any slot holds."""
    memory = Memory()
    for what, about in steps:
        getattr(memory, what)(about)
        memory.check()


def test_two_prompts_in_turn_are_both_kept() -> None:
    """Two prompts that alternate in one slot are both kept: a free slot saves the other one."""
    memory = Memory()
    first, second = (0,) * 130, (1,) * 130
    for prompt in (first, second):
        memory.enter(prompt)
        for _ in range(3):
            memory.compute(0)
        memory.leave(0)

    for prompt in (first, second, first, second):
        memory.enter(prompt)
        assert memory.runs[0][1] == 2 * PIECE
        memory.compute(0)
        memory.leave(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="cold")
async def _cold() -> AsyncIterator[list[bytes]]:
    """The answers to PROMPTS on an engine that reuses nothing."""
    bench = Bench(load(small(prefix_cache="off")))
    yield [bits(await bench.answer(list(prompt), **_about(number))) for number, prompt in enumerate(PROMPTS)]
    await bench.engine.close()


def _about(number: int) -> dict[str, Any]:
    sampling: dict[str, Any] = ({"temperature": 0.8, "top_k": 40}, {"temperature": 0.0}, {"repetition_penalty": 1.2})[
        number % 3
    ]
    return {"seed": number, "max_new_tokens": 4, "logprobs": 5, "ignore_eos": True, **sampling}


@on_the_loop
async def test_reuse_changes_no_bit(bench: Bench, cold: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with shared prefixes have the tokens and logprob bits of an engine without reuse, in sequence and all at once."""
    rows = _count_rows(bench, monkeypatch)
    for _ in range(2):
        rows.clear()
        found = [bits(await bench.answer(list(prompt), **_about(number))) for number, prompt in enumerate(PROMPTS)]
        assert found == cold
    assert sum(rows) < len(PROMPTS) * (PIECE + 4)  # of each prompt at most its last piece, and the answer

    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    runs = {number: bench.start(list(PROMPTS[number]), **_about(number)) for number in order}
    assert [bits(await bench.output(runs[number])) for number in range(len(PROMPTS))] == cold


@on_the_loop
async def test_runs_that_start_together_share(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four runs with a shared prefix that start together, only the first computes it."""
    shared = random.Random(2).choices(range(100, 40_000), k=2 * PIECE)
    rows = _count_rows(bench, monkeypatch)
    runs = [bench.start([*shared, 100 + number], max_new_tokens=2, ignore_eos=True) for number in range(4)]
    for run_id in runs:
        await bench.output(run_id)

    assert sum(rows) == len(shared) + 4 * 2


@on_the_loop
async def test_a_producer_that_is_cancelled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that a run computed before it was cancelled are reused, and no bit differs."""
    prompt = random.Random(3).choices(range(100, 40_000), k=2 * PIECE + 10)
    reference = Bench(load(small(prefix_cache="off")))
    expected = bits(await reference.answer(prompt, **_about(0)))
    await reference.engine.close()
    doomed = bench.start(prompt, stream=True, max_new_tokens=100)
    await bench.until(doomed, "started")
    bench.engine.cancel(doomed)
    first = bits(await bench.answer(prompt, **_about(0)))
    doomed = bench.start(prompt, stream=True, max_new_tokens=100)
    await bench.until(doomed, "tokens")
    bench.engine.cancel(doomed)
    rows = _count_rows(bench, monkeypatch)

    again = await bench.answer(prompt, **_about(0))

    assert [first, bits(again)] == [expected] * 2
    assert again.cached_tokens == 2 * PIECE
    assert sum(rows[-4:]) == 10 + 3


@on_the_loop
async def test_nothing_is_reused_of_a_step_that_failed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed step nothing is reused: it is unknown what the step has written."""
    prompt = random.Random(4).choices(range(100, 40_000), k=2 * PIECE + 1)
    await bench.answer(prompt, max_new_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine._library, "decode", lambda *_: 1)
        assert (await bench.end(bench.start(prompt))).HasField("failed")
    rows = _count_rows(bench, monkeypatch)
    await bench.answer(prompt, max_new_tokens=1)

    assert sum(rows) == len(prompt)


@on_the_loop
async def test_memory_that_cannot_be_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama.cpp cannot truncate a slot, the prompt is computed from its first token."""
    prompt = random.Random(5).choices(range(100, 40_000), k=2 * PIECE + 1)
    expected = bits(await bench.answer(prompt, max_new_tokens=1))
    monkeypatch.setattr(bench.engine._library, "truncate", lambda *_: False)
    rows = _count_rows(bench, monkeypatch)

    assert bits(await bench.answer(prompt, max_new_tokens=1)) == expected
    assert sum(rows) == len(prompt)


def _count_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each step appends its number of rows."""
    rows: list[int] = []
    decode = bench.engine._library.decode

    def counted(context: int, batch: Any) -> int:
        rows.append(len(batch))
        return decode(context, batch)

    monkeypatch.setattr(bench.engine._library, "decode", counted)
    return rows
