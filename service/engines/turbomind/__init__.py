"""The GPU engine: LMDeploy's TurboMind, made batch-invariant.

    options      how to run a model
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

from typing import TYPE_CHECKING

from service.engines.turbomind.options import TurbomindOptions

if TYPE_CHECKING:
    from service.engines.turbomind.engine import TurbomindEngine


def load(options: TurbomindOptions) -> TurbomindEngine:
    """A loaded engine. Takes from ten seconds to minutes, most of it TurboMind's own. Raises EngineUnusable."""
    from service.engines.turbomind.engine import load as load_all

    return load_all(options)


__all__ = ["TurbomindOptions", "load"]
