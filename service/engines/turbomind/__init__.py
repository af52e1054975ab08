"""The GPU engine: LMDeploy's TurboMind, made batch-invariant.

    options       how to run a model
    host, model   what the machine has, and what the model's folder says
    overrides     four functions of TurboMind's and cuBLAS's, replaced (overrides.c, cublaslt.h), and their counters
    plans         which algorithms may serve a product: pure
    calibrate     the same, proved on this GPU
    exactness     all that together: what it takes to be exact, and what is missing
    table         the same for people
    request       a run's parameters as TurboMind wants them: pure
    vocabulary    tokens and chat template
    formats       response formats
    logprobs      of a token: pure
    memory        how much the KV cache holds: pure
    native        LMDeploy's TurboMind; the only file that touches it
    probing       the first run
    resuming      whether the prefix cache may be used
    batching      runs in, tokens out
    preemptions   whether TurboMind took a run out of its batch: pure
    metering      what Prometheus is shown, LMDeploy's own metrics among it
    engine        the face towards the service

lmdeploy, torch, transformers and numpy are needed only where `load` is called, and imported only there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.engines.turbomind.options import TurbomindOptions

if TYPE_CHECKING:
    from service.engines.turbomind.engine import TurbomindEngine


def load(options: TurbomindOptions) -> TurbomindEngine:
    """A loaded engine. Takes from ten seconds to minutes, most of it TurboMind's own. Raises EngineUnusable."""
    from service.engines.turbomind.loading import load as load_all

    return load_all(options)


def report(engine: TurbomindEngine) -> tuple[str, bool]:
    """What was proved when it was loaded, as a table, and whether all of it is covered."""
    from service.engines.turbomind.table import table

    exactness = engine.exactness
    return table(exactness), not exactness.why_not


__all__ = ["TurbomindOptions", "load", "report"]
