"""Between the engine and those who use it: the sidecar's stream, and the self-test.

1. Run ids are unique in the process; each owner sees its own.
2. A run ends once: by the engine, by its deadline, or by its owner. After that nothing of it is delivered.
3. When an owner goes, so do its runs, at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ostinato.errors import Cancelled, DeadlineExceeded, OstinatoError, from_status, to_status
from ostinato.v1 import engine_pb2

from service.answer import Answer
from service.engines.base import Engine, Events, Run
from service.grade import HeldGrade
from service.metrics import Metrics
from service.spans import RunSpans

Deliver = Callable[[engine_pb2.RunEvent], None]


@dataclass(slots=True)
class _Live:
    owner: Owner
    submit: engine_pb2.Submit
    submitted_at: float
    spans: RunSpans
    last_token_at: float | None = None
    started: bool = False
    reported_tokens: int = 0
    deadline: asyncio.TimerHandle | None = None


class Runs:
    """All runs of one engine. On the event loop, like everything here."""

    def __init__(self, engine: Engine, held: HeldGrade, metrics: Metrics) -> None:
        self.engine, self.held = engine, held
        self._metrics = metrics
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count(1)

    def start(self) -> None:
        """Start the engine on the running loop, whose clock is that of all deadlines."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self._on_events, self.held.fall)

    def __len__(self) -> int:
        return len(self._live)

    def _submit(self, owner: Owner, submit: engine_pb2.Submit) -> int:
        run_id = next(self._ids)
        live = self._live[run_id] = _Live(owner, submit, self._loop.time(), RunSpans(submit, self.engine))
        if submit.timeout_millis:
            live.deadline = self._loop.call_later(submit.timeout_millis / 1000, self._expire, run_id)
        self._metrics.queued.inc()
        self.engine.submit(
            Run(
                run_id=run_id,
                sequence=submit.sequence,
                attempt=submit.attempt,
                purpose=submit.purpose,
                token_ids=tuple(submit.token_ids),
                parameters=submit.parameters,
                seed=submit.seed,
                stream=submit.stream,
                answer=Answer(submit.parameters, self.engine.vocabulary),
            )
        )
        return run_id

    def _cancel(self, run_id: int) -> None:
        self.engine.cancel(run_id)
        self._end(run_id, "cancelled", Cancelled("not wanted any more"))

    def _expire(self, run_id: int) -> None:
        live = self._live[run_id]
        self.engine.cancel(run_id)
        error = DeadlineExceeded(f"the run did not end within {live.submit.timeout_millis} ms")
        self._end(run_id, "expired", error)
        live.owner._deliver(engine_pb2.RunEvent(run_id=live.submit.run_id, failed=to_status(error)))

    def _end(self, run_id: int, end: str, error: OstinatoError | None = None) -> None:
        live = self._live.pop(run_id)
        live.spans.ended(error)
        live.owner._forget(live.submit.run_id)
        if live.deadline is not None:
            live.deadline.cancel()
        (self._metrics.running if live.started else self._metrics.queued).dec()
        self._metrics.end(live.submit.purpose, end)

    def _on_events(self, events: Events) -> None:
        now = self._loop.time()
        for event in events:
            live = self._live.get(event.run_id)
            if live is None:
                continue  # ended here while the engine's report was under way
            self._note(event.run_id, event, live, now)
            event.run_id = live.submit.run_id
            live.owner._deliver(event)

    def _note(self, run_id: int, event: engine_pb2.RunEvent, live: _Live, now: float) -> None:
        """Keep the books, and fill in the grade."""
        match event.WhichOneof("event"):
            case "started":
                live.started = True
                live.spans.started()
                self._metrics.queued.dec()
                self._metrics.running.inc()
                self._metrics.queue_seconds.observe(now - live.submitted_at)
                self._metrics.prompt_tokens.inc(len(live.submit.token_ids))
            case "tokens":
                self._note_tokens(len(event.tokens.token_ids), live, now)
            case "finished":
                output = event.finished.output
                output.grade = self.held.grade
                live.spans.finished(output)
                self._metrics.new_tokens.inc(len(output.token_ids) - live.reported_tokens)
                self._metrics.cached_tokens.inc(output.cached_tokens)
                self._metrics.run_seconds.observe(now - live.submitted_at)
                self._end(run_id, "finished")
            case _:
                self._end(run_id, "failed", from_status(event.failed))

    def _note_tokens(self, count: int, live: _Live, now: float) -> None:
        if not count:
            return
        if live.last_token_at is None:
            live.spans.first_token()
            self._metrics.first_token_seconds.observe(now - live.submitted_at)
        else:
            self._metrics.between_tokens_seconds.observe((now - live.last_token_at) / count)
        live.last_token_at = now
        live.reported_tokens += count
        self._metrics.new_tokens.inc(count)


class Owner:
    """One user of the engine, with run ids of its own."""

    def __init__(self, runs: Runs, deliver: Deliver) -> None:
        """`deliver` gets every event of this owner's runs, in order, with the owner's run id."""
        self._runs, self._deliver = runs, deliver
        self._ids: dict[int, int] = {}

    def __len__(self) -> int:
        """Runs that have not ended."""
        return len(self._ids)

    def __contains__(self, run_id: int) -> bool:
        return run_id in self._ids

    def submit(self, submit: engine_pb2.Submit) -> None:
        """Start a run; its id must be none of those that have not ended."""
        assert submit.run_id not in self._ids, "the caller checks run ids"
        self._ids[submit.run_id] = self._runs._submit(self, submit)

    def cancel(self, run_id: int) -> None:
        """Stop a run, silently. Unknown and ended ones are ignored."""
        if run_id in self._ids:
            self._runs._cancel(self._ids[run_id])

    def close(self) -> None:
        """Stop all runs, silently. May be called again."""
        for run_id in tuple(self._ids):
            self.cancel(run_id)

    def _forget(self, run_id: int) -> None:
        del self._ids[run_id]
