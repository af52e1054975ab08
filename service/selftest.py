"""The self-test: what grade the running engine earns.

Every probe runs alone, then together with all others, then in another order among strangers that join and leave on the way.
Equal tokens and equal logprob bits each time earn EXACT. An engine that runs one at a time can earn SERIAL, by running every
probe twice. Whatever else is found, or goes wrong, is BEST_EFFORT, and the reason says what it was.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.probes import Probe, probes, strangers
from service.runs import Owner, Runs

VERSION = "2"
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
    bench = _Bench(runs, asked)
    try:
        async with asyncio.timeout(timeout_seconds):
            await bench.alone()
            if serial:
                await bench.again()
            else:
                await bench.in_company(strangers(engine.vocabulary, engine.context_tokens, engine.top_k_max))
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

    def __init__(self, runs: Runs, probes: Sequence[Probe]) -> None:
        self._owner = Owner(runs, self._on_event)
        self._probes = probes
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.Future[types_pb2.Output]] = {}
        self._begun = asyncio.Event()
        self._alone: dict[str, types_pb2.Output] = {}
        self.compared_tokens = 0

    async def alone(self) -> None:
        """Each by itself: what all that comes after is compared with."""
        for probe in self._probes:
            self._alone[probe.name] = await self._start(probe)

    async def again(self) -> None:
        for probe in self._probes:
            self._compare(probe, await self._start(probe), "when it ran again")

    async def in_company(self, others: Sequence[Probe]) -> None:
        """In two kinds of company."""
        ends = [self._start(probe) for probe in self._probes]
        for probe, end in zip(self._probes, ends, strict=True):
            self._compare(probe, await end, "together with the other prompts")

        backwards = self._probes[::-1]
        early, late = backwards[::2], backwards[1::2]
        self._begun.clear()
        ends = [self._start(probe) for probe in early]
        await self._begun.wait()  # the first token is there: the rest joins on the way
        joined = [self._start(probe) for probe in (*others, *late)]
        leaving = next(run_id for run_id, end in self._ends.items() if end is joined[len(others) - 1])
        for probe, end in zip((*early, *late), (*ends, *joined[len(others) :]), strict=True):
            self._compare(probe, await end, "in another order, among strangers")
            self._owner.cancel(leaving)

    def summary(self, serial: bool) -> str:
        lengths = sorted(len(probe.token_ids) for probe in self._probes)
        ways = "twice, one at a time" if serial else "alone, together, and in another order among strangers"
        return (
            f"{len(self._probes)} prompts of {lengths[0]} to {lengths[-1]} tokens gave the same tokens and logprob bits {ways}"
            f" ({self.compared_tokens} tokens compared)"
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
        alone = self._alone[probe.name]
        if any(digest(output) != digest(alone) for digest in (output_digest, logprobs_digest)):
            raise _Unequal(f"prompt '{probe.name}' ({len(probe.token_ids)} tokens) {_difference(alone, output)} {when}")
        self.compared_tokens += len(output.token_ids)


def _difference(alone: types_pb2.Output, other: types_pb2.Output) -> str:
    """Where the second first differs, in words."""
    for index, (left, right) in enumerate(itertools.zip_longest(alone.token_ids, other.token_ids)):
        if left != right:
            return f"made another token at {index}"
        if index < len(alone.logprobs) and alone.logprobs[index] != other.logprobs[index]:
            return f"had other logprobs at token {index}"
    return "ended otherwise"
