"""Which token comes next: a make-believe model whose every distribution is the same, over a menu that hashes choose.

At each position the model ranks all candidates, by hash of model, prompt and position; rank r has probability 1/4 * (3/4)^r.
Greedy takes rank 0. Sampling draws a rank, by hash of the seed and the sampling parameters too. So texts of two seeds part
soon, greedy texts have no seed in them, and logprobs do not depend on how many of them are asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from hashlib import sha256
from itertools import accumulate, islice

from ostinato.digest import f64, ids, text, u64
from ostinato.v1 import types_pb2

from service.engines.base import Run
from service.engines.scripted.vocabulary import END

LETTERS = tuple(b"etaoinshrdlcumwfgypbvkjxqz .,-\n")
"""31, a prime: walked through in steps of 1 to 30, none is met twice. All other printable ASCII follows behind."""
_SPACE = LETTERS.index(ord(" "))
_OTHERS = tuple(byte for byte in range(33, 127) if byte not in LETTERS)
RANKS = len(LETTERS) + len(_OTHERS) + 1
PROBABILITIES = tuple(0.25 * 0.75**rank for rank in range(RANKS))
LOGPROBS = tuple(math.log(0.25) + rank * math.log(0.75) for rank in range(RANKS))
_DRAWS = tuple(round(2**16 * (1 - 0.75 ** (rank + 1))) for rank in range(30))
_END_RANK = 9
ANSWER_TOKENS_MIN = 8
"""No answer ends by itself before: what a rule does at an early token then happens for certain."""
_BLOCK = 16
"""Positions served by one SHA-256, two bytes each."""


class Tokens:
    """The tokens of one run, by their index."""

    def __init__(self, model: str, run: Run) -> None:
        given = run.parameters
        self._banned = frozenset(given.bad_token_ids) | (frozenset({END}) if given.ignore_eos else frozenset())
        self._banned_early = self._banned | {END}
        self._banned_at_first = self._banned_early | frozenset(given.stop_token_ids)
        self._stop_free = given.min_new_tokens
        self._end_free = max(given.min_new_tokens, ANSWER_TOKENS_MIN)
        self._top = given.logprobs if given.HasField("logprobs") else None
        self._menu = menu(given)
        self._model_key = sha256(text(model) + ids(run.token_ids) + f64(given.repetition_penalty)).digest()
        draw = b"".join(map(f64, (given.temperature, given.top_p, given.min_p))) + u64(given.top_k) + u64(run.seed)
        self._draw_key = sha256(self._model_key + draw).digest()
        self._block = -1
        self._model_bytes = self._draw_bytes = b""

    def token(self, index: int, *, other: bool = False) -> tuple[int, types_pb2.TokenLogprobs | None]:
        """Token `index` and its logprobs, if wanted. `other`: the next best in its place."""
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            self._block = block
            self._model_bytes = sha256(self._model_key + u64(block)).digest()
            self._draw_bytes = sha256(self._draw_key + u64(block)).digest()
        first, second = self._model_bytes[2 * place : 2 * place + 2]
        drawn = int.from_bytes(self._draw_bytes[2 * place : 2 * place + 2])
        rank = bisect_right(_DRAWS, drawn) % self._menu + other
        banned = self._banned if index >= self._end_free else self._banned_early
        if index < self._stop_free:
            banned = self._banned_at_first
        if self._top is None:
            return next(islice(_ranking(first, second, banned), rank, None)), None
        ranked = list(islice(_ranking(first, second, banned), max(rank + 1, self._top)))
        top = [types_pb2.TopLogprob(token_id=t, logprob=LOGPROBS[r]) for r, t in enumerate(ranked[: self._top])]
        return ranked[rank], types_pb2.TokenLogprobs(logprob=LOGPROBS[rank], top=top)


def menu(given: types_pb2.ResolvedParameters) -> int:
    """How many ranks the sampling parameters leave, at least 1."""
    if given.temperature == 0:
        return 1
    by_top_k = given.top_k or RANKS
    by_top_p = RANKS if given.top_p >= 1 else bisect_right([*accumulate(PROBABILITIES)], given.top_p) + 1
    by_min_p = RANKS - bisect_left(PROBABILITIES[::-1], given.min_p * PROBABILITIES[0])
    return max(1, min(by_top_k, by_top_p, by_min_p))


def _ranking(first: int, second: int, banned: frozenset[int]) -> Iterator[int]:
    """All candidates, likeliest first: END in front now and then, else at its fixed rank."""
    end_rank = 0 if second < 4 else _END_RANK
    start = _SPACE if first % 5 == 0 else first
    step = 1 + second % (len(LETTERS) - 1)
    for rank in range(len(LETTERS)):
        if rank == end_rank and END not in banned:
            yield END
        letter = LETTERS[(start + rank * step) % len(LETTERS)]
        if letter not in banned:
            yield letter
    yield from (byte for byte in _OTHERS if byte not in banned)
