"""`python -m tests.gpu.bare MODEL [flags of the service]`: LMDeploy's own pipeline, measured as the service is.

It is the baseline: no overrides, LMDeploy's AsyncEngine inside `lmdeploy.pipeline`, with the settings of
`service/engines/turbomind/native.py` (context, runs, memory, types, prefix cache). Token ids go in and no logprobs come
out. All else has its default: the pipeline reports once, at the end, unless it streams, and detokenises its output, as
the service does. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdeploy

from ostinato.v1 import types_pb2
from serving.settings import read

from service.config import Settings
from service.engines.turbomind import BLOCK_TOKENS, TurbomindOptions
from tests.gpu.fronts import Answers
from tests.gpu.plan import Plan, names, numbers
from tests.gpu.speed import measure
from tests.gpu.traffic import Ask
from tests.gpu.worth import worth


class Bare:
    """A loaded pipeline with the methods of `tests.gpu.fronts.Front`. Of its outputs only the token ids are valid."""

    def __init__(self, model: Path, options: TurbomindOptions) -> None:
        config = lmdeploy.TurbomindEngineConfig(
            dtype=options.dtype,
            model_format=options.model_format,
            tp=options.tp,
            session_len=options.session_tokens,
            max_batch_size=options.runs,
            cache_max_entry_count=options.cache_fraction,
            cache_block_seq_len=BLOCK_TOKENS,
            enable_prefix_caching=options.prefix_cache == "on",
            quant_policy=0 if options.kv_bits == 16 else options.kv_bits,
            max_prefill_token_num=options.prefill_tokens,
        )
        self._context_tokens = options.context_tokens
        self._pipe: Any = lmdeploy.pipeline(str(model), backend_config=config, log_level="ERROR")
        self._engine: Any = self._pipe.async_engine
        if self._engine.backend != "turbomind":
            raise SystemExit(f"the pipeline runs {self._engine.backend}, not turbomind")
        self.seconds = 0.0

    async def describe(self) -> types_pb2.Model:
        return types_pb2.Model(context_tokens=self._context_tokens)

    async def ask(self, asks: Sequence[Ask], *, stream: bool = False) -> Answers:
        """All at once, on the pipeline's own event loop."""
        loop = self._pipe.internal_thread.loop
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(asks, stream), loop))

    async def _ask(self, asks: Sequence[Ask], stream: bool) -> Answers:
        requests = [await self._prepare(ask) for ask in asks]
        began = time.monotonic()
        outputs = await asyncio.gather(*(self._run(request, stream) for request in requests))
        self.seconds = time.monotonic() - began
        return {ask.name: output for ask, output in zip(asks, outputs, strict=True)}

    async def _prepare(self, ask: Ask) -> Any:
        given = ask.item.parameters
        ids = list(ask.item.token_ids.ids) or self._engine.tokenizer.encode(ask.item.text)
        wanted = lmdeploy.GenerationConfig(
            max_new_tokens=given.max_new_tokens,
            ignore_eos=given.ignore_eos,
            do_sample=given.temperature > 0,
            temperature=given.temperature or 1.0,
            top_k=given.top_k or 1,
            random_seed=given.seed,
        )
        return await self._engine.preprocess(None, self._engine.session_mgr.get(), wanted, input_ids=ids)

    async def _run(self, request: Any, stream: bool) -> types_pb2.Output:
        ids: list[int] = []
        async for out in self._engine.generate(request, stream_response=stream):
            ids += out.token_ids or ()
        return types_pb2.Output(token_ids=ids, prompt_tokens=request.input_token_len)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bare")
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--parts", type=names, default=("speed", "worth"))
    given, flags = parser.parse_known_args()
    settings = read(Settings, "service", ["--engine", "turbomind", *flags], {})[0]
    plan = Plan(given.model, Path(), batches=given.batches, trials=given.trials)
    began = time.monotonic()
    bare = Bare(given.model, TurbomindOptions(**settings.own("turbomind")))
    started = time.monotonic() - began
    rates = asyncio.run(measure(bare, plan, "bare")) if "speed" in given.parts else {}
    found = asyncio.run(worth(bare, plan, "bare")) if "worth" in given.parts else {}
    told = {"bare": f"lmdeploy {lmdeploy.__version__}", "started_seconds": started, "rates": rates, "worth": found}
    told["bad"] = plan.bad
    print("\n" + json.dumps(told), flush=True)
    os._exit(0)  # LMDeploy's threads do not always end


if __name__ == "__main__":
    main()
