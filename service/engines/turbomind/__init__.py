"""The GPU engine: LMDeploy's TurboMind, made batch-invariant.

    host         this machine: LMDeploy, GPU, driver
    model        the model's folder, tokens and chat template
    overrides    functions of TurboMind and cuBLAS that are replaced (overrides.c, cublaslt.h), and their counters
    kernels      which algorithms may serve a product, proved on this GPU
    exactness    what it takes to be exact, and what is missing
    native       LMDeploy's TurboMind; the only file that touches it
    probe        runs of known prompts at start, and what they prove
    request      a run's parameters and logprobs
    grammars     response formats, compiled by TurboMind's xgrammar
    batching     runs in, tokens out; the KV cache's blocks
    metrics      Prometheus metrics, and whether TurboMind preempted a run
    engine       loading, and what the service sees

lmdeploy, torch, transformers and numpy are needed only where `load` is called, and imported only there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.engines.base import EngineUnusable

if TYPE_CHECKING:
    from service.engines.turbomind.engine import TurbomindEngine


BLOCK_TOKENS = 64
"""Of one block of the KV cache. TurboMind's default; its kernels are built for it."""
TOP_K_MAX = 1024
"""A larger top_k ends the process inside TurboMind."""
PREFILL_TOKENS = 8192
"""TurboMind's own default for the prompt tokens of one step."""
PIECE_TOKENS = 2048
"""A longer prompt is computed in pieces that end at multiples of this, one a step: other runs' next tokens do not wait for
all of it. A multiple of BLOCK_TOKENS."""
PIECES_TOKENS = 2 * PIECE_TOKENS + BLOCK_TOKENS
"""Prompt tokens of one step then: a piece, and as many of other prompts."""
STEP_CONTEXT_TOKENS = 32_768
"""Of the prompts that begin in one step, cached beginnings included, but at least the longest prompt. TurboMind's default is
the longest prompt, so that of prompts that are nearly all cached one begins a step. Their keys and values need room: of an 8B
with 8 heads of them, 4 KiB a token."""
SPLIT_WORKSPACE = 4096
"""Room for partial results of a decode's attention: the limit of splits times runs."""
SHORT_CONTEXT = 4096
"""Up to this context, splitting the attention costs more than it saves."""
SPLITS_SHORT, SPLITS_LONG = 1, 8
"""The default up to SHORT_CONTEXT, and above."""
SPLITS_MAX = 128
FORMATS = ("hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4")
"""Of a model's weights."""


@dataclass(frozen=True, slots=True)
class TurbomindOptions:
    """The defaults can earn EXACT."""

    model: Path | None = None
    """A folder in Hugging Face's layout: config.json, safetensors, tokenizer."""
    state_dir: Path = Path(".run/service")
    """For what is compiled and measured once."""
    context_tokens: int = 4096
    """Prompt and answer of one run together; at most what the model was trained for."""
    runs: int = 256
    """At once."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    model_format: Literal["hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"] | None = None
    """None: as config.json says."""
    tp: int = 1
    """GPUs that share the model, a power of two. More than one is not proved to be exact."""
    communicator: Literal["nccl", "cuda-ipc"] = "nccl"
    """Adds up the results of several GPUs."""
    cache_fraction: float = 0.8
    """Share of the memory that is free after the weights are loaded, for the KV cache."""
    kv_bits: Literal[4, 8, 16] = 16
    """Of one number in the KV cache."""
    attention_splits: int = 0
    """Parts that a decode's attention is cut into; 0: by the context."""
    prefix_cache: Literal["on", "off"] = "on"
    """Whether a prompt may reuse the beginning of an earlier prompt."""
    exact: bool = True
    """False: stock TurboMind, for comparison."""

    def __post_init__(self) -> None:
        """Raises EngineUnusable for what TurboMind would refuse with a worse message, or not notice. `service.config` has the
        other bounds."""
        if self.tp & (self.tp - 1):
            raise EngineUnusable(f"--tp must be a power of two, is {self.tp}")
        if not 0 < self.cache_fraction < 1:
            raise EngineUnusable(f"--cache-fraction must be above 0 and below 1, is {self.cache_fraction}")
        if self.splits * self.runs > SPLIT_WORKSPACE:
            raise EngineUnusable(
                f"--attention-splits ({self.splits}) times --runs ({self.runs}) is more than TurboMind has room for,"
                f" {SPLIT_WORKSPACE}: lower one of them"
            )

    @property
    def splits(self) -> int:
        """The constant number of parts of the attention."""
        chosen = SPLITS_SHORT if self.context_tokens <= SHORT_CONTEXT else SPLITS_LONG
        return self.attention_splits or min(chosen, max(1, SPLIT_WORKSPACE // self.runs))

    @property
    def session_tokens(self) -> int:
        """TurboMind's session_len. It must be more than the runs, or TurboMind takes it for a factor."""
        return max(self.context_tokens, self.runs + 1)

    @property
    def step_context_tokens(self) -> int:
        """Of the prompts that begin in one step, in all."""
        return max(STEP_CONTEXT_TOKENS, self.session_tokens)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of one step."""
        return PIECES_TOKENS if self.exact else max(PREFILL_TOKENS, self.session_tokens)


def load(options: TurbomindOptions) -> TurbomindEngine:
    """A loaded engine. Takes from ten seconds to minutes, most of it TurboMind's own. Raises EngineUnusable."""
    from service.engines.turbomind.engine import load as load_all

    return load_all(options)


__all__ = ["TurbomindOptions", "load"]
