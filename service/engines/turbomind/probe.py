"""Runs of known prompts on a loaded model, before there is an event loop.

The first run shows that TurboMind answers, which products the model has, and which part of the KV cache one block is.
`prove` shows whether the prefix cache may be used: the override of PlanResume reads and writes two numbers at fixed
places in a structure of TurboMind's, and those places belong to one build. So known prompts are resumed from the cache,
and the two numbers are compared with what TurboMind reports of each run. Only if all are as expected does the override
correct anything, and the same reports show what it did.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.turbomind.native import Handle, Native, Status, why
from service.engines.turbomind.options import BLOCK_TOKENS
from service.engines.turbomind.overrides import RESUME, Overrides, Resume
from service.engines.turbomind.request import request_of

RUN_ID = 2**63
"""Of no run of the service's, which count from 1."""
NEW_TOKENS = 16
BLOCKS_BEFORE = 4
OVER = 8
"""Prompt tokens in the last block; with the answer they do not fill it."""
SECONDS_MAX = 120.0


def first_run(native: Native, context_tokens: int) -> float:
    """Which part of the KV cache one block is; 0: it was not seen. Raises EngineUnusable if TurboMind does not answer."""
    new = min(NEW_TOKENS, context_tokens // 2)
    before = max(0, min(BLOCKS_BEFORE, (context_tokens - new - OVER) // BLOCK_TOKENS))
    length = before * BLOCK_TOKENS + min(OVER, context_tokens - new)
    prompt = fresh_prompt(native.vocabulary_size, length)
    usages = [0.0]
    finish(native, prompt, new, lambda: usages.append(native.load().usage))
    return max(usages) / (before + 1)


def fresh_prompt(vocabulary_size: int, length: int) -> tuple[int, ...]:
    """A random one. What the first runs leave in the prefix cache was made by kernels of TurboMind's own choice, so no request
    may ever find it."""
    return tuple(secrets.randbelow(vocabulary_size) for _ in range(length))


def finish(native: Native, prompt: Sequence[int], new_tokens: int, on_step: Callable[[], None] = lambda: None) -> Handle:
    """A run that has come to its end; nothing else may run. `on_step` is called at every report before it. Raises
    EngineUnusable if TurboMind does not answer."""
    given = types_pb2.ResolvedParameters(
        temperature=0.9, top_k=40, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new_tokens, ignore_eos=True
    )
    request = request_of(given, 1, stream=True, end_ids=frozenset())
    changed = threading.Event()
    handle = native.start(RUN_ID, prompt, request, None, changed.set)
    deadline = time.monotonic() + SECONDS_MAX
    while changed.wait(max(0.0, deadline - time.monotonic())):
        changed.clear()
        progress = handle.poll()
        if progress is None:
            continue
        if progress.status == Status.FINISHED:
            return handle
        if progress.status != Status.RUNNING:
            raise EngineUnusable(f"--engine turbomind fails its first run: {why(progress.status)}")
        on_step()
    raise EngineUnusable(f"--engine turbomind did not answer its first run within {SECONDS_MAX:g} s")


SHARED = 2 * BLOCK_TOKENS
"""Prompt tokens that are cached: whole blocks."""
CONTEXT_TOKENS_MIN = SHARED + 2 + BLOCK_TOKENS
"""Below this nothing can be shown, and little be gained."""
TRIES = 5
"""The first resume may come before TurboMind has published the blocks of the run before it."""
WATCHED = ((SHARED + 1, SHARED), (SHARED, SHARED - 1), (SHARED + 2, SHARED))
"""Tokens of a prompt, and how many TurboMind by itself takes from the cache: all whole blocks, but never the last token."""
CORRECTED = ((SHARED + 1, SHARED - 1), (SHARED, SHARED - 2), (SHARED + 2, SHARED))
"""The same with the override, which leaves two tokens or more."""


def prove(native: Native, overrides: Overrides) -> str:
    """Why the cache cannot be relied on; an empty text: it can, and rests of one token are corrected from now on. Nothing else
    may run. Raises EngineUnusable if TurboMind does not answer."""
    text = fresh_prompt(native.vocabulary_size, SHARED + 2)
    overrides.resume(Resume.WATCH)
    why = _watched(native, overrides, text)
    if not why and RESUME not in overrides.omitted:
        overrides.resume(Resume.CORRECT)
        why = _corrected(native, text)
    if why:
        overrides.resume(Resume.UNWATCHED)
    return why


def _watched(native: Native, overrides: Overrides, text: Sequence[int]) -> str:
    before = overrides.counters.calls[RESUME]
    if found := finish(native, text, 1).account.cached:
        return f"TurboMind took {found} tokens of a new prompt from its cache"
    if overrides.counters.calls[RESUME] == before:
        return "TurboMind does not reach the override resume"
    if (seen := overrides.resumed) != (len(text), 0):
        return _differs(len(text), 0, seen)
    for _ in range(TRIES):
        if finish(native, text, 1).account.cached:
            break
    for length, expected in WATCHED:
        found = finish(native, text[:length], 1).account.cached
        if found != expected:
            return f"TurboMind took {found} of {length} prompt tokens from its cache, not {expected}"
        if (seen := overrides.resumed) != (length, expected):
            return _differs(length, expected, seen)
    return ""


def _differs(length: int, cached: int, seen: tuple[int, int]) -> str:
    return f"of a prompt of {length} tokens, {cached} of them cached, the override resume reads {seen[0]} and {seen[1]}"


def _corrected(native: Native, text: Sequence[int]) -> str:
    for length, expected in CORRECTED:
        found = finish(native, text[:length], 1).account.cached
        if found != expected:
            return f"with the override resume TurboMind took {found} of {length} prompt tokens from its cache, not {expected}"
    return ""
