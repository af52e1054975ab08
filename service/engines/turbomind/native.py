"""LMDeploy's TurboMind: loading a model, one run of it, and what it reports. The only file that touches LMDeploy.

LMDeploy's AsyncEngine and the generator of its instances are not used. They strip the stop token, detokenise every
token a second time, build dicts of logprobs one number at a time, change parameters, set seeds, and cost one task and a
wake-up for each token of each run. What is below them is small: a request goes in, a callback says that its state has
changed, and its tokens are in a buffer.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from service.engines.base import EngineUnusable
from service.engines.turbomind import BLOCK_TOKENS, TurbomindOptions
from service.engines.turbomind.host import module
from service.engines.turbomind.model import Model
from service.engines.turbomind.request import Request

BESIDE_NEW = 2
"""Longest contexts that the prompts of one step may have beside new ones: the prompt in pieces, and one that is deferred.
TurboMind ends a pass at the first prompt that does not fit its own limit, and takes the runs behind it out of the batch."""


RUNNING, FINISHED = 0, 7
_WHY = {
    1: "TurboMind finds the run malformed",
    2: "TurboMind has another run of this number",
    5: "TurboMind had an internal error",
    6: "TurboMind finds the prompt longer than its context",
    FINISHED: "TurboMind ended the run before the answer was complete",
    8: "TurboMind cancelled the run by itself",
    9: "TurboMind finds the run inconsistent with its cache",
    10: "TurboMind takes no runs any more",
    11: "TurboMind has no room for the run in its KV cache",
}
"""By status of a run: `Request` in TurboMind's src/turbomind/engine/request.h."""


def why(status: int) -> str:
    """A status in words."""
    return _WHY.get(status, f"TurboMind ended the run with status {status}")


@dataclass(frozen=True, slots=True)
class Progress:
    """A run's state: its status, and how many tokens there are, prompt included."""

    status: int
    length: int


@dataclass(frozen=True, slots=True)
class Load:
    """The scheduler's numbers."""

    tick: int
    """Steps so far."""
    usage: float
    """Share of the KV cache's memory that is in use."""
    active: int
    """Runs in the newest step."""
    waiting: int
    """Runs that TurboMind has, but not in that step."""
    prefix_hits: float
    """Share of all prompt tokens that the prefix cache had."""


@dataclass(frozen=True, slots=True)
class Account:
    """TurboMind's record of a run. Unix times in seconds; 0 for what did not happen."""

    queued: float
    scheduled: float
    """First in a step."""
    cached: int
    """Prompt tokens that came from the prefix cache."""


def import_lmdeploy() -> None:
    """Imports LMDeploy and loads TurboMind's library, which loads cuBLAS. Raises EngineUnusable.

    On import LMDeploy raises the levels of other log handlers and writes its own log to stdout: both are undone.
    """
    os.environ.setdefault("TM_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    levels = {handler: handler.level for handler in logging.getLogger().handlers}
    module("lmdeploy")
    turbomind = module("lmdeploy.turbomind")
    for handler, level in levels.items():
        handler.setLevel(level)
    own = logging.getLogger("lmdeploy")
    own.handlers.clear()
    own.propagate = True
    own.setLevel(logging.WARNING)
    if not turbomind.is_available():
        raise EngineUnusable(f"--engine turbomind: its library cannot be loaded: {turbomind._import_error}")


class Handle:
    """One run inside TurboMind. Not thread-safe."""

    def __init__(self, instance: Any, outputs: Any, state: Any, metrics: Any) -> None:
        torch = module("torch")
        self._instance, self._state, self._metrics = instance, state, metrics
        self._arrays = {name: torch.from_dlpack(tensor).numpy() for name, tensor in outputs.items()}

    def poll(self) -> Progress | None:
        """The newest state, returned once; None: nothing is new."""
        state = self._state.consume()
        return None if state is None else Progress(state.status, state.seq_len)

    def ids(self, first: int, last: int) -> list[int]:
        """Tokens `first` to `last`, the last left out, counted from the prompt's first."""
        found: list[int] = self._arrays["output_ids"][first:last].tolist()
        return found

    def logprobs(self, index: int) -> tuple[Any, Any]:
        """Ids and logprobs (numpy, int32 and float32) of the tokens that were left to choose from at answer token `index`, at
        most 1024, likeliest first; the chosen one is among them."""
        kept = int(self._arrays["logprob_nums"][index])
        return self._arrays["logprob_indexes"][index, :kept], self._arrays["logprob_vals"][index, :kept]

    @property
    def scheduled(self) -> bool:
        """Whether it has been in a step."""
        return bool(self._metrics.scheduled_time)

    @property
    def account(self) -> Account:
        told = self._metrics
        return Account(told.enqueue_time / 1e6, told.scheduled_time / 1e6, told.cached_tokens)

    def cancel(self) -> None:
        """Takes effect at the next step, which is reported as CANCELLED. No effect on a run that has ended."""
        self._instance.cancel()


class Native:
    """A loaded model. Loading takes seconds to minutes."""

    def __init__(self, options: TurbomindOptions, model: Model, *, prefix_cache: bool = False) -> None:
        """After `import_lmdeploy`. Raises EngineUnusable.

        If runs must be exact, blocks that a decode has filled are never published: a prompt would use them instead of its
        own, and they round otherwise.
        """
        from lmdeploy import TurbomindEngineConfig, turbomind

        self.tm: Any = turbomind._tm
        """The module `_turbomind`."""
        config = TurbomindEngineConfig(
            dtype=options.dtype,
            model_format=options.model_format,
            tp=options.tp,
            communicator=options.communicator,
            session_len=options.session_tokens,
            max_batch_size=options.runs,
            cache_max_entry_count=options.cache_fraction,
            cache_block_seq_len=BLOCK_TOKENS,
            enable_prefix_caching=prefix_cache,
            cache_prompt="auto",
            cache_generation="none" if options.exact else "auto",
            quant_policy=0 if options.kv_bits == 16 else options.kv_bits,
            max_prefill_token_num=options.prefill_tokens,
            enable_metrics=True,
        )
        try:
            own = {
                "max_context_token_num": options.step_context_tokens + BESIDE_NEW * options.session_tokens,
                "tune_layer_num": model.tuned_layers,
            }
            with _engine_config(self.tm, own if options.exact else {}):
                self._engine: Any = turbomind.TurboMind.from_pretrained(str(model.path), engine_config=config)
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise EngineUnusable(f"--model: TurboMind cannot load {model.path}: {type(error).__name__}: {error}") from error
        self.dtype: str = self._engine.engine_config.dtype
        self.vocabulary_size: int = self._engine._vocab_size

    def start(
        self, run_id: int, token_ids: Sequence[int], request: Request, grammar: object, on_change: Callable[[], None]
    ) -> Handle:
        """Starts a run. Runs begin in order of these calls. `on_change` is called in a thread of TurboMind, with the GIL,
        when there is a new state to poll, and never after the end."""
        torch, tm = module("torch"), self.tm
        instance = self._engine.model_comm.create_request()
        if grammar is not None:
            instance.set_grammar(grammar)
        inputs = tm.TensorMap()
        inputs["input_ids"] = tm.from_dlpack(torch.tensor(token_ids, dtype=torch.int32))
        session = tm.SessionParam(id=run_id, step=0)
        return Handle(
            instance, *instance.forward(inputs, None, session, self._config(request), request.each_step, True, on_change)
        )

    def load(self) -> Load:
        """Any thread."""
        now = self._engine.model_comm.get_schedule_metrics(0)
        return Load(now.scheduler_tick, now.cache_usage, now.active_seqs, now.waiting_seqs, now.prefix_cache_hit_rate)

    def close(self) -> None:
        """Waits for TurboMind's threads, which end with the last reference to it. Nothing may be called afterwards."""
        self._engine.close()
        del self._engine
        gc.collect()

    def _config(self, request: Request) -> Any:
        made = self.tm.GenerationConfig()
        for name in (
            "max_new_tokens", "min_new_tokens", "top_k", "top_p", "min_p", "temperature", "repetition_penalty", "random_seed",
            "output_logprobs",
        ):  # fmt: skip
            setattr(made, name, getattr(request, name))
        made.eos_ids = list(request.eos_ids)
        if request.stop_ids:
            made.stop_ids = _words(request.stop_ids)
        if request.bad_ids:
            made.bad_ids = _words(request.bad_ids)
        return made


@contextmanager
def _engine_config(tm: Any, values: Mapping[str, int]) -> Iterator[None]:
    """Sets fields of TurboMind's configuration for which LMDeploy has no setting."""
    own = tm.EngineConfig

    def config() -> Any:
        made = own()
        for name, value in values.items():
            setattr(made, name, value)
        return made

    tm.EngineConfig = config
    try:
        yield
    finally:
        tm.EngineConfig = own


def _words(token_ids: Sequence[int]) -> list[list[int]]:
    """Words of one token each, in TurboMind's form: all tokens, and the end of each word."""
    return [list(token_ids), list(range(1, len(token_ids) + 1))]
