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
from service.engines.llama import LlamaOptions
from service.engines.scripted.script import Script, parse
from service.engines.turbomind.options import TurbomindOptions

if TYPE_CHECKING:
    from service.config import Settings


def options(settings: Settings) -> LlamaOptions | TurbomindOptions | Script:
    """What the engine of these settings is told: what was given, and its own defaults. Raises EngineUnusable, and ValueError
    for a script that is none."""
    own = settings.own(settings.engine)
    match settings.engine:
        case "llama":
            return LlamaOptions(**own)
        case "turbomind":
            return TurbomindOptions(state_dir=settings.state_dir, **own)
        case _:
            return parse(settings.script or "{}")


def load(settings: Settings) -> Engine:
    """The engine of these settings, its model loaded; takes as long as that takes. Raises EngineUnusable.

    Imports are late: no engine needs another one's packages.
    """
    match options(settings):
        case LlamaOptions() as told:
            from service.engines import llama

            # Threads of one step wait for each other hundreds of times. libgomp lets them spin for ever so long, which beside
            # any other busy process costs nine tenths of the speed. Read when the library is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            return llama.load(told)
        case TurbomindOptions() as told:
            from service.engines import turbomind

            return turbomind.load(told)
        case script:
            from service.engines.scripted import ScriptedEngine

            time.sleep(script.load_seconds)
            return ScriptedEngine(script)
