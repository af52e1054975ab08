"""A run's parameters and logprobs, between the contract and TurboMind.

What TurboMind would misread is handled here:

1. T = 0 is not greedy to TurboMind, which only divides by it: greedy is top_k 1.
2. T = 1 is sent as 0.999999. The kernel divides by T + 1e-6, so this is 1; for a T of exactly 1 the kernel is left out, unless
   another run of the batch has another T.
3. Banned tokens of a run's beginning are looked up by row, and a row without any shifts those behind it: every row has one.
4. `min_new_tokens` of m bans ends in the first m - 1 tokens only, and is unknown to the rule that ends a run.
5. TurboMind cuts off more than 32 stop or forbidden tokens with a warning in its log; token 0 is never forbidden.
6. Without a seed every run has the same one. A run always has a seed.
"""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass
from typing import Any

from ostinato.errors import invalid
from ostinato.v1 import types_pb2

IDS_MAX = 32
"""The most stop tokens, and the most forbidden ones, that TurboMind takes."""
ALMOST_ONE = 0.999999
NO_TOKEN = -1
"""A banned token id that no token has."""
RULES = "1"
"""Version of these rules; part of the fingerprint."""


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of TurboMind's GenerationConfig, with its names, and whether every step is to be reported."""

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
    """Banned until there are `min_new_tokens`; never empty."""
    stop_ids: tuple[int, ...]
    """Tokens at which TurboMind ends the run."""
    bad_ids: tuple[int, ...]
    output_logprobs: int
    """0: none."""
    each_step: bool
    """If False, only the end is reported, with all tokens: a report costs Python more time than a token costs the GPU."""


def request_of(given: types_pb2.ResolvedParameters, seed: int, *, stream: bool, end_ids: frozenset[int]) -> Request:
    """Raises InvalidRequest for parameters that TurboMind cannot follow."""
    if len(given.bad_token_ids) > IDS_MAX:
        count = len(given.bad_token_ids)
        raise invalid("parameters.bad_words", f"come to {count} tokens of this model; the engine takes at most {IDS_MAX}")
    greedy = given.temperature == 0
    ends = set[int]() if given.ignore_eos else set(end_ids)
    stops = sorted(ends | set(given.stop_token_ids))
    # If TurboMind cannot know where the answer ends, each step is reported and the run is cancelled there.
    knows = len(stops) <= IDS_MAX and not given.min_new_tokens
    return Request(
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens + 1 if given.min_new_tokens else 0,
        top_k=1 if greedy else given.top_k,
        top_p=1.0 if greedy else given.top_p,
        min_p=0.0 if greedy else given.min_p,
        temperature=ALMOST_ONE if greedy or c_float(given.temperature).value == 1 else given.temperature,
        repetition_penalty=given.repetition_penalty,
        random_seed=seed,
        eos_ids=tuple(sorted(end_ids) + [each for each in given.stop_token_ids if each not in end_ids])[:IDS_MAX]
        or (NO_TOKEN,),
        stop_ids=tuple(stops) if knows else (),
        # The caller's forbidden tokens; and, if ends are to be ignored, as many of the model's ends as there is room for.
        bad_ids=(*given.bad_token_ids, *(sorted(end_ids - set(given.bad_token_ids)) if given.ignore_eos else ()))[:IDS_MAX],
        output_logprobs=max(1, given.logprobs) if given.HasField("logprobs") else 0,
        each_step=stream or bool(given.stop) or (bool(stops) and not knows),
    )


def token_logprobs(token_id: int, ids: Any, values: Any, top: int) -> types_pb2.TokenLogprobs | None:
    """PROCESSED logprobs of the chosen token and of the `top` likeliest, ties by id. `ids` and `values` are numpy arrays of
    all tokens that could be chosen, likeliest first. Impossible tokens are left out, so there may be fewer than `top`. None:
    the chosen token is not among them. The floats are the GPU's, widened: their bits do not depend on `top`."""
    chosen = values[ids == token_id]
    if not len(chosen):
        return None
    likeliest: list[tuple[float, int]] = []
    if top:
        # After the last wanted one there may be others as likely, with lower ids.
        edge = values[min(top, len(values)) - 1]
        reach = values >= edge
        likeliest = sorted(
            ((-value, each) for each, value in zip(ids[reach].tolist(), values[reach].tolist(), strict=True) if value > -1e30)
        )
    return types_pb2.TokenLogprobs(
        logprob=float(chosen.max()),
        top=[types_pb2.TopLogprob(token_id=each, logprob=-value) for value, each in likeliest[:top]],
    )
