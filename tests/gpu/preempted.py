"""`python -m tests.gpu.preempted MODEL`: promises more of the KV cache than there is, to test that preemptions are
detected."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, cast
from unittest import mock

from service.engines.turbomind import TurbomindOptions
from service.engines.turbomind import engine as engine_module
from service.engines.turbomind.engine import TurbomindEngine
from tests.gpu.plan import say
from tests.service.llama_kit import Bench

RUNS, NEW_TOKENS = 64, 1500
CACHE_FRACTION = 0.006
"""Room for a fifth of what the runs need, with a small model on a GPU of 80 GB."""


async def attempt(engine: TurbomindEngine) -> int:
    """The detected preemptions of streamed runs; 0 if the grade did not fall."""
    bench = Bench(cast(Any, engine))
    seen = 0
    for stream in (False, True):
        before = engine._meter.preemptions.count
        given = {"top_k": 40, "max_new_tokens": NEW_TOKENS}
        runs = [bench.start("Shanghai is", seed=7, stream=stream, **given) for _ in range(RUNS)]
        ends = [await bench.end(run_id) for run_id in runs]
        failed = [end.failed.message for end in ends if end.HasField("failed")]
        seen = engine._meter.preemptions.count - before
        say(f"{'streamed' if stream else 'not streamed'}: {seen} preemptions seen, {len(failed)} runs failed {failed[:1]}")
    say(f"the grade: {bench.falls or 'did not fall'}")
    await engine.close()
    return seen if bench.falls else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.preempted")
    parser.add_argument("model", type=Path)
    parser.add_argument("--state", type=Path, help="kept from call to call; else a new one")
    given = parser.parse_args()
    state = given.state or Path(tempfile.mkdtemp(prefix="ostinato-state-"))
    options = TurbomindOptions(
        model=given.model, state_dir=state, context_tokens=2048, runs=RUNS, cache_fraction=CACHE_FRACTION
    )
    os.environ["TM_LOG_LEVEL"] = "WARNING"
    with mock.patch.object(engine_module, "_blocks", return_value=1_000_000):
        engine = engine_module.load(options)
    sys.exit(0 if asyncio.run(attempt(engine)) else 1)


if __name__ == "__main__":
    main()
