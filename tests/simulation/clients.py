"""Clients: each job is sent until it is answered, as a client of ours would; what they saw goes into the history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from google.protobuf.message import Message

from ostinato import errors
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.simulation.history import Call, History
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Network, Outgoing
from tests.simulation.plan import Job

PAUSE_SECONDS = 1.0
GENERATE, STREAM = "/ostinato.v1.Generation/Generate", "/ostinato.v1.Generation/GenerateStream"
CANCEL, REPLAY = "/ostinato.v1.Generation/Cancel", "/ostinato.v1.Sequencer/Replay"
PATIENCE_SECONDS = 30.0
"""Of a call that has no deadline of its own, before its client tries another one: a half-open connection never tells."""

READ_SECONDS = 4.0

Dial = Callable[[str, float | None], Outgoing]
"""Calls the present sidecar: method, deadline."""


class Clients:
    def __init__(self, loop: VirtualLoop, network: Network, history: History, dial: Dial) -> None:
        self._loop, self._network, self._history, self._dial = loop, network, history, dial

    async def job(self, job: Job) -> None:
        """Until it is answered, refused for good, or its client has left."""
        await asyncio.sleep(job.at)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._patiently(job))
            if job.again_after is not None:
                group.create_task(self._again(job, job.again_after))

    async def afterwards(self, job: Job) -> None:
        """Ask once more for what has ended long ago."""
        await self._until_done(job, afterwards=True)

    async def replay(self, first: int, last: int) -> None:
        """Run a range again; the answer does not matter."""
        request = sequencer_pb2.ReplayRequest(range=generation_pb2.SequenceRange(first=first, last=last), concurrency=2)
        with suppress(errors.OstinatoError):
            await self._ask(REPLAY, request, PATIENCE_SECONDS)

    async def read(self) -> None:
        """Call what only reads."""
        target = types_pb2.Item(text="a")
        for method, request in (
            ("Sequencer/Get", sequencer_pb2.GetRequest(sequence=1)),
            ("Sequencer/Head", sequencer_pb2.HeadRequest()),
            ("Generation/Tokenize", generation_pb2.TokenizeRequest(items=[target])),
            ("Sequencer/Tail", sequencer_pb2.TailRequest(from_index=1, follow=True)),
        ):
            with suppress(errors.OstinatoError):
                await self._ask(f"/ostinato.v1.{method}", request, READ_SECONDS)

    async def _again(self, job: Job, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._until_done(job)

    async def _patiently(self, job: Job) -> None:
        asking = asyncio.ensure_future(self._until_done(job))
        ends = [seconds for seconds in (job.hangs_up_after, job.cancels_after) if seconds is not None]
        done, _ = await asyncio.wait({asking}, timeout=min(ends, default=None))
        if not done and job.cancels_after is not None:
            await self._cancel(job)
        if not done and job.hangs_up_after is not None:
            asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking

    async def _cancel(self, job: Job) -> None:
        request = generation_pb2.CancelRequest(idempotency_key=job.key)
        if not job.key:
            stamp = next((call.stamp for call in self._history.calls if call.job == job.number and call.stamp), None)
            if stamp is None:
                return
            last = stamp.first_sequence + stamp.count - 1
            request = generation_pb2.CancelRequest(range=generation_pb2.SequenceRange(first=stamp.first_sequence, last=last))
        with suppress(errors.OstinatoError):
            await self._ask(CANCEL, request, PATIENCE_SECONDS)

    async def _until_done(self, job: Job, *, afterwards: bool = False) -> None:
        attempt = 0
        while True:
            attempt += 1
            call = await self._call(job, attempt, afterwards)
            if call.complete or isinstance(call.error, errors.KeyReused | errors.InvalidRequest | errors.GradeNotEarned):
                return
            refused = isinstance(call.error, errors.Refused)
            if not refused and not job.key:
                return  # without a key the outcome cannot be asked for
            await asyncio.sleep((call.error.retry_after if call.error else None) or PAUSE_SECONDS)

    async def _call(self, job: Job, attempt: int, afterwards: bool) -> Call:
        history = self._history
        call = history.call(job, str(job.number), self._loop.time(), afterwards=afterwards)
        request = call.request
        seconds = (job.deadline_seconds or PATIENCE_SECONDS) * attempt  # who runs out of time takes more of it
        try:
            deadline = self._loop.time() + seconds
            async with aclosing(self._stream(STREAM if job.streamed else GENERATE, request, deadline)) as answers:
                async for answer in answers:
                    step = history.note(self._loop.time(), "answer", request.request_id, answer.hex())
                    if job.streamed:
                        call.hear(generation_pb2.GenerateEvent.FromString(answer), step)
                    else:
                        call.answer(generation_pb2.GenerateResponse.FromString(answer), step)
            call.ended_well = True
        except errors.OstinatoError as error:
            call.error = error
            history.note(self._loop.time(), "error", request.request_id, error.reason)
        finally:
            if not self._network.muted:
                call.closed = history.note(self._loop.time(), "closed", request.request_id)
        return call

    async def _ask(self, method: str, request: Message, seconds: float) -> None:
        """To its end, whatever is answered."""
        async with aclosing(self._stream(method, request, self._loop.time() + seconds)) as answers:
            async for _ in answers:
                pass

    async def _stream(self, method: str, request: Message, deadline: float | None) -> AsyncGenerator[bytes, None]:
        outgoing = self._dial(method, deadline)
        outgoing.write(request.SerializeToString())
        try:
            while (answer := await outgoing.read()) is not None:
                yield answer
        finally:
            outgoing.cancel()
