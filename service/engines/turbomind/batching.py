"""Runs go into TurboMind in order, and its tokens come out; all on the event loop.

1. Runs start in order of submission, when there is a slot and room in the KV cache for the longest answer of the next one. So
   TurboMind never has to take memory from one run for another, and no run overtakes another.
2. A run that TurboMind still has keeps its slot and its blocks, also after its caller has left.
3. TurboMind reports from its own thread. One wake-up of the loop takes all reports that have come by then.
4. A prompt of one token starts when no other prompt is under way: TurboMind would take it for a prompt or for a decode by
   what runs beside it, and the two round differently.
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

from ostinato.errors import EngineFailed, OstinatoError, to_status
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Events, Run
from service.engines.turbomind.metrics import Meter
from service.engines.turbomind.native import Handle, Native, Progress, Status, why
from service.engines.turbomind.request import Formats, Request, request_of, token_logprobs

PAGE = 32 << 20
SLAB_MAX = 1 << 30
FULL_ENOUGH = 0.95
"""Slabs are doubled until blocks fill this much of them."""


def block_bytes(*, layers: int, kv_heads: int, head_dim: int, block_tokens: int, kv_bits: int) -> int:
    """Of keys and values of one block on one GPU; quantised, each head of a token has a scale and a zero point of 16 bits."""
    heads = 2 * layers * kv_heads * block_tokens
    return heads * head_dim * kv_bits // 8 + (heads * 4 if kv_bits < 16 else 0)


def blocks_promised(*, share: float, size: int, runs: int) -> int:
    """How many blocks can be promised, where one of `size` bytes is `share` of the region. At least 1.

    A run may take one more than it needs, for a token too many that is under way when it ends: that is set aside.
    """
    if not 0 < share <= 1:
        return 1
    region = int(size / share)
    slab = max(PAGE, 1 << (size - 1).bit_length())
    while slab // size * size < FULL_ENOUGH * slab and slab < SLAB_MAX:
        slab *= 2
    pages = max(0, region - PAGE) // PAGE  # the region's beginning is moved to a page's
    return max(1, pages // (slab // PAGE) * (slab // size) - runs)


def needed(tokens: int, block_tokens: int) -> int:
    """Blocks for a prompt and the longest answer together."""
    return -(-tokens // block_tokens)


POLL_SECONDS = 0.001
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """A run that TurboMind has."""

    run: Run
    handle: Handle
    blocks: int
    seen: int
    """Tokens of it that the answer has, prompt included."""
    wanted: bool = True
    """Whether anything is still to be reported."""


class Batching:
    """Belongs to the running event loop; `on_events` is called there."""

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
        """`before_events` is called when a step's results are there and nothing of them is reported yet."""
        self._native, self._formats, self._meter, self._end_ids = native, formats, meter, end_ids
        self._slots, self._blocks, self._block_tokens = runs, blocks, block_tokens
        self._blocks_max = blocks
        self._on_events, self._before_events = on_events, before_events
        self._waiting: OrderedDict[int, Run] = OrderedDict()
        self._live: dict[int, _Live] = {}
        self._changed: deque[int] = deque()
        self._rung = False
        self._bell = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        """Runs that TurboMind has."""
        return len(self._live)

    def submit(self, run: Run) -> None:
        self._waiting[run.run_id] = run
        self._bell.set()

    def cancel(self, run_id: int) -> None:
        self._waiting.pop(run_id, None)
        live = self._live.get(run_id)
        if live is not None and live.wanted:
            live.wanted = False
            live.handle.cancel()
        self._bell.set()

    def cancel_all(self) -> None:
        for run_id in (*self._waiting, *self._live):
            self.cancel(run_id)

    async def feed(self) -> None:
        """Hand over what waits, for ever."""
        while True:
            await self._bell.wait()
            self._bell.clear()
            while self._waiting and self._slots:
                run = next(iter(self._waiting.values()))
                blocks = needed(len(run.token_ids) + run.parameters.max_new_tokens, self._block_tokens)
                if self._blocks < blocks <= self._blocks_max:
                    break
                await self._hand_over(run, blocks)

    async def _hand_over(self, run: Run, blocks: int) -> None:
        """The head of the queue; it may be cancelled at every pause."""
        try:
            if blocks > self._blocks_max:
                raise EngineFailed(f"it needs {blocks} blocks of the KV cache, which has {self._blocks_max}")
            request = request_of(run.parameters, run.seed, stream=run.stream, end_ids=self._end_ids)
            grammar: object = None
            if run.parameters.HasField("response_format"):
                grammar = await self._grammar(run.parameters.response_format)
            alone = len(run.token_ids) == 1
            if alone:
                await self._settled()
            if run.run_id in self._waiting:
                self._start(run, request, grammar, blocks)
            if alone:
                await self._settled()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with one run ends that run
            if not isinstance(error, OstinatoError):
                _log.exception("a run cannot be started")
            if self._waiting.pop(run.run_id, None) is not None:
                self._on_events([_failed(run, error)])

    async def _grammar(self, response_format: types_pb2.ResponseFormat) -> object:
        """Raises EngineFailed with what xgrammar says against it: Prepare had nothing against it, or was not asked here."""
        try:
            return await self._formats.ready(response_format)
        except ValueError as error:
            raise EngineFailed(f"parameters.response_format {error}") from error

    def _start(self, run: Run, request: Request, grammar: object, blocks: int) -> None:
        handle = self._native.start(run.run_id, run.token_ids, request, grammar, partial(self._ring, run.run_id))
        del self._waiting[run.run_id]
        self._live[run.run_id] = _Live(run, handle, blocks, seen=len(run.token_ids))
        self._meter.entered(run.run_id, handle)
        self._slots -= 1
        self._blocks -= blocks
        self._on_events([run.started()])

    async def _settled(self) -> None:
        """Until no prompt waits for its step."""
        while not all(live.handle.scheduled for live in self._live.values()):
            await asyncio.sleep(POLL_SECONDS)

    def _ring(self, run_id: int) -> None:
        """From TurboMind's thread."""
        self._changed.append(run_id)
        if not self._rung:
            self._rung = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to listen
                self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        """Take what has changed."""
        self._rung = False  # first: who rings from here on is heard again
        events: Events = []
        while self._changed:
            live = self._live.get(self._changed.popleft())
            if live is None:
                continue
            try:
                self._advance(live, events)
            except Exception as error:  # noqa: BLE001  # likewise
                self._give_up(live, error, events)
        self._before_events()
        if events:
            self._on_events(events)
        self._bell.set()

    def _advance(self, live: _Live, events: Events) -> None:
        """New tokens of one run, and its end."""
        progress = live.handle.poll()
        if progress is None:
            return
        ended = progress.status != Status.RUNNING
        if ended:
            self._leave(live, progress)
        if not live.wanted:
            return
        run = live.run
        if progress.status in (Status.RUNNING, Status.FINISHED):
            self._accept(live, progress.length)
            events += run.new_tokens()
        if run.answer.complete:
            live.wanted = False
            events.append(run.finished(run.seed, types_pb2.LOGPROB_KIND_PROCESSED, live.handle.account.cached))
            if not ended:
                live.handle.cancel()
        elif ended:
            live.wanted = False
            events.append(run.failed(why(progress.status)))

    def _accept(self, live: _Live, length: int) -> None:
        """Give the answer its tokens, up to its end: TurboMind may have gone further."""
        run, handle, answer, parameters = live.run, live.handle, live.run.answer, live.run.parameters
        wants = parameters.HasField("logprobs")
        for index, token_id in enumerate(handle.ids(live.seen, length), start=live.seen - len(run.token_ids)):
            found = token_logprobs(token_id, *handle.logprobs(index), parameters.logprobs) if wants else None
            if wants and found is None:
                raise EngineFailed(f"TurboMind gives no logprob for the token {token_id} that it chose")
            if answer.accept(token_id, found):
                break
        live.seen = length

    def _give_up(self, live: _Live, error: Exception, events: Events) -> None:
        if not isinstance(error, OstinatoError):
            _log.error("a run went wrong", exc_info=error)
        if live.wanted:
            live.wanted = False
            events.append(_failed(live.run, error))
        live.handle.cancel()

    def _leave(self, live: _Live, progress: Progress) -> None:
        run, prompt = live.run, len(live.run.token_ids)
        del self._live[run.run_id]
        self._slots += 1
        self._blocks += live.blocks
        made = max(0, progress.length - prompt)
        succeeded = progress.status == Status.FINISHED or run.answer.complete
        self._meter.left(run.run_id, live.handle.account, prompt, made, succeeded=succeeded, now=time.time())


def _failed(run: Run, error: Exception) -> engine_pb2.RunEvent:
    if isinstance(error, OstinatoError):
        return engine_pb2.RunEvent(run_id=run.run_id, failed=to_status(error))
    return run.failed(str(error) or type(error).__name__)
