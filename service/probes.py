"""What the self-test asks: fixed prompts, seeds and sampling.

Lengths are those at which kernels are known to change their mind: below and above 64 rows in a batch, below and above a window
of 256 tokens. Few tokens are made of each: a difference in any bit shows in the logprobs long before it changes a token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ostinato.v1 import types_pb2

from service.engines.base import Vocabulary

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
