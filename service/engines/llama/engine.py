"""The llama engine. Its methods run on the event loop unless they say otherwise."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from queue import SimpleQueue

from prometheus_client import Metric

from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import EngineUnusable, Events, Run
from service.engines.grammars import Checker
from service.engines.llama import LlamaOptions, sampling
from service.engines.llama.batching import PIECE, PREFILL_STEP, Batching, Command
from service.engines.llama.lark import SEPARATORS
from service.engines.llama.library import library
from service.engines.llama.model import load_model, packaged_model
from service.engines.llama.sampling import ORDER, PENALTY_WINDOW, Grammar, source_of

BLOCK_TOKENS = 64
"""The unit of Capacity. Memory is allocated by the slot."""


class LlamaEngine:
    """A `service.engines.base.Engine`: one thread that decodes, one slot for each run."""

    name = "llama"
    logprob_kind = types_pb2.LOGPROB_KIND_RAW
    proof_seconds = 0.0
    piece_tokens = 0

    def __init__(self, options: LlamaOptions) -> None:
        """Loads the model. Any thread. Raises EngineUnusable."""
        self._options = options
        self._library, c = library(), library().c
        self._model = model = load_model(options.model or packaged_model())
        self.vocabulary, self.model_name, self.chat = model.vocabulary, model.path.stem, model.vocabulary.chat
        self.context_tokens, self.top_k_max = options.context_tokens, self.vocabulary.size
        blocks = options.runs * -(-options.context_tokens // BLOCK_TOKENS)
        self.capacity = engine_pb2.Capacity(runs=options.runs, kv_blocks=blocks, block_tokens=BLOCK_TOKENS)
        # A recurrent state cannot be cut at any token, as the memory of attention can.
        recurrent = c.llama_model_is_recurrent(model.handle) or c.llama_model_is_hybrid(model.handle)
        self.prefix_cache = options.prefix_cache == "on" and options.kv == "q8_0" and not recurrent
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._live: set[int] = set()
        """Runs that have neither ended nor been cancelled."""
        self._thread: threading.Thread | None = None
        self._closing = threading.Lock()
        self._closed = False
        if options.context_tokens > (most := c.llama_model_n_ctx_train(model.handle)):
            raise EngineUnusable(f"--context-tokens must be at most {most} for {model.path.name}, is {options.context_tokens}")
        self._context = self._library.new_context(model.handle, options)
        self._checker = Checker(sampling.__name__, str(model.path))
        Grammar(self.vocabulary, "regex", b"a").close()  # llguidance prepares once for a vocabulary, which takes a moment
        atexit.register(self._stop)  # otherwise the process would end while a thread is inside llama.cpp

    @property
    def fields(self) -> Mapping[str, str]:
        options = self._options
        return {
            **self._model.fields,
            "engine": self.name,
            "kv": options.kv,
            "kv_unified": "off",
            "flash_attention": "on",
            "ubatch": str(options.ubatch),
            "threads": str(options.threads),
            "runs": str(options.runs),
            "context_tokens": str(options.context_tokens),
            "prefill_chunk": str(PIECE),
            "prefill_step": str(PREFILL_STEP),
            "prefix_cache": "on" if self.prefix_cache else "off",
            "penalty_window": str(PENALTY_WINDOW),
            "sampling": ORDER,
            "json_separators": f"{SEPARATORS['item_separator']!r} {SEPARATORS['key_separator']!r}",
        }

    @property
    def ceiling(self) -> tuple[types_pb2.Grade.ValueType, str]:
        if self._options.runs == 1:
            return types_pb2.GRADE_SERIAL, "there is one slot: runs are computed one at a time"
        if self._options.kv == "f16":
            return types_pb2.GRADE_EXACT, "the KV cache is f16: attention may round by what is in the batch; q8_0 avoids it"
        return types_pb2.GRADE_EXACT, "the KV cache is q8_0 and each run has its own"

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        """Waits for a child process, the first time for about a second."""
        self._checker.check(*source_of(response_format))

    def collect(self) -> Iterable[Metric]:
        return ()

    def start(self, on_events: Callable[[Events], None], on_grade: Callable[[types_pb2.Grade.ValueType, str], None]) -> None:
        """`on_grade` is never called: nothing on which the grade rests changes while the engine runs."""
        assert self._thread is None, "an engine is started once"
        self._loop, self._on_events = asyncio.get_running_loop(), on_events
        batching = Batching(
            self._context, self.vocabulary, self._options,
            prefix_cache=self.prefix_cache, commands=self._commands, post=self._post,
        )  # fmt: skip
        self._thread = threading.Thread(target=batching.work, name="llama", daemon=True)
        self._thread.start()

    def submit(self, run: Run) -> None:
        self._live.add(run.run_id)
        self._commands.put(run)

    def cancel(self, run_id: int) -> None:
        if run_id in self._live:
            self._live.discard(run_id)
            self._commands.put(run_id)

    async def close(self) -> None:
        """Waits for the current step."""
        self._live.clear()
        await asyncio.to_thread(self._stop)

    def _post(self, events: Events) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Events) -> None:
        """Pass events on, except those of runs that have been cancelled."""
        wanted = [event for event in events if event.run_id in self._live]
        self._live.difference_update(event.run_id for event in wanted if event.WhichOneof("event") in ("finished", "failed"))
        if wanted:
            self._on_events(wanted)

    def _stop(self) -> None:
        """End the thread and free everything. Any thread; idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if self._thread is not None:
                self._commands.put(None)
                self._thread.join()
            self._checker.close()
            self._library.c.llama_free(self._context)
            self._library.c.llama_model_free(self._model.handle)
            atexit.unregister(self._stop)
