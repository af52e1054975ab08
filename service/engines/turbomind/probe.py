"""Runs of known prompts on a loaded model, before there is an event loop, and what they prove.

`first_run` shows that TurboMind answers, which products the model has, and which part of the KV cache one block is.
`prove_pieces`, `prove_prefix_cache` and `prove_kernels` each show that an override reads and writes what it is meant to: the
places in TurboMind's structures belong to one build of it. So known prompts are run, and what the override saw is compared with
what it must have seen. Only then does the override change anything, and further runs show what it did.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.turbomind import BLOCK_TOKENS, PIECE_TOKENS, PIECES_TOKENS, TurbomindOptions
from service.engines.turbomind.kernels import Product, alike
from service.engines.turbomind.native import FINISHED, RUNNING, Handle, Native, why
from service.engines.turbomind.overrides import PIECE, RESUME, Overrides, Resume
from service.engines.turbomind.request import request_of

RUN_IDS = itertools.count(2**63)
"""None that the service uses: it counts from 1. No two runs have the same, for TurboMind may still have the one before."""
NEW_TOKENS = 16
BLOCKS_BEFORE = 4
OVER = 8
"""Prompt tokens in the last block; with the answer they do not fill it."""
SECONDS_MAX = 120.0

SHARED = 2 * BLOCK_TOKENS
"""Prompt tokens that are cached: whole blocks."""
CONTEXT_TOKENS_MIN = SHARED + 2 + BLOCK_TOKENS
"""Below this nothing can be shown of a prefix cache, and little be gained."""
TRIES = 5
"""The first resume may come before TurboMind has published the blocks of the run before it."""
WATCHED = ((SHARED + 1, SHARED), (SHARED, SHARED - 1), (SHARED + 2, SHARED))
"""Tokens of a prompt, and how many TurboMind by itself takes from the cache: all whole blocks, but never the last token."""
CORRECTED = ((SHARED + 1, SHARED - 1), (SHARED, SHARED - 2), (SHARED + 2, SHARED))
"""The same with the override, which leaves two tokens or more."""

KERNEL_PROMPTS = ((63, False), (20, False), (5, False), (63, True), (33, True), (2, True))
"""Tokens of the prompts that kernels are tried with, and whether all of them are one token, which sends every row to the same
experts. They are shorter than a block: the prefix cache keeps none of them."""
KERNEL_BACKGROUND = 6
"""Prompts that run beside them, of 63 tokens."""
KERNEL_TOKENS = 4
"""New tokens of each."""


def first_run(native: Native, context_tokens: int) -> float:
    """Which part of the KV cache one block is; 0: it was not seen. Raises EngineUnusable if TurboMind does not answer."""
    new = min(NEW_TOKENS, context_tokens // 2)
    before = max(0, min(BLOCKS_BEFORE, (context_tokens - new - OVER) // BLOCK_TOKENS))
    length = before * BLOCK_TOKENS + min(OVER, context_tokens - new)
    usages = [0.0]
    finish(native, [fresh_prompt(native.vocabulary_size, length)], new, lambda: usages.append(native.load().usage))
    return max(usages) / (before + 1)


def fresh_prompt(vocabulary_size: int, length: int) -> tuple[int, ...]:
    """A random one. What the first runs leave in the prefix cache was made by kernels of TurboMind's own choice, so no request
    may ever find it."""
    return tuple(secrets.randbelow(vocabulary_size) for _ in range(length))


def finish(
    native: Native, prompts: Sequence[Sequence[int]], new_tokens: int, on_step: Callable[[], None] = lambda: None
) -> list[Handle]:
    """Runs that start at once and have come to their ends; nothing else may run. `on_step` is called at every report before the
    last. Raises EngineUnusable if TurboMind does not answer."""
    given = types_pb2.ResolvedParameters(
        temperature=0.9, top_k=40, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new_tokens, ignore_eos=True, logprobs=1
    )
    request = request_of(given, 1, stream=True, end_ids=frozenset())
    changed = threading.Event()
    handles = [native.start(next(RUN_IDS), prompt, request, None, changed.set) for prompt in prompts]
    running = list(handles)
    deadline = time.monotonic() + SECONDS_MAX
    while changed.wait(max(0.0, deadline - time.monotonic())):
        changed.clear()
        for handle in tuple(running):
            progress = handle.poll()
            if progress is None:
                continue
            if progress.status == FINISHED:
                running.remove(handle)
            elif progress.status != RUNNING:
                raise EngineUnusable(f"--engine turbomind fails its first runs: {why(progress.status)}")
        if not running:
            return handles
        on_step()
    raise EngineUnusable(f"--engine turbomind did not answer its first runs within {SECONDS_MAX:g} s")


def _cached(native: Native, prompt: Sequence[int]) -> int:
    """Prompt tokens of a run that came from the prefix cache."""
    (handle,) = finish(native, [prompt], 1)
    return handle.account.cached


def prove_prefix_cache(native: Native, overrides: Overrides) -> str:
    """Why the cache cannot be relied on; empty: it can, and rests of one token are corrected from now on. Nothing else may run.
    Raises EngineUnusable if TurboMind does not answer."""
    text = fresh_prompt(native.vocabulary_size, SHARED + 2)
    overrides.resume(Resume.WATCH)
    why = _watched(native, overrides, text)
    if not why and RESUME not in overrides.omitted:
        overrides.resume(Resume.CORRECT)
        for length, expected in CORRECTED:
            if not why and (found := _cached(native, text[:length])) != expected:
                why = f"with the override resume {_taken(found, length, expected)}"
    if why:
        overrides.resume(Resume.UNWATCHED)
    return why


def _watched(native: Native, overrides: Overrides, text: Sequence[int]) -> str:
    before = overrides.counters.calls[RESUME]
    if found := _cached(native, text):
        return f"TurboMind took {found} tokens of a new prompt from its cache"
    if overrides.counters.calls[RESUME] == before:
        return "TurboMind does not reach the override resume"
    if (seen := overrides.resumed) != (len(text), 0):
        return _differs(len(text), 0, seen)
    for _ in range(TRIES):
        if _cached(native, text):
            break
    for length, expected in WATCHED:
        found = _cached(native, text[:length])
        if found != expected:
            return _taken(found, length, expected)
        if (seen := overrides.resumed) != (length, expected):
            return _differs(length, expected, seen)
    return ""


def _differs(length: int, cached: int, seen: tuple[int, int]) -> str:
    return f"of a prompt of {length} tokens, {cached} of them cached, the override resume reads {seen[0]} and {seen[1]}"


def _taken(found: int, length: int, expected: int) -> str:
    return f"TurboMind took {found} of {length} prompt tokens from its cache, not {expected}"


def prove_pieces(native: Native, overrides: Overrides, options: TurbomindOptions) -> str:
    """Why prompts cannot be cut at places of their own; empty: they are from now on. Nothing else may run. Raises
    EngineUnusable if TurboMind does not answer."""
    length = min(PIECE_TOKENS + 2 * BLOCK_TOKENS, options.context_tokens - 1)
    if length < 2:
        return ""
    finish(native, [fresh_prompt(native.vocabulary_size, length)], 1)
    if (seen := overrides.step) != (0, length, length):
        return f"of a prompt of {length} tokens the override piece reads {seen}, not {(0, length, length)}"
    overrides.pieces(PIECE_TOKENS, PIECES_TOKENS, options.step_context_tokens)
    before, expected = overrides.counters.cuts, int(length > PIECE_TOKENS + 1 and PIECE not in overrides.omitted)
    finish(native, [fresh_prompt(native.vocabulary_size, length)], 1)
    found = (overrides.counters.cuts - before) / options.tp  # each GPU has a scheduler
    if found != expected:
        return f"TurboMind computed a prompt of {length} tokens in {found + 1:g} pieces, not {expected + 1}"
    if overrides.counters.strays:
        return "the override piece does not find a prompt among those of its pass"
    return ""


@dataclass(frozen=True, slots=True)
class KernelProof:
    """Which of TurboMind's own kernels round alike."""

    permitted: Mapping[Product, tuple[int, ...]]
    """By product the numbers of rows, rising, whose kernels may serve."""
    excluded: tuple[str, ...]
    """The others, in words."""
    classes: tuple[int, ...]
    """By place of a number of rows, which digest the answers had; -1: they depended on what ran beside them."""


def prove_kernels(native: Native, overrides: Overrides, tuned: Mapping[Product, Mapping[int, str]]) -> KernelProof:
    """Of TurboMind's own kernels, those that give every answer the same bits. All products are served by what each was tuned
    with for its first number of rows, then for its second, and so on. A number is permitted if the prompts have the answers
    that most numbers give, each prompt alone and all at once. Only permitted kernels serve from now on. Nothing else may run.
    Raises EngineUnusable if TurboMind does not answer, NoOverrides for more products than there is room for."""
    size = native.vocabulary_size
    prompts = [fresh_prompt(size, 1) * length if one else fresh_prompt(size, length) for length, one in KERNEL_PROMPTS]
    background = [fresh_prompt(size, KERNEL_PROMPTS[0][0]) for _ in range(KERNEL_BACKGROUND)]

    def answers(served: Mapping[Product, Sequence[int]]) -> str | None:
        """A digest; None: a prompt's answer depends on what runs beside it."""
        overrides.kernels({product.numbers: rows for product, rows in served.items()})
        alone = [_digest(finish(native, [prompt], KERNEL_TOKENS)[0], prompt) for prompt in prompts]
        together = finish(native, [*prompts, *background], KERNEL_TOKENS)
        same = alone == [_digest(handle, prompt) for handle, prompt in zip(together, prompts, strict=False)]
        return hashlib.sha256("".join(alone).encode()).hexdigest() if same else None

    places = {product: list(rows) for product, rows in tuned.items()}
    count = max(map(len, places.values()), default=0)
    trials = [{product: [rows[min(place, len(rows) - 1)]] for product, rows in places.items()} for place in range(count)]
    found = [answers(trial) for trial in trials]
    chosen = alike(found)
    permitted = {product: tuple(dict.fromkeys(trials[place][product][0] for place in chosen)) for product in places if chosen}
    if chosen and answers(permitted) != found[chosen[0]]:
        chosen, permitted = (), {}
    excluded = [
        ", ".join(f"{product.name} for {rows} rows (tile {tuned[product][rows]})" for product, (rows,) in trial.items())
        for place, trial in enumerate(trials)
        if place not in chosen
    ]
    known = list(dict.fromkeys(filter(None, found)))
    classes = tuple(-1 if digest is None else known.index(digest) for digest in found)
    return KernelProof(permitted, tuple(excluded), classes)


def _digest(handle: Handle, prompt: Sequence[int]) -> str:
    """Of all tokens and logprobs of an answer."""
    whole = hashlib.sha256(repr(handle.ids(len(prompt), len(prompt) + KERNEL_TOKENS)).encode())
    for index in range(KERNEL_TOKENS):
        ids, values = handle.logprobs(index)
        whole.update(ids.tobytes() + values.tobytes())
    return whole.hexdigest()
