"""The self-test: which grade the running engine earns, and the proofs that keep its result for the next start.

Every case runs alone, then together with all others, then in another order under a background load that begins and ends on
the way. Equal tokens and equal logprob bits each time earn EXACT. An engine that runs one at a time can earn SERIAL, by running
every case twice. Any other result is BEST_EFFORT, and the reason says what was found.

For an engine with a prefix cache, every other case runs together with others first, because later it would come from the cache.
And prompts of which the cache lacks few tokens, or about a block, run cold and cached, alone and together.

The prompts are in cases.py, the proofs in proofs.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import engine_pb2, types_pb2

from service.cases import BATCH_MIN, Case, background_load, cache_cases, compared_cases
from service.proofs import Finding, Proofs, code_digest
from service.stream import Runs

EXACT, SERIAL, BEST_EFFORT = types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL, types_pb2.GRADE_BEST_EFFORT


async def find_grade(runs: Runs, fingerprint: bytes, mode: str, state_dir: Path, timeout_seconds: float) -> Finding:
    """By the self-test or, in mode "kept", by a proof under this fingerprint's digest. Mode "off" tests nothing."""
    if mode == "off":
        return Finding(BEST_EFFORT, "not tested", 0.0, 0)
    proofs = Proofs(state_dir / "proofs", await asyncio.to_thread(code_digest, Path(__file__).parent))
    kept = proofs.find(fingerprint) if mode == "kept" else None
    ceiling, _ = runs.engine.ceiling
    if kept is not None and kept.grade <= ceiling:
        return kept
    finding = await self_test(runs, time.monotonic, timeout_seconds)
    if finding.grade > BEST_EFFORT:
        proofs.keep(fingerprint, finding, datetime.now(UTC).isoformat(timespec="seconds"))
    return finding


async def self_test(runs: Runs, clock: Callable[[], float], timeout_seconds: float) -> Finding:
    """Tests the started engine. `clock` in seconds; only differences count."""
    engine, began = runs.engine, clock()
    ceiling, why = engine.ceiling
    serial = engine.capacity.runs == 1
    if ceiling < (SERIAL if serial else EXACT):
        return Finding(BEST_EFFORT, why, 0.0, 0)
    test = _SelfTest(runs)
    try:
        async with asyncio.timeout(timeout_seconds):
            await test.run_alone()
            if serial:
                await test.run_again()
            else:
                await test.run_together()
            test.conclude()
        grade, reason = (SERIAL if serial else EXACT), test.summary(serial)
    except _Failed as error:
        grade, reason = BEST_EFFORT, str(error)
    except TimeoutError:
        grade, reason = BEST_EFFORT, f"the self-test did not end within {timeout_seconds:g} s"
    finally:
        test.close()
    return Finding(grade, reason, clock() - began, test.compared_tokens)


class _Failed(Exception):
    """A case had another output than alone, or failed."""


class _SelfTest:
    """Runs cases and compares each output with the first of its case."""

    def __init__(self, runs: Runs) -> None:
        engine = runs.engine
        self._runs, self._cases, self._load = runs, compared_cases(engine), background_load(engine)
        self._together_first = engine.prefix_cache and engine.capacity.runs > 1
        """Whether every other case runs together with others before it runs alone."""
        self._cached_alone = cache_cases(engine) if engine.prefix_cache else []
        self._cached_together = cache_cases(engine, copy=1) if engine.prefix_cache and engine.capacity.runs >= BATCH_MIN else []
        """These run alone first and together first."""
        self._cached_tokens = 0
        """That the cache supplied."""
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.Future[types_pb2.Output]] = {}
        self._token_made = asyncio.Event()
        self._first: dict[str, types_pb2.Output] = {}
        """By the case's name."""
        self.compared_tokens = 0
        runs.attach(self._on_events)

    async def run_alone(self) -> None:
        """Each by itself. Everything later is compared with this."""
        for case in self._cases[:: 2 if self._together_first else 1]:
            self._compare(case, await self._start(case), "")
        for cached in self._cached_alone:
            if cached.before is not None:
                await self._start(cached.before)
            self._compare(cached.case, await self._start(cached.case), "")
        for cached in self._cached_alone:
            self._compare(cached.case, await self._start(cached.case), "when its beginning came from the cache")

    async def run_again(self) -> None:
        for case in self._cases:
            self._compare(case, await self._start(case), "when it ran again")

    async def run_together(self) -> None:
        """All at once, and then in another order with the background load, whose last case is cancelled on the way."""
        for end in [self._start(cached.before) for cached in self._cached_together if cached.before is not None]:
            await end
        everything = [*self._cases, *(cached.case for cached in (*self._cached_alone, *self._cached_together))]
        ends = [self._start(case) for case in everything]
        for case, end in zip(everything, ends, strict=True):
            self._compare(case, await end, "together with the other prompts")

        backwards = everything[::-1]
        early, late = backwards[::2], backwards[1::2]
        self._token_made.clear()
        ends = [self._start(case) for case in early]
        await self._token_made.wait()  # so that the rest joins a batch that is under way
        loading = [self._start(case) for case in self._load]
        cancelled = next(run_id for run_id, end in self._ends.items() if end is loading[-1])
        ends += [self._start(case) for case in late]
        for case, end in zip((*early, *late), ends, strict=True):
            self._compare(case, await end, "in another order, under background load")
            self._runs.cancel([cancelled])
        if self._together_first:
            for case in (*self._cases[1::2], *(cached.case for cached in self._cached_together)):
                self._compare(case, await self._start(case), "alone, after it had run together with others")

    def conclude(self) -> None:
        """A cache that was not hit was not tested."""
        if self._cached_alone and not self._cached_tokens:
            raise _Failed("the prefix cache supplied nothing, so that it is not tested")

    def summary(self, serial: bool) -> str:
        lengths = sorted(len(case.token_ids) for case in self._cases)
        ways = "twice, one at a time" if serial else "alone, together, and in another order under background load"
        rests = sorted({cached.rest for cached in self._cached_alone})
        count = len(self._cached_alone) + len(self._cached_together)
        behind = f", and {count} behind a cached beginning with rests of {', '.join(map(str, rests))} tokens" if count else ""
        return (
            f"{len(self._cases)} prompts of {lengths[0]} to {lengths[-1]} tokens{behind} gave the same tokens and logprob bits"
            f" {ways} ({self.compared_tokens} tokens compared)"
        )

    def close(self) -> None:
        """Stops what runs, and retrieves failures besides the one that counted."""
        self._runs.detach()
        for end in self._ends.values():
            if not end.cancel() and not end.cancelled():
                end.exception()

    def _start(self, case: Case) -> asyncio.Future[types_pb2.Output]:
        run_id = next(self._ids)
        self._ends[run_id] = asyncio.get_running_loop().create_future()
        self._runs.submit(
            engine_pb2.Submit(
                run_id=run_id, attempt=1, token_ids=case.token_ids, parameters=case.parameters, seed=case.seed, stream=True
            )
        )
        return self._ends[run_id]

    def _on_events(self, events: Sequence[engine_pb2.RunEvent]) -> None:
        for event in events:
            if not event.HasField("started"):
                self._token_made.set()
            end = self._ends[event.run_id]
            if event.HasField("finished"):
                end.set_result(event.finished.output)
            elif event.HasField("failed"):
                end.set_exception(_Failed(f"a run of the self-test failed: {event.failed.message}"))

    def _compare(self, case: Case, output: types_pb2.Output, when: str) -> None:
        """With the first output of the case; the first one is only kept."""
        self._cached_tokens += output.cached_tokens
        first = self._first.setdefault(case.name, output)
        if first is output:
            return
        if any(digest(output) != digest(first) for digest in (output_digest, logprobs_digest)):
            raise _Failed(f"prompt '{case.name}' ({len(case.token_ids)} tokens) {_difference(first, output)} {when}")
        self.compared_tokens += len(output.token_ids)


def _difference(first: types_pb2.Output, other: types_pb2.Output) -> str:
    """The first difference of the second output, in words."""
    for index, (left, right) in enumerate(itertools.zip_longest(first.token_ids, other.token_ids)):
        if left != right:
            return f"made another token at {index}"
        if index < len(first.logprobs) and first.logprobs[index] != other.logprobs[index]:
            return f"had other logprobs at token {index}"
    return "ended otherwise"
