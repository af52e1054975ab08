"""From the logits of a row to a token. Everything here belongs to one run: no slot and no neighbour can be seen.

In order: grammar, forbidden tokens, repetition penalty (all three here, over the whole row), then llama.cpp's chain: top_k,
top_p, min_p, temperature and a draw, or, at temperature 0, the likeliest token, of equals the one with the lowest id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ostinato.v1 import types_pb2

from service.engines.llama.grammar import Grammar
from service.engines.llama.library import CANDIDATE, Library

PENALTY_WINDOW = 64
"""How many of the last tokens, prompt included, the repetition penalty looks at."""
ORDER = "grammar, forbidden, penalty, top_k, top_p, min_p, temperature, draw"
"""Goes into the fingerprint."""
_LOGIT_MAX = 1e30

Logits = NDArray[np.float32]


class NoTokenAllowed(Exception):
    """The grammar and the forbidden tokens together leave nothing."""


class Sampler:
    """Chooses the tokens of one run; it belongs to one thread."""

    def __init__(
        self,
        library: Library,
        *,
        size: int,
        end_ids: frozenset[int],
        parameters: types_pb2.ResolvedParameters,
        prompt: Iterable[int],
        seed: int,
        grammar: Grammar | None,
    ) -> None:
        """`size` is the vocabulary's; `seed` is folded; `grammar` is closed with the sampler."""
        self._library, self._grammar = library, grammar
        self._end_ids = sorted(end_ids)
        banned = {*parameters.bad_token_ids, *(end_ids if parameters.ignore_eos else ())}
        self._forbidden = sorted(banned)
        self._forbidden_at_first = sorted(banned | end_ids | set(parameters.stop_token_ids))
        self._min = parameters.min_new_tokens
        self._penalty = parameters.repetition_penalty
        self._recent = deque(prompt, PENALTY_WINDOW)
        self._size = size
        self._chain = library.chain(
            top_k=parameters.top_k,
            top_p=parameters.top_p,
            min_p=parameters.min_p,
            temperature=parameters.temperature,
            seed=seed,
        )

    def draw(self, logits: Logits, made: int) -> int:
        """The next token, after `made` others. Raises NoTokenAllowed, GrammarLost, and ValueError for logits not finite."""
        ids = self._allowed(made)
        values = self._penalised(logits)[ids]
        highest = values.max()
        if not math.isfinite(highest):
            raise ValueError("the model's logits are not finite")
        candidates = np.empty(len(ids), CANDIDATE)
        candidates["id"] = ids
        candidates["logit"] = values - highest  # so that no temperature can make an infinity of the highest
        token_id = int(candidates["id"][self._library.apply(self._chain, candidates)])
        self._recent.append(token_id)
        if self._grammar is not None and token_id not in self._end_ids:
            self._grammar.accept(token_id)
        return token_id

    def close(self) -> None:
        self._library.free_sampler(self._chain)
        if self._grammar is not None:
            self._grammar.close()

    def _allowed(self, made: int) -> NDArray[np.intp]:
        """The ids that may come next, ascending; at least one."""
        allowed = np.ones(self._size, np.bool_)
        if self._grammar is not None:
            allowed = self._grammar.allowed()
            # llguidance knows one end token; where it may come, the model's others may come too.
            allowed[self._end_ids] = allowed[self._end_ids].any()
        allowed[self._forbidden_at_first if made < self._min else self._forbidden] = False
        ids = np.flatnonzero(allowed)
        if not len(ids):
            raise NoTokenAllowed("no token may come next: all that the grammar allows is forbidden by other parameters")
        return ids

    def _penalised(self, logits: Logits) -> Logits:
        """With the logits of recent tokens divided by the penalty, or multiplied where that makes them less likely."""
        if self._penalty == 1 or not self._recent:
            return logits
        recent = np.unique(np.fromiter(self._recent, np.intp))
        values = logits[recent].astype(np.float64)
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / self._penalty, values * self._penalty)
        penalised = logits.copy()
        penalised[recent] = np.clip(values, -_LOGIT_MAX, _LOGIT_MAX)
        return penalised


def fold_seed(seed: int) -> int:
    """A uint64 as one of llama.cpp's seeds, which have 32 bits, the last value of them meaning "any": itself where it fits,
    else by a step of SplitMix64."""
    reserved = 2**32 - 1
    return seed if seed < reserved else _splitmix64(seed) % reserved


def _splitmix64(state: int) -> int:
    """The first output of the generator of that name, from this state."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def token_logprobs(logits: Logits, token_id: int, top: int) -> types_pb2.TokenLogprobs:
    """RAW logprobs of a token and of the `top` likeliest, ties by id. Their bits do not depend on `top`."""
    row = logits.astype(np.float64)
    highest = row.max()
    norm = highest + np.log(np.exp(row - highest).sum())
    likeliest: Iterable[int] = ()
    if top:
        # A partition alone would choose freely among equals at its edge.
        found = np.flatnonzero(row >= np.partition(row, -top)[-top])
        likeliest = found[np.lexsort((found, -row[found]))][:top]
    return types_pb2.TokenLogprobs(
        logprob=row[token_id] - norm,
        top=[types_pb2.TopLogprob(token_id=int(each), logprob=row[each] - norm) for each in likeliest],
    )
