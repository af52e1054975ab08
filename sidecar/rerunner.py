"""Runs without numbers: a recorded input, run again behind everything that has one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from ostinato import errors
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.core import events as ev
from sidecar.work import kv_tokens, submission


class Teller(Protocol):
    """Where events for the core go."""

    engine: engine_pb2.DescribeResponse | None

    def tell(self, event: ev.Event) -> None: ...


@dataclass(frozen=True, slots=True)
class Made:
    """What a re-run made, and on what."""

    output: types_pb2.Output
    fingerprint_digest: bytes


@dataclass(slots=True, eq=False)
class _Rerun:
    payload: sequencer_pb2.AdmittedPayload
    sequence: int
    purpose: engine_pb2.Purpose.ValueType
    made: asyncio.Future[Made]
    fingerprint_digest: bytes = b""


class Rerunner:
    """Keeps the futures of re-runs. One beside each Dispatcher."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._reruns: dict[int, _Rerun] = {}
        self._runs: dict[int, _Rerun] = {}
        self._last_id = 0

    async def run(
        self,
        payload: sequencer_pb2.AdmittedPayload,
        sequence: int,
        purpose: engine_pb2.Purpose.ValueType,
        *,
        alone: bool = False,
    ) -> Made:
        """Waits for room, `alone` for all of it, and for the end. Raises what ended it without output."""
        self._last_id += 1
        rerun_id = self._last_id
        made: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._reruns[rerun_id] = _Rerun(payload, sequence, purpose, made)
        try:
            self._teller.tell(ev.Rerun(rerun_id, kv_tokens(payload), alone))
            return await made
        except asyncio.CancelledError:
            self._teller.tell(ev.DropRerun(rerun_id))
            raise
        finally:
            del self._reruns[rerun_id]

    def submission(self, run_id: int, rerun_id: int, timeout_seconds: float) -> engine_pb2.Submit:
        """The core found room: the message that starts it."""
        rerun = self._runs[run_id] = self._reruns[rerun_id]
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
        )

    def finished(self, run_id: int, output: types_pb2.Output) -> None:
        """The run made this; runs that are none of ours are ignored."""
        rerun = self._runs.pop(run_id, None)
        if rerun is not None and not rerun.made.done():
            rerun.made.set_result(Made(output, rerun.fingerprint_digest))

    def failed(self, run_id: int, error: errors.OstinatoError) -> None:
        """The run ended without; runs that are none of ours are ignored."""
        rerun = self._runs.pop(run_id, None)
        if rerun is not None and not rerun.made.done():
            rerun.made.set_exception(error)

    def lost(self, rerun_id: int, error: errors.OstinatoError) -> None:
        """The core gave it up."""
        rerun = self._reruns.get(rerun_id)
        self._runs = {run_id: other for run_id, other in self._runs.items() if other is not rerun}
        if rerun is not None and not rerun.made.done():
            rerun.made.set_exception(error)
