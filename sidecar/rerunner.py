"""Runs without numbers: a recorded input, run again when the core finds room for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from ostinato import errors, tracing
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.core import events as ev
from sidecar.spans import run_span
from sidecar.work import Made, kv_tokens, submission

URGENCY = {engine_pb2.PURPOSE_VERIFY: ev.Urgency.VERIFY, engine_pb2.PURPOSE_REPLAY: ev.Urgency.REPLAY}
"""Of what somebody waits for; the rest is background."""


class Teller(Protocol):
    """Where events for the core go."""

    engine: engine_pb2.DescribeResponse | None

    def tell(self, event: ev.Event) -> None: ...


@dataclass(slots=True, eq=False)
class _Rerun:
    payload: sequencer_pb2.AdmittedPayload
    sequence: int
    purpose: engine_pb2.Purpose.ValueType
    made: asyncio.Future[Made]
    span: tracing.Span
    fingerprint_digest: bytes = b""
    run_id: int = 0
    over: bool = False
    """Whether the core knows that it has ended."""

    def end(self, result: Made | errors.OstinatoError) -> None:
        self.over = True
        if self.made.done():
            return
        if isinstance(result, Made):
            self.made.set_result(result)
        else:
            self.made.set_exception(result)


class Rerunner:
    """Keeps the futures of second runs. One beside each core."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._reruns: dict[int, _Rerun] = {}
        self._runs: dict[int, _Rerun] = {}
        self._last_id = 0

    def run(
        self,
        payload: sequencer_pb2.AdmittedPayload,
        sequence: int,
        purpose: engine_pb2.Purpose.ValueType,
        *,
        alone: bool = False,
    ) -> asyncio.Future[Made]:
        """Asks for room, `alone` for all of it, at once. The future fails with what ended the run without an output; whoever
        does not want it any more cancels it, or makes it fail."""
        self._last_id += 1
        rerun_id = self._last_id
        made: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._reruns[rerun_id] = _Rerun(payload, sequence, purpose, made, run_span(purpose, sequence))
        made.add_done_callback(lambda _: self._done(rerun_id))
        self._teller.tell(ev.Rerun(rerun_id, kv_tokens(payload), URGENCY.get(purpose, ev.Urgency.BACKGROUND), alone))
        return made

    def _done(self, rerun_id: int) -> None:
        rerun = self._reruns.pop(rerun_id)
        if not rerun.over:
            self._runs.pop(rerun.run_id, None)
            self._teller.tell(ev.DropRerun(rerun_id))
        rerun.span.end(None if rerun.made.cancelled() else rerun.made.exception())  # seen, even if nobody waits

    def submission(self, run_id: int, rerun_id: int, timeout_seconds: float) -> engine_pb2.Submit:
        """The core found room: the message that starts it."""
        rerun = self._runs[run_id] = self._reruns[rerun_id]
        rerun.run_id = run_id
        if self._teller.engine is not None:
            rerun.fingerprint_digest = self._teller.engine.model.fingerprint.digest
        return submission(
            rerun.payload,
            run_id=run_id,
            purpose=rerun.purpose,
            sequence=rerun.sequence,
            attempt=1,
            stream=False,
            timeout_seconds=timeout_seconds,
            traceparent=rerun.span.traceparent,
        )

    def finished(self, run_id: int, output: types_pb2.Output) -> None:
        """The run made this; runs that are none of ours are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(Made(output, rerun.fingerprint_digest))

    def failed(self, run_id: int, error: errors.OstinatoError) -> None:
        """The run ended without; runs that are none of ours are ignored."""
        if (rerun := self._runs.pop(run_id, None)) is not None:
            rerun.end(error)

    def lost(self, rerun_id: int, error: errors.OstinatoError) -> None:
        """The core gave it up."""
        if (rerun := self._reruns.get(rerun_id)) is not None:
            self._runs.pop(rerun.run_id, None)
            rerun.end(error)
