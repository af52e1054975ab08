"""The turbomind engine: how it is loaded, and what the service sees of it.

`load` goes from options to an engine in the only order that works: overrides, torch, TurboMind's library, the model,
its first run, the proof of the prefix cache, the proof of the products. An engine lives on the event loop, except where
it says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from ostinato.v1 import engine_pb2, types_pb2
from serving.program import FAILED

from service.engines.base import EngineUnusable, Events, Run
from service.engines.turbomind import BLOCK_TOKENS, PIECE_TOKENS, TOP_K_MAX, TurbomindOptions, host, model, probe
from service.engines.turbomind.batching import Batching, block_bytes, blocks_needed, blocks_promised
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.grammars import Formats, checker, grammar_compiler
from service.engines.turbomind.metrics import Meter
from service.engines.turbomind.model import HuggingFaceVocabulary
from service.engines.turbomind.native import Native, import_lmdeploy
from service.engines.turbomind.overrides import TOP_K_BUCKET
from service.engines.turbomind.request import RULES

if TYPE_CHECKING:
    from prometheus_client.core import Metric


WATCH_SECONDS = 5.0
STALL_SECONDS = 90.0
"""Without a step while there is work; the limit of LMDeploy's own server."""
END_SECONDS = 10.0
"""For cancelled runs to end, and then for TurboMind's threads."""
_log = logging.getLogger(__name__)

OnGrade = Callable[[types_pb2.Grade.ValueType, str], None]


class TurbomindEngine:
    """A `service.engines.base.Engine`."""

    name = "turbomind"
    logprob_kind = types_pb2.LOGPROB_KIND_PROCESSED
    top_k_max = TOP_K_MAX

    def __init__(
        self,
        options: TurbomindOptions,
        native: Native,
        vocabulary: HuggingFaceVocabulary,
        exactness: Exactness,
        formats: Formats,
        *,
        blocks: int,
        fields: Mapping[str, str],
        prefix_cache: bool = False,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        """`blocks`: of the KV cache."""
        self._native, self._formats, self._end_process = native, formats, end_process
        self.exactness, self.vocabulary = exactness, vocabulary
        self.fields, self.prefix_cache = fields, prefix_cache
        self.model_name, self.context_tokens = self.exactness.model.name, options.context_tokens
        self.piece_tokens = PIECE_TOKENS if self.exactness.overrides is not None else 0
        self.chat, self.ceiling, self.proof_seconds = vocabulary.chat, exactness.ceiling, exactness.seconds
        self.capacity = engine_pb2.Capacity(runs=options.runs, kv_blocks=blocks, block_tokens=BLOCK_TOKENS)
        self._batching: Batching | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._meter = Meter(options.context_tokens, native.load)
        self._exact = True
        """Nothing was observed that must not happen."""
        self._closed = False

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        """Any thread; waits for xgrammar."""
        self._formats.check(response_format)

    def start(self, on_events: Callable[[Events], None], on_grade: OnGrade) -> None:
        """`on_grade` is called once, with a lower grade, if something is observed that must not happen. A stalled TurboMind
        ends the process."""
        assert self._batching is None, "an engine is started once"
        self._batching = batching = Batching(
            self._native,
            self._formats,
            self._meter,
            end_ids=self.vocabulary.end_ids,
            runs=self.capacity.runs,
            blocks=self.capacity.kv_blocks,
            block_tokens=BLOCK_TOKENS,
            on_events=on_events,
            before_events=lambda: self._check(on_grade),
        )
        self._tasks = [asyncio.create_task(batching.feed()), asyncio.create_task(self._watch(batching, on_grade))]

    def submit(self, run: Run) -> None:
        assert self._batching is not None, "an engine is started before runs are submitted"
        self._batching.submit(run)

    def cancel(self, run_id: int) -> None:
        if self._batching is not None:
            self._batching.cancel(run_id)

    async def close(self) -> None:
        """Waits for TurboMind, at most twice END_SECONDS."""
        self._closed = True
        if self._batching is not None:
            self._batching.cancel_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    while len(self._batching):
                        await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._formats.close)
        freeing = threading.Thread(target=self._native.close, name="turbomind-close", daemon=True)
        freeing.start()
        await asyncio.to_thread(freeing.join, END_SECONDS)
        if freeing.is_alive():
            _log.warning("TurboMind does not end")

    def collect(self) -> Iterable[Metric]:
        """For a Prometheus registry. Any thread."""
        return () if self._closed else self._meter.collect(self.exactness.overrides)

    def _check(self, on_grade: OnGrade) -> None:
        """Called before any result of a step is reported, so an answer never has a grade that it did not earn."""
        self._meter.preemptions.observe()
        if self._exact and (why := self._violation()):
            self._exact = False
            on_grade(types_pb2.GRADE_BEST_EFFORT, why)

    def _violation(self) -> str:
        """The first observation that must not happen, or an empty text."""
        overrides = self.exactness.overrides
        if self._meter.preemptions.count:
            return "TurboMind took a run out of its batch, and computed it again with other kernels"
        if self._meter.cached_tokens and not self.prefix_cache:
            return "TurboMind took part of a prompt from a cache, which is off"
        if self._meter.rests_of_one:
            return "TurboMind took all but one token of a prompt from its cache, and computed that one as a decode's"
        if self.ceiling[0] == types_pb2.GRADE_EXACT and overrides is not None and overrides.counters.uncovered:
            return "a product had to be served by an algorithm that is not permitted"
        return ""

    async def _watch(self, batching: Batching, on_grade: OnGrade) -> None:
        """Ends the process if there is work and TurboMind makes no step, by the rule of LMDeploy's EngineHealthMonitor. A
        fault in TurboMind's threads aborts the process by itself. An idle engine makes no steps; the sidecar's canaries are
        work."""
        tick, stalled = -1, 0.0
        while stalled < STALL_SECONDS:
            await asyncio.sleep(WATCH_SECONDS)
            self._check(on_grade)
            now = self._native.load().tick
            stalled = stalled + WATCH_SECONDS if len(batching) and now == tick else 0.0
            tick = now
        _log.critical("engine stalled", extra={"why": f"TurboMind has work and has made no step for {STALL_SECONDS:g} s"})
        self._end_process(FAILED)


def load(options: TurbomindOptions) -> TurbomindEngine:
    """Raises EngineUnusable."""
    version = host.lmdeploy_version()
    described = model.read(options.model)
    check(options, described)
    exactness = Exactness(options, described)
    exactness.load()
    gpu = host.gpu(options.tp)
    with ThreadPoolExecutor(1) as aside:
        weights = aside.submit(model.weights_digest, described.path)
        vocabulary = HuggingFaceVocabulary(described)
        import_lmdeploy()
        exactness.prepare(gpu, version)
        native, share, prefix_cache = _model(options, described, exactness)
        try:
            exactness.prove(native)
            blocks = _blocks(options, described, share)
            digest = weights.result()
        except EngineUnusable:
            native.close()
            raise
        fields = {
            **exactness.fields,
            "engine": TurbomindEngine.name,
            "engine_version": f"lmdeploy {version}",
            "model": described.name,
            "weights": digest,
            "tokenizer": model.tokenizer_digest(described.path),
            "template": vocabulary.template_digest,
            "dtype": native.dtype,
            "quantisation": options.model_format or described.quantisation,
            **{name: str(getattr(options, name)) for name in ("tp", "kv_bits", "context_tokens", "prefill_tokens", "runs")},
            "communicator": options.communicator if options.tp > 1 else "none",
            "device": gpu.name,
            "capability": gpu.capability,
            "driver": gpu.driver,
            "top_k_bucket": str(TOP_K_BUCKET) if exactness.overrides is not None else "its own",
            "piece_tokens": str(PIECE_TOKENS) if exactness.overrides is not None else "its own",
            "block_tokens": str(BLOCK_TOKENS),
            "prefix_cache": "on" if prefix_cache else "off",
            "exact": "on" if options.exact else "off",
            "request_rules": RULES,
        }
        tokens = vocabulary.pieces, vocabulary.end_ids
        formats = Formats(checker(host.turbomind_library(), *tokens), grammar_compiler(native.tm, *tokens))
    return TurbomindEngine(
        options, native, vocabulary, exactness, formats, blocks=blocks, fields=fields, prefix_cache=prefix_cache
    )


def _model(options: TurbomindOptions, described: model.Model, exactness: Exactness) -> tuple[Native, float, bool]:
    """The model behind its first run, which part of the KV cache one block is, and whether its prefix cache is on. A cache that
    cannot be relied on costs a second loading, without it. Raises EngineUnusable."""
    wanted = options.prefix_cache == "on"
    if wanted and options.context_tokens < probe.CONTEXT_TOKENS_MIN:
        wanted = False
        _log.info("prefix cache off", extra={"why": f"--context-tokens is below {probe.CONTEXT_TOKENS_MIN}"})
    while True:
        began = time.monotonic()
        native = Native(options, described, prefix_cache=wanted)
        seconds = round(time.monotonic() - began, 3)
        _log.info("model loaded", extra={"dtype": native.dtype, "prefix_cache": wanted, "seconds": seconds})
        try:
            share = probe.first_run(native, options.context_tokens)
            overrides = exactness.overrides
            why = probe.prove_prefix_cache(native, overrides) if wanted and overrides is not None else ""
        except EngineUnusable:
            native.close()
            raise
        if not why:
            return native, share, wanted
        _log.warning("prefix cache off", extra={"why": why})
        native.close()
        wanted = False


def check(options: TurbomindOptions, described: model.Model) -> None:
    """Raises EngineUnusable for what this model cannot do."""
    most = described.context_tokens_max
    if options.context_tokens > most:
        raise EngineUnusable(f"--context-tokens must be at most {most} for {described.name}, is {options.context_tokens}")
    for heads, of in ((described.heads, "attention"), (described.kv_heads, "keys and values")):
        if heads % options.tp:
            raise EngineUnusable(f"--tp must divide the {heads} heads of {of} of {described.name}, is {options.tp}")


def _blocks(options: TurbomindOptions, described: model.Model, share: float) -> int:
    """Of the KV cache, which can be promised. Raises EngineUnusable for too few."""
    size = block_bytes(described, options)
    found = blocks_promised(share=share, size=size, runs=options.runs)
    _log.info("KV cache", extra={"blocks": found, "block_bytes": size, "block_share": share})
    if found < blocks_needed(options.context_tokens, BLOCK_TOKENS):
        raise EngineUnusable(
            f"the KV cache has room for {found * BLOCK_TOKENS} tokens, not for one run of {options.context_tokens}:"
            " raise --cache-fraction or lower --context-tokens"
        )
    return found
