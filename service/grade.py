"""The self-test: what grade the running engine earns.

Every probe runs alone, then together with all others, then in another order among strangers that join and leave on the way.
Equal tokens and equal logprob bits each time earn EXACT. An engine that runs one at a time can earn SERIAL, by running every
probe twice. Whatever else is found, or goes wrong, is BEST_EFFORT, and the reason says what it was.

Where an engine has a prefix cache, every other probe runs in company first: later, it would come from the cache. And prompts of
which the cache lacks few tokens, or about a block, run cold and cached, alone and in company.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import engine_pb2, types_pb2
from serving.program import replace_file

from service.engines.base import Vocabulary
from service.stream import Owner, Runs

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


TEXT = """\
The tide came in under a white sky, and nobody on the pier said a word about the boat. Three weeks ago it had left with
seven people, a dog, and 240 litres of water; now it lay against the wall as if it had never moved. "Who tied it up?" asked
the harbour master. He counted the ropes twice: one, two, three, and a fourth that was not on his list. In the cabin the
clock showed half past nine, the kettle was warm, and on the table stood a chessboard in the middle of a game. def
winner(board): return None was written on the margin of the chart, next to a sum that did not add up (17 + 25 = 43). Then
the dog barked, somewhere below.
"""

LONG, SHORT, CROWD, REUSED = 8, 12, 48, 6
"""New tokens of long and of short prompts, of those that make up a crowd, and of those that begin alike."""
SHARED_BLOCKS, TEXTS = 2, 2
"""Of a prefix cache, what prompts that begin alike have in common; and how many such beginnings there are. Of an engine that
runs no crowd one block, one beginning, and of each prompt only the form that is asked cold: there, prompts are slow."""
CROWD_MIN, CROWD_MAX = 32, 64
"""An engine that runs so many at once is tested with a crowd, for kernels change their mind with the size of a batch."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt of the test."""

    name: str
    token_ids: tuple[int, ...]
    parameters: types_pb2.ResolvedParameters
    seed: int


Mix = tuple[str, int, int, float, int, float, float, float]

_MIXES: tuple[Mix, ...] = (
    # name, prompt tokens, new tokens, temperature, top_k, top_p, min_p, repetition penalty
    ("long sampled", 300, LONG, 0.8, 40, 1.0, 0.0, 1.0),
    ("medium greedy", 72, SHORT, 0.0, 0, 1.0, 0.0, 1.0),
    ("long penalised", 288, LONG, 1.0, 0, 0.95, 0.0, 1.2),
    ("medium hot", 70, SHORT, 1.3, 0, 1.0, 0.05, 1.0),
    ("short narrow", 24, SHORT, 0.7, 5, 0.9, 0.0, 1.0),
    ("short greedy penalised", 8, SHORT, 0.0, 0, 1.0, 0.0, 1.1),
    ("shortest", 3, SHORT, 1.0, 0, 1.0, 0.0, 1.0),
)
_STRANGERS: tuple[Mix, ...] = (
    ("stranger", 20, LONG, 1.0, 0, 1.0, 0.0, 1.0),
    ("stranger that leaves", 33, SHORT, 0.9, 20, 1.0, 0.0, 1.0),
)


def probes(vocabulary: Vocabulary, context_tokens: int, runs: int, top_k_max: int) -> list[Probe]:
    """Those whose answers are compared, the longest first; a crowd where the engine runs one."""
    crowd = [_mix(number) for number in range(len(_MIXES), min(runs, CROWD_MAX))] if runs >= CROWD_MIN else []
    return [_probe(index, mix, vocabulary, context_tokens, top_k_max) for index, mix in enumerate((*_MIXES, *crowd))]


@dataclass(frozen=True, slots=True)
class Rung:
    """A prompt of whole blocks and a rest."""

    rest: int
    """Tokens behind the shared blocks."""
    probe: Probe
    before: Probe | None = None
    """Asked first, it leaves the shared blocks in the cache, and nothing more. None: the probe itself leaves them; first it is
    asked cold."""


def rungs(
    vocabulary: Vocabulary, context_tokens: int, block_tokens: int, top_k_max: int, runs: int, copy: int = 0
) -> list[Rung]:
    """Prompts whose rests behind a cached beginning are 0, 1 and 2 tokens, and around a block. Each in two forms: one that is
    asked cold, and one that follows another with its beginning. Cold and again would not do, for a run whose rest is a block or
    more leaves that in the cache too. No others begin alike, copies included. None where the context is too small."""
    crowd = runs >= CROWD_MIN
    blocks, texts, forms = (SHARED_BLOCKS, TEXTS, (False, True)) if crowd else (1, 1, (False,))
    shared = blocks * block_tokens
    found: list[Rung] = []
    for rest in texts * (0, 1, 2, block_tokens - 1, block_tokens, block_tokens + 1):
        if shared + rest + REUSED > context_tokens:
            continue
        for follows in forms:
            index = 1000 * (copy + 1) + 4 * len(found)
            own = _reused(f"rest {rest}", index, shared + rest, vocabulary, top_k_max)
            before = _reused(f"rest {rest}, before", index, shared, vocabulary, top_k_max) if follows else None
            found.append(Rung(rest, own, before))
    return found


def _reused(name: str, index: int, length: int, vocabulary: Vocabulary, top_k_max: int) -> Probe:
    """Of one index, the shorter is the beginning of the longer. Sampled from all tokens: of a greedy one, an engine that tells
    processed logprobs says nothing."""
    text = vocabulary.encode(TEXT, special=False)
    draw = random.Random(index)  # noqa: S311  # the same at every start
    ids = tuple(draw.choice(text) for _ in range(length))
    return Probe(f"{name}, number {index}", ids, _parameters(REUSED, 0.9, 0, top_k_max), seed=index)


def _mix(number: int) -> Mix:
    """One of a crowd: every length, every way to sample, and top_k in every bucket that a kernel may have."""
    temperature = (0.7, 1.0, 0.0, 1.3, 0.9)[number % 5]
    top_k = (0, 12, 25, 50, 200, 1000)[number % 6]
    top_p, min_p, penalty = (1.0, 0.95, 0.8)[number % 3], (0.0, 0.05)[number % 7 == 0], (1.0, 1.1)[number % 4 == 0]
    return (f"one of a crowd, number {number}", 3 + 37 * number % 280, CROWD, temperature, top_k, top_p, min_p, penalty)


def strangers(vocabulary: Vocabulary, context_tokens: int, top_k_max: int) -> list[Probe]:
    """Those that only keep the others company; the last one is to be cancelled on its way."""
    return [_probe(100 + index, mix, vocabulary, context_tokens, top_k_max) for index, mix in enumerate(_STRANGERS)]


def _probe(index: int, mix: Mix, vocabulary: Vocabulary, context_tokens: int, top_k_max: int) -> Probe:
    name, length, new, temperature, top_k, top_p, min_p, penalty = mix
    new = max(1, min(new, context_tokens // 2))
    text = vocabulary.encode(TEXT, special=False)
    length = min(length, context_tokens - new)
    start = 7 * index
    ids = tuple(text[(start + offset) % len(text)] for offset in range(length))
    parameters = _parameters(new, temperature, top_k, top_k_max, top_p, min_p, penalty)
    return Probe(name, ids, parameters, seed=(index * 0x9E3779B97F4A7C15 + 1) % 2**64)


def _parameters(
    new: int, temperature: float, top_k: int, top_k_max: int, top_p: float = 1.0, min_p: float = 0.0, penalty: float = 1.0
) -> types_pb2.ResolvedParameters:
    return types_pb2.ResolvedParameters(
        temperature=temperature,
        top_k=min(top_k, top_k_max),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        max_new_tokens=new,
        ignore_eos=True,
        logprobs=20,
    )


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proof:
    """The file's content."""

    fingerprint: str
    """Digest, hexadecimal."""
    test: str
    code: str
    """Digest of the service's own source."""
    grade: str
    reason: str
    seconds: float
    compared_tokens: int
    made_at: str
    """ISO 8601, for people."""


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one directory, made under this code."""

    directory: Path
    code: str

    def find(self, fingerprint: bytes) -> tuple[Finding, str] | None:
        """What was found under this fingerprint, and when."""
        path = self._path(fingerprint)
        try:
            proof = Proof(**json.loads(path.read_text()))
            grade = types_pb2.Grade.Value(proof.grade)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            _log.warning("proof unreadable", extra={"path": path, "why": str(error)})
            return None
        if (proof.fingerprint, proof.test, proof.code) != (fingerprint.hex(), VERSION, self.code):
            return None
        return Finding(grade, proof.reason, proof.seconds, proof.compared_tokens), proof.made_at

    def keep(self, fingerprint: bytes, finding: Finding, made_at: str) -> None:
        """Write it down. That it cannot be is only worth a warning: the next start tests again."""
        proof = Proof(
            fingerprint=fingerprint.hex(),
            test=VERSION,
            code=self.code,
            grade=types_pb2.Grade.Name(finding.grade),
            reason=finding.reason,
            seconds=finding.seconds,
            compared_tokens=finding.compared_tokens,
            made_at=made_at,
        )
        path = self._path(fingerprint)
        try:
            replace_file(path, json.dumps(dataclasses.asdict(proof), indent=1) + "\n")
        except OSError as error:
            _log.warning("proof not kept", extra={"path": path, "why": str(error)})

    def _path(self, fingerprint: bytes) -> Path:
        return self.directory / f"{fingerprint.hex()}.json"


def code_digest(package: Path) -> str:
    """Of all Python source under a package: what has changed since may have broken what was proved."""
    whole = sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
