"""Whether the prefix cache may be used.

The override of PlanResume reads and writes two numbers at known places in a structure of TurboMind's, and those places belong
to one build of it. So known prompts are resumed from the cache, and the two numbers are watched beside what TurboMind itself
reports of each run. Only when all are as expected does the override correct anything, and the same reports show what it did.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.engines.turbomind.native import Native
from service.engines.turbomind.options import BLOCK_TOKENS
from service.engines.turbomind.overrides import RESUME, Overrides, Resume
from service.engines.turbomind.probing import finish, fresh_prompt

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
