"""The first run of a loaded model, before there is an event loop: it shows that TurboMind answers, which products the model
has, and what part of the KV cache one block is."""

from __future__ import annotations

import threading
import time

from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.turbomind.native import Native, Status, why
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
    prompt = tuple((7 * i + 11) % native.vocabulary_size for i in range(length))
    given = types_pb2.ResolvedParameters(
        temperature=0.9, top_k=40, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new, ignore_eos=True
    )
    request = request_of(given, 1, stream=True, end_ids=frozenset())
    changed = threading.Event()
    handle = native.start(RUN_ID, prompt, request, None, changed.set)
    usage, deadline = 0.0, time.monotonic() + SECONDS_MAX
    while changed.wait(max(0.0, deadline - time.monotonic())):
        changed.clear()
        progress = handle.poll()
        if progress is None:
            continue
        if progress.status == Status.FINISHED:
            return usage / (before + 1)
        if progress.status != Status.RUNNING:
            raise EngineUnusable(f"--engine turbomind fails its first run: {why(progress.status)}")
        usage = max(usage, native.load().usage)
    raise EngineUnusable(f"--engine turbomind did not answer its first run within {SECONDS_MAX:g} s")
