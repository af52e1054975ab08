"""The engines, behind one protocol.

base        the protocol, and what engines share
llama       llama.cpp on CPUs; the default
turbomind   LMDeploy's TurboMind on GPUs
scripted    no model: for tests, simulations and benchmarks
huggingface a vocabulary in the form of Hugging Face's files
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from service.engines.base import Engine
from service.engines.llama import LlamaOptions
from service.engines.turbomind import TurbomindOptions

if TYPE_CHECKING:
    from service.config import Settings
    from service.engines.scripted import Script


def options(settings: Settings) -> LlamaOptions | TurbomindOptions | Script:
    """The options of these settings' engine, with its defaults. Raises EngineUnusable, and ValueError for an invalid script."""
    given = settings.own(settings.engine)
    match settings.engine:
        case "llama":
            return LlamaOptions(**given)
        case "turbomind":
            return TurbomindOptions(state_dir=settings.state_dir, **given)
        case _:
            from service.engines import scripted

            return scripted.parse(settings.script or "{}")


def load(settings: Settings) -> Engine:
    """The engine of these settings, its model loaded. Raises EngineUnusable.

    Imports are late: no engine needs the packages of another.
    """
    match options(settings):
        case LlamaOptions() as given:
            from service.engines import llama

            # The threads of a step wait for each other hundreds of times. libgomp lets them spin for long, which costs nine
            # tenths of the speed when another process is busy. The variable is read when the library is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            return llama.load(given)
        case TurbomindOptions() as given:
            from service.engines import turbomind

            return turbomind.load(given)
        case script:
            from service.engines import scripted

            time.sleep(script.load_seconds)
            return scripted.ScriptedEngine(script)
