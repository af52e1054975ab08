"""Runs without numbers: audits, replays and the like. They wait behind every item and are never recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ostinato import errors

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.window import Window


class Reruns:
    """First in, first out; one that never fits is lost at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting: dict[int, ev.Rerun] = {}
        self.running: dict[int, ev.Rerun] = {}
        """By run_id."""

    @property
    def room(self) -> bool:
        """Whether one more may wait."""
        return len(self.waiting) < self.most

    def add(self, rerun: ev.Rerun, window: Window | None, *, draining: bool) -> Iterator[do.Effect]:
        if draining:
            yield do.RerunLost(rerun.rerun_id, errors.Draining("the sidecar is draining"))
        elif window is None:
            yield do.RerunLost(rerun.rerun_id, errors.EngineUnavailable("no engine is connected"))
        elif not window.ever_fits(rerun.kv_tokens):
            yield do.RerunLost(rerun.rerun_id, errors.EngineFailed("needs more KV blocks than the engine has"))
        elif not self.room:
            yield do.RerunLost(rerun.rerun_id, errors.QueueFull(f"{self.most} re-runs wait"))
        else:
            self.waiting[rerun.rerun_id] = rerun

    def submit(self, window: Window, next_run_id: Callable[[], int], expires_at: float) -> Iterator[do.Effect]:
        """As many as fit, oldest first."""
        while self.waiting:
            rerun = next(iter(self.waiting.values()))
            if not window.fits(rerun.kv_tokens, alone=rerun.alone):
                return
            del self.waiting[rerun.rerun_id]
            window.take(rerun.kv_tokens, alone=rerun.alone)
            run_id = next_run_id()
            self.running[run_id] = rerun
            yield do.SubmitRerun(run_id, rerun.rerun_id, expires_at)

    def ended(self, run_id: int, window: Window) -> bool:
        """A run is over; whether it was one of these."""
        rerun = self.running.pop(run_id, None)
        if rerun is not None:
            window.give(rerun.kv_tokens)
        return rerun is not None

    def drop(self, rerun_id: int, window: Window | None) -> Iterator[do.Effect]:
        """Nobody wants it any more."""
        self.waiting.pop(rerun_id, None)
        for run_id, rerun in list(self.running.items()):
            if rerun.rerun_id == rerun_id and window is not None:
                self.ended(run_id, window)
                yield do.CancelRun(run_id)

    def lose(self, error: errors.OstinatoError, window: Window | None) -> Iterator[do.Effect]:
        """All of them; with no window their runs are lost already."""
        lost = [*self.running.values(), *self.waiting.values()]
        for run_id in list(self.running):
            if window is not None:
                self.ended(run_id, window)
                yield do.CancelRun(run_id)
        self.running.clear()
        self.waiting.clear()
        for rerun in lost:
            yield do.RerunLost(rerun.rerun_id, error)
