"""The self-test: what grade the running engine earns.

Every probe runs alone, then together with all others, then in another order among strangers that join and leave on the way.
Equal tokens and equal logprob bits each time earn EXACT. An engine that runs one at a time can earn SERIAL, by running every
probe twice. Whatever else is found, or goes wrong, is BEST_EFFORT, and the reason says what it was.

Where an engine has a prefix cache, every other probe runs in company first: later, it would come from the cache. And prompts of
which the cache lacks few tokens, or about a block, run cold and cached, alone and in company.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.probes import CROWD_MIN, Probe, Rung, probes, rungs, strangers
from service.runs import Owner, Runs

VERSION = "3"
"""Of the test; a proof by another one proves nothing."""

EXACT, SERIAL, BEST_EFFORT = types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL, types_pb2.GRADE_BEST_EFFORT


@dataclass(frozen=True, slots=True)
class Finding:
    """What the self-test found."""

    grade: types_pb2.Grade.ValueType
    reason: str
    seconds: float
    compared_tokens: int


async def self_test(runs: Runs, clock: Callable[[], float], timeout_seconds: float) -> Finding:
    """Test the started engine. `clock` in seconds; only differences count."""
    engine, began = runs.engine, clock()
    ceiling, why = engine.ceiling
    serial = engine.capacity.runs == 1
    if ceiling < (SERIAL if serial else EXACT):
        return Finding(BEST_EFFORT, why, 0.0, 0)
    asked = probes(engine.vocabulary, engine.context_tokens, engine.capacity.runs, engine.top_k_max)
    ladders: list[list[Rung]] = []
    if engine.prefix_cache:
        of = engine.vocabulary, engine.context_tokens, engine.capacity.block_tokens, engine.top_k_max, engine.capacity.runs
        ladders = [rungs(*of, copy) for copy in range(1 if serial or engine.capacity.runs < CROWD_MIN else 2)]
    bench = _Bench(runs, asked, *ladders, company_first=engine.prefix_cache and not serial)
    try:
        async with asyncio.timeout(timeout_seconds):
            await bench.alone()
            if serial:
                await bench.again()
            else:
                await bench.in_company(strangers(engine.vocabulary, engine.context_tokens, engine.top_k_max))
            bench.conclude()
        grade, reason = (SERIAL if serial else EXACT), bench.summary(serial)
    except _Unequal as error:
        grade, reason = BEST_EFFORT, str(error)
    except TimeoutError:
        grade, reason = BEST_EFFORT, f"the self-test did not end within {timeout_seconds:g} s"
    finally:
        bench.close()
    return Finding(grade, reason, clock() - began, bench.compared_tokens)


class _Unequal(Exception):
    """The probe that was not what it had been alone, or did not run at all."""


class _Bench:
    """Runs probes and compares each output with the first of its probe."""

    def __init__(
        self,
        runs: Runs,
        probes: Sequence[Probe],
        ladder_alone: Sequence[Rung] = (),
        ladder_company: Sequence[Rung] = (),
        *,
        company_first: bool = False,
    ) -> None:
        """The ladders, which run first alone and first in company, are for an engine with a prefix cache. `company_first`:
        every other probe runs in company first too."""
        self._owner = Owner(runs, self._on_event)
        self._probes = probes
        self._ladder_alone, self._ladder_company, self._company_first = ladder_alone, ladder_company, company_first
        self._cached_tokens = 0
        """That the cache supplied to the ladders."""
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.Future[types_pb2.Output]] = {}
        self._begun = asyncio.Event()
        self._first: dict[str, types_pb2.Output] = {}
        self.compared_tokens = 0

    async def alone(self) -> None:
        """Each by itself: what all that comes after is compared with."""
        for probe in self._probes[:: 2 if self._company_first else 1]:
            self._compare(probe, await self._start(probe), "")
        for rung in self._ladder_alone:
            if rung.before is not None:
                await self._start(rung.before)
            self._compare(rung.probe, await self._start(rung.probe), "")
        for rung in self._ladder_alone:
            self._compare(rung.probe, await self._start(rung.probe), "when its beginning came from the cache")

    async def again(self) -> None:
        for probe in self._probes:
            self._compare(probe, await self._start(probe), "when it ran again")

    async def in_company(self, others: Sequence[Probe]) -> None:
        """In two kinds of company."""
        before = [self._start(rung.before) for rung in self._ladder_company if rung.before is not None]
        for end in before:
            await end
        everyone = [*self._probes, *(rung.probe for rung in (*self._ladder_alone, *self._ladder_company))]
        ends = [self._start(probe) for probe in everyone]
        for probe, end in zip(everyone, ends, strict=True):
            self._compare(probe, await end, "together with the other prompts")

        backwards = everyone[::-1]
        early, late = backwards[::2], backwards[1::2]
        self._begun.clear()
        ends = [self._start(probe) for probe in early]
        await self._begun.wait()  # the first token is there: the rest joins on the way
        joined = [self._start(probe) for probe in (*others, *late)]
        leaving = next(run_id for run_id, end in self._ends.items() if end is joined[len(others) - 1])
        for probe, end in zip((*early, *late), (*ends, *joined[len(others) :]), strict=True):
            self._compare(probe, await end, "in another order, among strangers")
            self._owner.cancel(leaving)
        if self._company_first:
            for probe in (*self._probes[1::2], *(rung.probe for rung in self._ladder_company)):
                self._compare(probe, await self._start(probe), "alone, after it had run in company")

    def conclude(self) -> None:
        """A cache that was not hit was not tested."""
        if self._ladder_alone and not self._cached_tokens:
            raise _Unequal("the prefix cache supplied nothing, so that it is not tested")

    def summary(self, serial: bool) -> str:
        lengths = sorted(len(probe.token_ids) for probe in self._probes)
        ways = "twice, one at a time" if serial else "alone, together, and in another order among strangers"
        rests = sorted({rung.rest for rung in self._ladder_alone})
        count = len(self._ladder_alone) + len(self._ladder_company)
        behind = f", and {count} behind a cached beginning with rests of {', '.join(map(str, rests))} tokens" if count else ""
        return (
            f"{len(self._probes)} prompts of {lengths[0]} to {lengths[-1]} tokens{behind} gave the same tokens and logprob bits"
            f" {ways} ({self.compared_tokens} tokens compared)"
        )

    def close(self) -> None:
        """Stop what runs, and forget what failed beside the failure that counted."""
        self._owner.close()
        for end in self._ends.values():
            if not end.cancel() and not end.cancelled():
                end.exception()

    def _start(self, probe: Probe) -> asyncio.Future[types_pb2.Output]:
        run_id = next(self._ids)
        self._ends[run_id] = asyncio.get_running_loop().create_future()
        self._owner.submit(
            engine_pb2.Submit(
                run_id=run_id, attempt=1, token_ids=probe.token_ids, parameters=probe.parameters, seed=probe.seed, stream=True
            )
        )
        return self._ends[run_id]

    def _on_event(self, event: engine_pb2.RunEvent) -> None:
        if not event.HasField("started"):
            self._begun.set()
        end = self._ends[event.run_id]
        if event.HasField("finished"):
            end.set_result(event.finished.output)
        elif event.HasField("failed"):
            end.set_exception(_Unequal(f"a run of the self-test failed: {event.failed.message}"))

    def _compare(self, probe: Probe, output: types_pb2.Output, when: str) -> None:
        """With its first output; the first one is only kept."""
        self._cached_tokens += output.cached_tokens
        first = self._first.setdefault(probe.name, output)
        if first is output:
            return
        if any(digest(output) != digest(first) for digest in (output_digest, logprobs_digest)):
            raise _Unequal(f"prompt '{probe.name}' ({len(probe.token_ids)} tokens) {_difference(first, output)} {when}")
        self.compared_tokens += len(output.token_ids)


def _difference(first: types_pb2.Output, other: types_pb2.Output) -> str:
    """Where the second differs at first, in words."""
    for index, (left, right) in enumerate(itertools.zip_longest(first.token_ids, other.token_ids)):
        if left != right:
            return f"made another token at {index}"
        if index < len(first.logprobs) and first.logprobs[index] != other.logprobs[index]:
            return f"had other logprobs at token {index}"
    return "ended otherwise"
