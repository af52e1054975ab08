"""The first run of a loaded model, before there is an event loop: it shows that TurboMind answers, which products the model
has, and what part of the KV cache one block is."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.turbomind.native import Handle, Native, Status, why
from service.engines.turbomind.options import BLOCK_TOKENS
from service.engines.turbomind.request import request_of

RUN_ID = 2**63
"""Of no run of the service's, which count from 1."""
NEW_TOKENS = 16
BLOCKS_BEFORE = 4
OVER = 8
"""Prompt tokens in the last block; with the answer they do not fill it."""
SECONDS_MAX = 120.0


def probe(native: Native, context_tokens: int) -> float:
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
