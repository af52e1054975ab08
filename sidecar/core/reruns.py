"""Runs without a sequence: verifications, replays, audits and canaries. They are not recovered after a restart. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec

from ostinato import errors

from sidecar.core import events as ev
from sidecar.core.window import Bounds, Shares, Window, most

TENANT_PART = 4
"""One tenant's replays may fill a fourth of the places in which replays wait."""


class Running(msgspec.Struct, frozen=True):
    rerun: ev.Rerun
    blocks: int
    expires_at: float


class Reruns:
    """A rerun that can never fit is lost at once.

    1. A verification takes over the room of its item's first run, so it delays no other item.
    2. Every other rerun starts only while no item waits, and takes only room in which the engine starts it at once. It is never
       ahead of an item in the engine's own queue.
    3. Together those hold at most `reruns_share` of the engine's runs and of its KV blocks, or one run. They leave free what no
       single tenant may hold, or start on an idle engine.
    4. Waiting reruns start in order of urgency. Of one urgency the next is of the tenant with the fewest running, and of its
       reruns the one that arrived first.
    5. A tenant's part of `reruns_max` is TENANT_PART.
    """

    def __init__(self, bounds: Bounds, shares: Shares) -> None:
        self.bounds, self._shares = bounds, shares
        self.waiting: dict[ev.Urgency, dict[int, ev.Rerun]] = {}
        """By rerun id, the oldest first. An urgency of which none waits is not here."""
        self.running: dict[int, Running] = {}
        """By run id."""

    def room(self, tenant: str) -> bool:
        """Whether another replay of this tenant may wait."""
        queue, places = self.waiting.get(ev.Urgency.REPLAY, {}), self.bounds.reruns_max
        if self._shares.divided and sum(rerun.tenant == tenant for rerun in queue.values()) >= places // TENANT_PART:
            return False
        return len(queue) < places

    def react(self, event: ev.Rerun | ev.CancelRerun, window: Window | None, *, draining: bool) -> Iterator[ev.Effect]:
        if isinstance(event, ev.CancelRerun):
            for queue in list(self.waiting.values()):
                if (rerun := queue.get(event.rerun_id)) is not None:
                    self._dequeue(rerun)
            running = [run_id for run_id, running in self.running.items() if running.rerun.rerun_id == event.rerun_id]
            yield from self._cancel(running, window)
        elif (error := self._refusal(event, window, draining=draining)) is not None:
            yield ev.RerunLost(event.rerun_id, error)
        else:
            self.waiting.setdefault(event.urgency, {})[event.rerun_id] = event

    def _refusal(self, rerun: ev.Rerun, window: Window | None, *, draining: bool) -> errors.OstinatoError | None:
        if draining:
            return errors.Draining("the sidecar is draining")
        if window is None:
            return errors.EngineUnavailable("no engine is connected")
        if window.need(rerun.kv_tokens) > window.engine.kv_blocks:
            return errors.EngineFailed("needs more KV blocks than the engine has")
        places = self.bounds.reruns_max  # verifications are bounded by the items that run
        if rerun.urgency is not ev.Urgency.VERIFY and len(self.waiting.get(rerun.urgency, ())) >= places:
            return errors.QueueFull(f"{places} second runs wait")
        return None

    def verify(self, window: Window, next_run_id: Callable[[], int], now: float) -> Iterator[ev.Effect]:
        """Start the verifications that fit. Called before items are submitted."""
        queue = self.waiting.get(ev.Urgency.VERIFY)
        while queue and window.fits(window.need((rerun := next(iter(queue.values()))).kv_tokens)):
            yield self._submit(rerun, window, next_run_id(), now)

    def submit(self, window: Window, next_run_id: Callable[[], int], now: float) -> Iterator[ev.Effect]:
        """Start the other reruns that may. Called when no item waits."""
        for urgency in (ev.Urgency.REPLAY, ev.Urgency.BACKGROUND):
            queue = self.waiting.get(urgency)
            while queue:
                rerun = self._next(queue)
                if not self._may_begin(rerun, window):
                    return
                yield self._submit(rerun, window, next_run_id(), now)

    def _next(self, queue: dict[int, ev.Rerun]) -> ev.Rerun:
        if not self._shares.divided:
            return next(iter(queue.values()))
        running = Counter(each.rerun.tenant for each in self.running.values())
        return min(queue.values(), key=lambda rerun: running[rerun.tenant])  # of equals the first that arrived

    def _submit(self, rerun: ev.Rerun, window: Window, run_id: int, now: float) -> ev.Effect:
        self._dequeue(rerun)
        blocks = window.need(rerun.kv_tokens)
        window.take(blocks, exclusive=rerun.exclusive)
        if rerun.tenant is not None and self._shares.divided:
            self._shares.run(rerun.tenant, 1, blocks)
        assert rerun.urgency is ev.Urgency.VERIFY or window.runs <= window.engine.runs, "invariant 2"
        expires_at = now + self.bounds.item_timeout_seconds
        self.running[run_id] = Running(rerun, blocks, expires_at)
        return ev.SubmitRerun(run_id, rerun.rerun_id, expires_at)

    def _dequeue(self, rerun: ev.Rerun) -> None:
        queue = self.waiting[rerun.urgency]
        del queue[rerun.rerun_id]
        if not queue:
            del self.waiting[rerun.urgency]

    def _may_begin(self, rerun: ev.Rerun, window: Window) -> bool:
        share, engine = self.bounds.reruns_share, window.engine
        held = [each.blocks for each in self.running.values() if each.rerun.urgency is not ev.Urgency.VERIFY]
        blocks = window.need(rerun.kv_tokens)
        in_share = len(held) < int(share * engine.runs) and sum(held) + blocks <= share * engine.kv_blocks
        if not window.fits(blocks, exclusive=rerun.exclusive) or not (in_share or not held):
            return False
        part = self.bounds.tenant_share
        room = window.blocks + blocks <= part * engine.kv_blocks
        return not window.runs or (window.runs < most(part, engine.runs) and room)

    def ended(self, run_id: int, window: Window) -> bool:
        """Give the run's room back. False: it is not a rerun."""
        running = self.running.pop(run_id, None)
        if running is not None:
            window.give(running.blocks)
            if running.rerun.tenant is not None and self._shares.divided:
                self._shares.run(running.rerun.tenant, -1, -running.blocks)
        return running is not None

    def expire(self, now: float, window: Window | None) -> Iterator[ev.Effect]:
        if not self.running:
            return
        late = {i: each for i, each in self.running.items() if now >= each.expires_at + self.bounds.overdue_seconds}
        yield from self._cancel(late, window)
        for running in late.values():
            yield ev.RerunLost(running.rerun.rerun_id, errors.DeadlineExceeded("its time passed and the engine was silent"))

    def lose(self, error: errors.OstinatoError, window: Window | None) -> Iterator[ev.Effect]:
        """Give up all of them. Without a window their runs are lost already."""
        lost = [running.rerun for running in self.running.values()]
        yield from self._cancel(self.running, window)
        for queue in self.waiting.values():
            lost += queue.values()
        self.waiting.clear()
        for rerun in lost:
            yield ev.RerunLost(rerun.rerun_id, error)

    def _cancel(self, run_ids: Iterable[int], window: Window | None) -> Iterator[ev.Effect]:
        for run_id in list(run_ids):
            if window is None:
                del self.running[run_id]
            else:
                self.ended(run_id, window)
                yield ev.CancelRun(run_id)
