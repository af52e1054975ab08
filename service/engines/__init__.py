"""The engines, behind one protocol.

base        what the service asks of an engine
sources     what every engine asks of a grammar
llama       llama.cpp on CPUs; the default
turbomind   LMDeploy's TurboMind on GPUs
scripted    no model: for tests, simulations and benchmarks
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from service.engines.base import Engine

if TYPE_CHECKING:
    from service.config import Settings


def load(settings: Settings) -> Engine:
    """The engine of these settings, its model loaded; takes as long as that takes. Raises EngineUnusable.

    Imports are late: no engine needs another one's packages.
    """
    match settings.engine:
        case "llama":
            from service.engines import llama

            # Threads of one step wait for each other hundreds of times. libgomp lets them spin for ever so long, which beside
            # any other busy process costs nine tenths of the speed. Read when the library is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            return llama.load(llama.LlamaOptions(**settings.own("llama")))
        case "scripted":
            from service.engines.scripted import ScriptedEngine, parse

            script = parse(settings.script or "{}")
            time.sleep(script.load_seconds)
            return ScriptedEngine(script)
        case "turbomind":
            from service.engines import turbomind

            return turbomind.load(turbomind.TurbomindOptions(state_dir=settings.state_dir, **settings.own("turbomind")))
        case other:
            raise AssertionError(other)
