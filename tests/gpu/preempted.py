"""`python -m tests.gpu.preempted MODEL`: promises more of the KV cache than there is, to test that preemptions are
detected."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from ostinato.errors import from_status
from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer
from service.engines.base import Events, Run
from service.engines.turbomind import TurbomindOptions
from service.engines.turbomind import engine as engine_module
from service.engines.turbomind.engine import TurbomindEngine
from tests.gpu.plan import say

RUNS, NEW_TOKENS = 64, 1500
CACHE_FRACTION = 0.006
"""Room for a fifth of what the runs need, with a small model on a GPU of 80 GB."""


class Bench:
    """Runs by number, and their ends."""

    def __init__(self, engine: TurbomindEngine) -> None:
        self.engine, self.count = engine, 0
        self.ends: dict[int, asyncio.Future[types_pb2.Output]] = {}

    def on_events(self, events: Events) -> None:
        for event in events:
            if event.HasField("finished"):
                self.ends[event.run_id].set_result(event.finished.output)
            elif event.HasField("failed"):
                self.ends[event.run_id].set_exception(from_status(event.failed))

    def run(self, ids: Sequence[int], *, stream: bool) -> asyncio.Future[types_pb2.Output]:
        self.count += 1
        parameters = types_pb2.ResolvedParameters(
            temperature=1.0, top_k=40, top_p=1.0, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS, ignore_eos=True
        )
        future = self.ends[self.count] = asyncio.get_running_loop().create_future()
        answer = Answer(parameters, self.engine.vocabulary)
        self.engine.submit(Run(self.count, 0, 1, engine_pb2.PURPOSE_UNSPECIFIED, tuple(ids), parameters, 7, stream, answer))
        return future


async def attempt(engine: TurbomindEngine) -> int:
    """The detected preemptions of streamed runs; 0 if the grade did not fall."""
    falls: list[str] = []
    bench = Bench(engine)
    engine.start(bench.on_events, lambda grade, why: falls.append(f"{types_pb2.Grade.Name(grade)}: {why}"))
    seen = 0
    for stream in (False, True):
        before = engine._meter.preemptions.count
        ids = engine.vocabulary.encode("Shanghai is", special=True)
        ends = await asyncio.gather(*(bench.run(ids, stream=stream) for _ in range(RUNS)), return_exceptions=True)
        failed = [str(end) for end in ends if isinstance(end, BaseException)]
        seen = engine._meter.preemptions.count - before
        say(f"{'streamed' if stream else 'not streamed'}: {seen} preemptions seen, {len(failed)} runs failed {failed[:1]}")
    say(f"the grade: {falls or 'did not fall'}")
    await engine.close()
    return seen if falls else 0


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
