"""`python -m tests.gpu.preempted MODEL`: promises more of the KV cache than there is, to test that preemptions are
detected."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from ostinato.v1 import types_pb2

from service.engines.turbomind import TurbomindOptions
from service.engines.turbomind import engine as engine_module
from service.engines.turbomind.engine import TurbomindEngine
from tests.gpu.smoke import Bench, say

RUNS, NEW_TOKENS = 64, 1500
CACHE_FRACTION = 0.006
"""Room for a fifth of what the runs need, with a small model on a GPU of 80 GB."""


async def attempt(engine: TurbomindEngine) -> int:
    """The detected preemptions of streamed runs; 0 if the grade did not fall."""
    falls: list[str] = []
    bench = Bench(engine)
    engine.start(bench.on_events, lambda grade, why: falls.append(f"{types_pb2.Grade.Name(grade)}: {why}"))
    seen = 0
    for stream in (False, True):
        before = engine._meter.preemptions
        ids = engine.vocabulary.encode("Shanghai is", special=True)
        changes = {"ignore_eos": True, "max_new_tokens": NEW_TOKENS}
        ends = await asyncio.gather(*(bench.run(ids, changes, stream=stream) for _ in range(RUNS)), return_exceptions=True)
        failed = [str(end) for end in ends if isinstance(end, BaseException)]
        seen = engine._meter.preemptions - before
        say(f"{'streamed' if stream else 'not streamed'}: {seen} preemptions seen, {len(failed)} runs failed {failed[:1]}")
    say("the grade:", falls or "did not fall")
    await engine.close()
    return seen if falls else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.preempted")
    parser.add_argument("model", type=Path)
    state = Path(tempfile.mkdtemp(prefix="ostinato-state-"))
    options = TurbomindOptions(
        model=parser.parse_args().model, state_dir=state, context_tokens=2048, runs=RUNS, cache_fraction=CACHE_FRACTION
    )
    os.environ["TM_LOG_LEVEL"] = "WARNING"
    with mock.patch("service.engines.turbomind.batching.blocks", return_value=1_000_000):
        engine = engine_module.load(options)
    sys.exit(0 if asyncio.run(attempt(engine)) else 1)


if __name__ == "__main__":
    main()
