"""A run's parameters as TurboMind wants them. Pure; every way in which it would misread them is closed here.

1. T = 0 is not greedy to TurboMind, which only divides by it: greedy is top_k 1.
2. T = 1 is sent as 0.999999. The kernel divides by T + 1e-6, so this one really is 1; but for a T of exactly 1 the kernel is
   left out, unless a neighbour has another T.
3. Banned tokens of a run's beginning are looked up by row, and a row without any shifts those behind it: none is without.
4. `min_new_tokens` of m bans ends in the first m - 1 tokens only, and says nothing to the rule that ends a run.
5. More than 32 stop or forbidden tokens are cut off with a warning nobody reads; token 0 is never forbidden.
6. Without a seed every run has the same. There always is one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ostinato.errors import invalid
from ostinato.v1 import types_pb2

IDS_MAX = 32
"""Stop tokens, and forbidden ones, that TurboMind takes."""
ALMOST_ONE = 0.999999
NOBODY = -1
"""A banned token that is none."""
RULES = "1"
"""Version of what is written here; part of the fingerprint."""


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of TurboMind's GenerationConfig, by its names, and whether every step is to be reported."""

    max_new_tokens: int
    min_new_tokens: int
    top_k: int
    """0: all tokens."""
    top_p: float
    min_p: float
    temperature: float
    repetition_penalty: float
    random_seed: int
    eos_ids: tuple[int, ...]
    """Banned until `min_new_tokens` are made; never empty."""
    stop_ids: tuple[int, ...]
    """With which the engine ends the run by itself."""
    bad_ids: tuple[int, ...]
    output_logprobs: int
    """0: none wanted."""
    each_step: bool
    """Else only the end is reported, for all of its tokens: a report costs Python more than a token costs the GPU."""


def request_of(given: types_pb2.ResolvedParameters, seed: int, *, stream: bool, end_ids: frozenset[int]) -> Request:
    """Raises InvalidRequest for what this engine cannot do."""
    if len(given.bad_token_ids) > IDS_MAX:
        count = len(given.bad_token_ids)
        raise invalid("parameters.bad_words", f"come to {count} tokens of this model; the engine takes at most {IDS_MAX}")
    greedy = given.temperature == 0
    ends = set[int]() if given.ignore_eos else set(end_ids)
    stops = sorted(ends | set(given.stop_token_ids))
    # Where the engine cannot know when to end, whoever counts the tokens stops it.
    knows = len(stops) <= IDS_MAX and not given.min_new_tokens
    return Request(
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens + 1 if given.min_new_tokens else 0,
        top_k=1 if greedy else given.top_k,
        top_p=1.0 if greedy else given.top_p,
        min_p=0.0 if greedy else given.min_p,
        temperature=ALMOST_ONE if greedy or _float32(given.temperature) == 1 else given.temperature,
        repetition_penalty=given.repetition_penalty,
        random_seed=seed,
        eos_ids=tuple(sorted(end_ids) + [each for each in given.stop_token_ids if each not in end_ids])[:IDS_MAX] or (NOBODY,),
        stop_ids=tuple(stops) if knows else (),
        bad_ids=_bad_ids(given, end_ids),
        output_logprobs=max(1, given.logprobs) if given.HasField("logprobs") else 0,
        each_step=stream or bool(given.stop) or (bool(stops) and not knows),
    )


def _bad_ids(given: types_pb2.ResolvedParameters, end_ids: frozenset[int]) -> tuple[int, ...]:
    """Those forbidden all along: the caller's, and as far as there is room the model's ends where they are to be ignored."""
    ignored = sorted(end_ids - set(given.bad_token_ids)) if given.ignore_eos else []
    return (*given.bad_token_ids, *ignored)[:IDS_MAX]


def _float32(value: float) -> float:
    """What becomes of it on the GPU; parameters are bounded, so it fits."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
