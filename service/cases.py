"""The prompts of the self-test: fixed prompts, seeds and sampling.

Their lengths are those at which kernels are known to be chosen differently: below and above 64 rows in a batch, below and above
a window of 256 tokens. Few tokens are made of each, because a difference in any bit shows in the logprobs long before it
changes a token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ostinato.v1 import types_pb2

from service.engines.base import Engine

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
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, max_new_tokens=new,
        ignore_eos=True, logprobs=20,
    )  # fmt: skip
