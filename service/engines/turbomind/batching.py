"""Runs go into TurboMind in order, and its tokens come out; all on the event loop.

1. Runs start in order of submission, when there is a slot and room in the KV cache for the longest answer of the next one. So
   TurboMind never has to take memory from one run for another, and no run overtakes another.
2. A run that TurboMind still has keeps its slot and its blocks, also after its caller has left.
3. TurboMind reports from its own thread. One wake-up of the loop takes all reports that have come by then.
4. A prompt of one token starts when no other prompt is under way, pieces of long ones included: TurboMind would take it for a
   prompt or for a decode by what runs beside it, and the two round differently.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ostinato.errors import EngineFailed, OstinatoError
from ostinato.v1 import types_pb2

from service.engines.base import Events, Run
from service.engines.turbomind import BLOCK_TOKENS, PIECE_TOKENS, TurbomindOptions
from service.engines.turbomind.grammars import Formats
from service.engines.turbomind.metrics import Meter
from service.engines.turbomind.model import Model
from service.engines.turbomind.native import FINISHED, RUNNING, Handle, Native, Progress, why
from service.engines.turbomind.request import Request, request_of, token_logprobs

PAGE_BYTES, SLAB_BYTES_MAX = 32 << 20, 1 << 30
SLAB_USE_MIN = 0.95
"""TurboMind doubles a slab until blocks use this share of it."""
POLL_SECONDS = 0.001
_log = logging.getLogger(__name__)


def block_bytes(model: Model, options: TurbomindOptions) -> int:
    """Of the keys and values of one block on one GPU. Quantised, each head of a token has a scale and a zero point of 16
    bits."""
    heads = 2 * model.layers * -(-model.kv_heads // options.tp) * BLOCK_TOKENS
    return heads * model.head_dim * options.kv_bits // 8 + (heads * 4 if options.kv_bits < 16 else 0)


def blocks_promised(*, share: float, size: int, runs: int) -> int:
    """Blocks that runs may use at once; one has `size` bytes and is `share` of the KV cache's memory. At least 1.

    TurboMind does not report this number. Its allocator cuts the memory into pages, slabs of a power of two of them, and
    blocks. A run may take one block more than it needs, for a token that is computed beyond its end: those are subtracted.
    """
    if not 0 < share <= 1:
        return 1
    slab = max(PAGE_BYTES, 1 << (size - 1).bit_length())
    while slab // size * size < SLAB_USE_MIN * slab and slab < SLAB_BYTES_MAX:
        slab *= 2
    pages = max(0, int(size / share) - PAGE_BYTES) // PAGE_BYTES  # the memory's begin is aligned to a page
    return max(1, pages // (slab // PAGE_BYTES) * (slab // size) - runs)


def pieces_after_first(prompt_tokens: int) -> int:
    """The most pieces that a prompt has beside the first, a step for each."""
    return (prompt_tokens - 2) // PIECE_TOKENS if prompt_tokens > PIECE_TOKENS + 1 else 0


def blocks_needed(tokens: int, block_tokens: int) -> int:
    """Blocks for a prompt and its longest answer together."""
    return -(-tokens // block_tokens)


@dataclass(slots=True)
class _Active:
    """A run that TurboMind has."""

    run: Run
    handle: Handle
    blocks: int
    taken: int
    """Tokens of the run, prompt included, that the answer has."""
    reporting: bool = True
    """False: its end was reported, or its caller cancelled it."""
    scheduled_tick: int = 0
    """The engine's step when its first piece was seen to be in one; 0: not yet."""

    def prompt_computed(self, tick: int) -> bool:
        """Whether the whole prompt was in steps up to this one. Each step has a piece of a prompt in pieces. TurboMind marks
        a run before it publishes the step, so a later piece may be in one step more than it seems."""
        if not self.handle.scheduled:
            return False
        self.scheduled_tick = self.scheduled_tick or tick
        more = pieces_after_first(len(self.run.token_ids))
        return not more or tick > self.scheduled_tick + more


class Batching:
    """Belongs to the running event loop, where `on_events` is called."""

    def __init__(
        self,
        native: Native,
        formats: Formats,
        meter: Meter,
        *,
        end_ids: frozenset[int],
        runs: int,
        blocks: int,
        block_tokens: int,
        on_events: Callable[[Events], None],
        before_events: Callable[[], None],
    ) -> None:
        """`before_events` is called when a step has results, before any of them is reported."""
        self._native, self._formats, self._meter, self._end_ids = native, formats, meter, end_ids
        self._slots, self._blocks, self._block_tokens = runs, blocks, block_tokens
        self._blocks_max = blocks
        self._on_events, self._before_events = on_events, before_events
        self._waiting: OrderedDict[int, Run] = OrderedDict()
        self._active: dict[int, _Active] = {}
        self._changed: deque[int] = deque()
        self._collecting = False
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        """Runs that TurboMind has."""
        return len(self._active)

    def submit(self, run: Run) -> None:
        self._waiting[run.run_id] = run
        self._wake.set()

    def cancel(self, run_id: int) -> None:
        self._waiting.pop(run_id, None)
        active = self._active.get(run_id)
        if active is not None and active.reporting:
            active.reporting = False
            active.handle.cancel()
        self._wake.set()

    def cancel_all(self) -> None:
        for run_id in (*self._waiting, *self._active):
            self.cancel(run_id)

    async def feed(self) -> None:
        """Starts waiting runs until it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting and self._slots:
                run = next(iter(self._waiting.values()))
                blocks = blocks_needed(len(run.token_ids) + run.parameters.max_new_tokens, self._block_tokens)
                if self._blocks < blocks <= self._blocks_max:
                    break
                await self._start_next(run, blocks)

    async def _start_next(self, run: Run, blocks: int) -> None:
        """Starts the first waiting run. It may be cancelled at every await."""
        try:
            if blocks > self._blocks_max:
                raise EngineFailed(f"it needs {blocks} blocks of the KV cache, which has {self._blocks_max}")
            request = request_of(run.parameters, run.seed, stream=run.stream, end_ids=self._end_ids)
            grammar: object = None
            if run.parameters.HasField("response_format"):
                grammar = await self._formats.ready(run.parameters.response_format)
            one_token = len(run.token_ids) == 1
            if one_token:
                await self._no_prompts()
            if run.run_id in self._waiting:
                self._start(run, request, grammar, blocks)
            if one_token:
                await self._no_prompts()
        except Exception as error:  # noqa: BLE001  # a fault of one run ends that run only
            if not isinstance(error, OstinatoError):
                _log.exception("a run cannot start")
            if self._waiting.pop(run.run_id, None) is not None:
                self._on_events([run.failed(error)])

    def _start(self, run: Run, request: Request, grammar: object, blocks: int) -> None:
        handle = self._native.start(run.run_id, run.token_ids, request, grammar, partial(self._notify, run.run_id))
        del self._waiting[run.run_id]
        self._active[run.run_id] = _Active(run, handle, blocks, taken=len(run.token_ids))
        self._meter.preemptions.enter(run.run_id, handle)
        self._slots -= 1
        self._blocks -= blocks
        self._on_events([run.started()])

    async def _no_prompts(self) -> None:
        """Waits until every prompt is computed."""
        while True:
            tick = self._native.load().tick
            computed = [active.prompt_computed(tick) for active in self._active.values()]
            if all(computed):
                return
            await asyncio.sleep(POLL_SECONDS)

    def _notify(self, run_id: int) -> None:
        """Runs in TurboMind's thread."""
        self._changed.append(run_id)
        if not self._collecting:
            self._collecting = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        """Takes all changes that TurboMind has reported."""
        self._collecting = False  # first: later notifications call this again
        events: Events = []
        while self._changed:
            active = self._active.get(self._changed.popleft())
            if active is None:
                continue
            try:
                self._advance(active, events)
            except Exception as error:  # noqa: BLE001  # as above
                self._fail(active, error, events)
        self._before_events()
        if events:
            self._on_events(events)
        self._wake.set()

    def _advance(self, active: _Active, events: Events) -> None:
        """Reports new tokens of one run, and its end."""
        progress = active.handle.poll()
        if progress is None:
            return
        ended = progress.status != RUNNING
        if ended:
            self._release(active, progress)
        if not active.reporting:
            return
        run = active.run
        if progress.status in (RUNNING, FINISHED):
            self._accept(active, progress.length)
            events += run.new_tokens()
        if run.answer.complete:
            active.reporting = False
            events.append(run.finished(run.seed, types_pb2.LOGPROB_KIND_PROCESSED, active.handle.account.cached))
            if not ended:
                active.handle.cancel()
        elif ended:
            active.reporting = False
            events.append(run.failed(why(progress.status)))

    def _accept(self, active: _Active, length: int) -> None:
        """Adds tokens to the answer up to its end, which TurboMind may have passed."""
        run, handle, answer, parameters = active.run, active.handle, active.run.answer, active.run.parameters
        with_logprobs = parameters.HasField("logprobs")
        for index, token_id in enumerate(handle.ids(active.taken, length), start=active.taken - len(run.token_ids)):
            found = token_logprobs(token_id, *handle.logprobs(index), parameters.logprobs) if with_logprobs else None
            if with_logprobs and found is None:
                raise EngineFailed(f"TurboMind has no logprob for the token {token_id} that it chose")
            if answer.accept(token_id, found):
                break
        active.taken = length

    def _fail(self, active: _Active, error: Exception, events: Events) -> None:
        if not isinstance(error, OstinatoError):
            _log.error("a run failed", exc_info=error)
        if active.reporting:
            active.reporting = False
            events.append(active.run.failed(error))
        active.handle.cancel()

    def _release(self, active: _Active, progress: Progress) -> None:
        run, prompt = active.run, len(active.run.token_ids)
        del self._active[run.run_id]
        self._slots += 1
        self._blocks += active.blocks
        made = max(0, progress.length - prompt)
        succeeded = progress.status == FINISHED or run.answer.complete
        self._meter.left(run.run_id, active.handle.account, prompt, made, succeeded=succeeded, now=time.time())
