"""`python -m service calibrate`: prove on this GPU what an exact start needs, and keep it, before anybody waits for it."""

from __future__ import annotations

import asyncio
import sys

from serving.logs import report_failure
from serving.program import BAD_CONFIGURATION, DRAINED, FAILED

from service.config import Settings
from service.engines import options, turbomind
from service.engines.base import EngineUnusable


def calibrate(settings: Settings) -> int:
    """The exit code: 0; 1 where something is not covered or cannot be loaded; 2 for an engine that has nothing to prove.

    The next start with the same settings takes what is kept. Nothing listens meanwhile, and there is no self-test.
    """
    told = options(settings)
    if not isinstance(told, turbomind.TurbomindOptions):
        why = f"calibrate: --engine {settings.engine} has no products to prove; only turbomind has"
        report_failure("service", why, BAD_CONFIGURATION)
        return BAD_CONFIGURATION
    try:
        engine = turbomind.load(told)
    except EngineUnusable as error:
        report_failure("service", f"calibrate: {error}", FAILED)
        return FAILED
    text, covered = turbomind.report(engine)
    sys.stdout.write(text + "\n")
    asyncio.run(engine.close())
    return DRAINED if covered else FAILED
