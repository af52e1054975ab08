"""`python -m service calibrate`: prove on this GPU what an exact start needs, and keep it, before anybody waits for it."""

from __future__ import annotations

import asyncio
import sys

from ostinato.serving.program import BAD_CONFIGURATION, DRAINED, FAILED

from service.config import Settings
from service.engines import turbomind
from service.engines.base import EngineUnusable


def calibrate(settings: Settings) -> int:
    """The exit code: 0; 1 where something is not covered or cannot be loaded; 2 for an engine that has nothing to prove.

    The next start with the same settings takes what is kept. Nothing listens meanwhile, and there is no self-test.
    """
    if settings.engine != "turbomind":
        sys.stderr.write(f"service: calibrate: --engine {settings.engine} has no products to prove; only turbomind has\n")
        return BAD_CONFIGURATION
    try:
        engine = turbomind.load(turbomind.TurbomindOptions(state_dir=settings.state_dir, **settings.own("turbomind")))
    except EngineUnusable as error:
        sys.stderr.write(f"service: calibrate: {error}\n")
        return FAILED
    text, covered = turbomind.report(engine)
    sys.stdout.write(text + "\n")
    asyncio.run(engine.close())
    return DRAINED if covered else FAILED
