"""The self-test: which grade the running engine earns, and the proofs that keep its result for the next start.

Every case runs alone, then together with all others, then in another order under a background load that begins and ends on
the way. Equal tokens and equal logprob bits each time earn EXACT. An engine that runs one at a time can earn SERIAL, by running
every case twice. Any other result is BEST_EFFORT, and the reason says what was found.

For an engine with a prefix cache, every other case runs together with others first, because later it would come from the cache.
And prompts of which the cache lacks few tokens, or about a block, run cold and cached, alone and together.

The cases are fixed prompts, seeds and sampling. Their lengths are those at which kernels are known to be chosen differently:
below and above 64 rows in a batch, below and above a window of 256 tokens. Few tokens are made of each, because a difference in
any bit shows in the logprobs long before it changes a token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from ostinato.digest import logprobs_digest, output_digest
from ostinato.v1 import engine_pb2, types_pb2
from serving import files

from service.engines.base import Engine
from service.stream import Runs

VERSION = "4"
"""Version of the test, which changes with its cases. A proof by another version is ignored."""

TEXT = """\
The tide came in under a white sky, and nobody on the pier said a word about the boat. Three weeks ago it had left with
seven people, a dog, and 240 litres of water; now it lay against the wall as if it had never moved. "Who tied it up?" asked
the harbour master. He counted the ropes twice: one, two, three, and a fourth that was not on his list. In the cabin the
clock showed half past nine, the kettle was warm, and on the table stood a chessboard in the middle of a game. def
winner(board): return None was written on the margin of the chart, next to a sum that did not add up (17 + 25 = 43). Then
the dog barked, somewhere below.
"""

LONG, SHORT, FILLER, CACHED = 8, 12, 48, 6
"""New tokens of long prompts, of short prompts, of cases that fill the batch, and of cache cases."""
SHARED_BLOCKS, BEGINNINGS = 2, 2
"""Blocks that cache cases have in common with a prompt before, and how many such beginnings there are. An engine that is not
tested with a full batch gets one block, one beginning, and only the cold form of each prompt, because its prompts are slow."""
BATCH_MIN, BATCH_MAX = 32, 64
"""An engine that runs at least BATCH_MIN at once is tested with a batch of up to BATCH_MAX, because kernels are chosen by the
size of the batch."""
REPEATED = (2, 65, 257)
"""Tokens of prompts that repeat one token. In a mixture of experts all of their rows go to the same experts."""
BEYOND = (1, 2, 65, 700)
"""Tokens of prompts beyond one piece, for an engine that computes long prompts in pieces."""

EXACT, SERIAL, BEST_EFFORT = types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL, types_pb2.GRADE_BEST_EFFORT

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of the self-test."""

    grade: types_pb2.Grade.ValueType
    reason: str
    seconds: float
    compared_tokens: int


async def find_grade(runs: Runs, fingerprint: bytes, mode: str, state_dir: Path, timeout_seconds: float) -> Finding:
    """By the self-test or, in mode "kept", by a proof under this fingerprint's digest. Mode "off" tests nothing."""
    if mode == "off":
        return Finding(BEST_EFFORT, "not tested", 0.0, 0)
    proofs = Proofs(state_dir / "proofs", await asyncio.to_thread(code_digest, Path(__file__).parent))
    kept = proofs.find(fingerprint) if mode == "kept" else None
    ceiling, _ = runs.engine.ceiling
    if kept is not None and kept[0].grade <= ceiling:
        finding, made_at = kept
        return dataclasses.replace(finding, reason=f"{finding.reason}; proved at {made_at}")
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
        runs.attach(self._on_event)

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

    def _on_event(self, event: engine_pb2.RunEvent) -> None:
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


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of the test."""

    name: str
    token_ids: tuple[int, ...]
    parameters: types_pb2.ResolvedParameters
    seed: int


@dataclass(frozen=True, slots=True)
class CacheCase:
    """A prompt of whole blocks and a rest, for the prefix cache."""

    rest: int
    """Tokens behind the shared blocks."""
    case: Case
    before: Case | None = None
    """Run first, it leaves the shared blocks in the cache and nothing more. None: the case runs cold first, and leaves them
    itself."""


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
_LOAD: tuple[Mix, ...] = (
    ("background load", 20, LONG, 1.0, 0, 1.0, 0.0, 1.0),
    ("background load, cancelled", 33, SHORT, 0.9, 20, 1.0, 0.0, 1.0),
)


def compared_cases(engine: Engine) -> list[Case]:
    """Those whose outputs are compared, the longest first. For an engine that runs many, as many as fill the batch."""
    runs = engine.capacity.runs
    full = runs >= BATCH_MIN
    repeated = [_repeated(engine, length) for length in (REPEATED if full else ())]
    fillers = [_filler(number) for number in range(len(_MIXES), min(runs, BATCH_MAX) - len(repeated))] if full else []
    return [*_long(engine), *(_case(engine, index, mix) for index, mix in enumerate((*_MIXES, *fillers))), *repeated]


def background_load(engine: Engine) -> list[Case]:
    """Cases whose outputs are not compared. The last one is to be cancelled on its way."""
    return [_case(engine, 100 + index, mix) for index, mix in enumerate(_LOAD)]


def cache_cases(engine: Engine, copy: int = 0) -> list[CacheCase]:
    """Prompts whose rests behind a cached beginning are 0, 1 and 2 tokens, and around a block. Each in two forms: cold, and
    after another prompt with its beginning. Running the cold one again would not do, because a run whose rest is a block or
    more leaves that in the cache too. No two others begin alike, copies included. Empty where the context is too small."""
    full, block = engine.capacity.runs >= BATCH_MIN, engine.capacity.block_tokens
    blocks, beginnings, forms = (SHARED_BLOCKS, BEGINNINGS, (False, True)) if full else (1, 1, (False,))
    shared = blocks * block
    found: list[CacheCase] = []
    for rest in beginnings * (0, 1, 2, block - 1, block, block + 1):
        if shared + rest + CACHED > engine.context_tokens:
            continue
        for follows in forms:
            index = 1000 * (copy + 1) + 4 * len(found)
            own = _cached(engine, f"rest {rest}", index, shared + rest)
            before = _cached(engine, f"rest {rest}, before", index, shared) if follows else None
            found.append(CacheCase(rest, own, before))
    return found


def _cached(engine: Engine, name: str, index: int, length: int) -> Case:
    """Of one index, the shorter is the beginning of the longer. Sampled from all tokens, because processed logprobs of greedy
    sampling show nothing."""
    text = engine.vocabulary.encode(TEXT, special=False)
    draw = random.Random(index)  # noqa: S311  # the same at every start
    ids = tuple(draw.choice(text) for _ in range(length))
    return Case(f"{name}, number {index}", ids, _parameters(CACHED, 0.9, 0, 1.0, 0.0, 1.0), index)


def _long(engine: Engine) -> list[Case]:
    """Prompts of one piece and more, as far as the context has room."""
    lengths = [engine.piece_tokens + beyond for beyond in BEYOND] if engine.piece_tokens else []
    return [_cached(engine, f"of {n} tokens", n, n) for n in reversed(lengths) if n + CACHED <= engine.context_tokens]


def _repeated(engine: Engine, length: int) -> Case:
    new = max(1, min(SHORT, engine.context_tokens // 2))
    token_id = engine.vocabulary.encode(TEXT, special=False)[length % 7]
    ids = (token_id,) * min(length, engine.context_tokens - new)
    return Case(f"one token {length} times", ids, _parameters(new, 1.0, min(50, engine.top_k_max), 1.0, 0.0, 1.0), length)


def _filler(number: int) -> Mix:
    """One that fills the batch: every length, every way to sample, and top_k in every bucket that a kernel may have."""
    temperature = (0.7, 1.0, 0.0, 1.3, 0.9)[number % 5]
    top_k = (0, 12, 25, 50, 200, 1000)[number % 6]
    top_p, min_p, penalty = (1.0, 0.95, 0.8)[number % 3], (0.0, 0.05)[number % 7 == 0], (1.0, 1.1)[number % 4 == 0]
    return (f"batch filler {number}", 3 + 37 * number % 280, FILLER, temperature, top_k, top_p, min_p, penalty)


def _case(engine: Engine, index: int, mix: Mix) -> Case:
    name, length, new, temperature, top_k, top_p, min_p, penalty = mix
    new = max(1, min(new, engine.context_tokens // 2))
    length = min(length, engine.context_tokens - new)
    text = engine.vocabulary.encode(TEXT, special=False)
    ids = tuple(text[(7 * index + offset) % len(text)] for offset in range(length))
    parameters = _parameters(new, temperature, min(top_k, engine.top_k_max), top_p, min_p, penalty)
    return Case(name, ids, parameters, seed=(index * 0x9E3779B97F4A7C15 + 1) % 2**64)


def _parameters(
    new: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> types_pb2.ResolvedParameters:
    return types_pb2.ResolvedParameters(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        max_new_tokens=new,
        ignore_eos=True,
        logprobs=20,
    )


@dataclass(frozen=True, slots=True)
class Proof:
    """What a self-test found, as JSON in a file."""

    fingerprint: str
    """Digest, hexadecimal."""
    test: str
    """VERSION."""
    code: str
    """Digest of the service's own source."""
    grade: str
    reason: str
    seconds: float
    compared_tokens: int
    made_at: str
    """ISO 8601. Informative."""


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one directory, one file per fingerprint, replaced whole. A proof of another fingerprint, test or code is
    ignored, and so is a file that cannot be read."""

    directory: Path
    code: str

    def find(self, fingerprint: bytes) -> tuple[Finding, str] | None:
        """The finding under this fingerprint's digest, and when it was made."""
        path = self._path(fingerprint)
        try:
            proof = Proof(**json.loads(files.read(path)))
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
        """Writes a proof. A failure is only logged: the next start tests again."""
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
            files.replace(path, json.dumps(dataclasses.asdict(proof), indent=1) + "\n", parents=True)
        except OSError as error:
            _log.warning("proof not kept", extra={"path": path, "why": str(error)})

    def _path(self, fingerprint: bytes) -> Path:
        return self.directory / f"{fingerprint.hex()}.json"


def code_digest(package: Path) -> str:
    """Of all Python source under a package. After a change a proof no longer holds."""
    whole = sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
