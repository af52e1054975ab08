"""The public door: batches in, ordered answers out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import grpc

from ostinato import errors, tracing
from ostinato.digest import request_digest
from ostinato.v1 import engine_pb2, generation_pb2, generation_pb2_grpc, types_pb2
from serving.auth import caller
from serving.handlers import ran_out, remaining, written

from sidecar.access import need_sight
from sidecar.admission import check, check_key, check_size, draft, response_bytes_max
from sidecar.calls import Call, Streamed, Unary
from sidecar.config import Settings
from sidecar.core import events as ev
from sidecar.core.item import numbered
from sidecar.dispatcher import Dispatcher
from sidecar.held import Account, Held
from sidecar.journal.model import Binding
from sidecar.results import answer_of, is_whole, stamp_of

KEY_CHARACTERS_SHOWN = 64
"""Of an idempotency key, in an error."""

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """See generation.proto."""

    def __init__(self, dispatcher: Dispatcher, held: Held, settings: Settings) -> None:
        self._dispatcher = dispatcher
        self.held = held
        self._settings = settings

    # Answers bytes, which are what waited.
    async def Generate(  # type: ignore[override]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> bytes:
        with self.held.account(stream=False) as account:
            return await self.answer(request, context, account)

    # Writes by itself: a generator could not be left while its reader is slow.
    async def GenerateStream(  # type: ignore[override]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        with self.held.account(stream=True) as account:
            await self.stream(request, context, account)

    async def answer(self, request: generation_pb2.GenerateRequest, context: Context, account: Account) -> bytes:
        """Generate, for a call with this account: a serialised GenerateResponse."""
        call, patience = Unary(len(request.items), account), remaining(context)
        ticket, stamp, _ = await self._enter(request, context, call)
        with self._leaving(ticket, call, context, patience):
            return await call.answer(stamp)

    async def stream(self, request: generation_pb2.GenerateRequest, context: Context, account: Account) -> None:
        """GenerateStream, for a call with this account. Writes serialised events; raises SlowReader."""
        call, patience = Streamed(len(request.items), account), remaining(context)
        ticket, stamp, repeated = await self._enter(request, context, call)
        admitted = generation_pb2.Admitted(stamp=stamp, repeated_key=repeated)
        with self._leaving(ticket, call, context, patience):
            event: bytes | None = generation_pb2.GenerateEvent(admitted=admitted).SerializeToString()
            while event is not None:
                if not await written(context.write(event), lost=account.lost):
                    raise account.error
                event = await call.next()

    @contextlib.contextmanager
    def _leaving(self, ticket: int, call: Call, context: Context, patience: float | None) -> Iterator[None]:
        """Its items are told when the caller goes, or loses its call."""
        try:
            yield
        except asyncio.CancelledError:
            self._dispatcher.leave(ticket, call, gone(context, patience))
            raise
        except errors.SlowReader as error:
            self._dispatcher.leave(ticket, call, errors.Cancelled(error.message))
            raise

    async def Cancel(self, request: generation_pb2.CancelRequest, context: Context) -> generation_pb2.CancelResponse:
        first, last = await self._range(request)
        works = numbered(self._dispatcher.works, first, last)
        self._dispatcher.tell(ev.Cancel(first, last))
        for work in works:
            work.forgo(errors.Cancelled("cancelled on request"))
        results = await asyncio.gather(*(asyncio.shield(work.ended) for work in works))
        cancelled = sum(result.status.code == grpc.StatusCode.CANCELLED.value[0] for result in results)
        cancelled += await self._dispatcher.elsewhere.cancel(first, last, self._dispatcher.works)
        return generation_pb2.CancelResponse(cancelled=cancelled, ended=last - first + 1 - cancelled)

    async def _range(self, request: generation_pb2.CancelRequest) -> tuple[int, int]:
        match request.WhichOneof("target"):
            case "range":
                first, last = request.range.first, request.range.last
                if not 1 <= first <= last:
                    raise errors.invalid("range", "first must be at least 1 and last at least first")
                newest = (await self._dispatcher.journal.head()).last_sequence
                if last > newest:
                    raise errors.NotFound(f"the newest sequence is {newest}")
                await need_sight(self._dispatcher.journal, first, last)
                return first, last
            case "idempotency_key":
                check_key(request.idempotency_key)
                binding = await self._dispatcher.journal.binding(caller().tenant, request.idempotency_key)
                if binding is None:
                    raise errors.NotFound("this key is not bound")
                return binding.first_sequence, binding.first_sequence + binding.count - 1
            case _:
                raise errors.invalid("target", "is missing")

    async def GetModel(self, request: generation_pb2.GetModelRequest, context: Context) -> generation_pb2.GetModelResponse:
        engine = self._dispatcher.engine
        if engine is None:
            raise errors.EngineUnavailable("no engine is connected", retry_after=1.0)
        model = types_pb2.Model()
        model.CopyFrom(engine.model)
        model.limits.batch_items_max = self._settings.batch_items_max
        model.limits.idempotency_key_bytes_max = self._settings.idempotency_key_bytes_max
        model.limits.request_id_bytes_max = self._settings.request_id_bytes_max
        return generation_pb2.GetModelResponse(model=model)

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        return await self._dispatcher.link.tokenize(request, remaining(context))

    # ---- admission

    async def _enter(
        self, request: generation_pb2.GenerateRequest, context: Context, call: Call
    ) -> tuple[int, types_pb2.Stamp, bool]:
        """The ticket, the stamp, and whether the key was bound before. Raises whatever refuses the request."""
        span = tracing.current()
        span.note({"ostinato.request_id": request.request_id, "ostinato.items": len(request.items)})
        try:
            ticket, stamp, repeated = await self._number(request, context, call)
            span.note({"ostinato.sequence": stamp.first_sequence, "ostinato.epoch": stamp.epoch})
            span.note({"ostinato.repeated_key": repeated})
            return ticket, stamp, repeated
        except errors.OstinatoError as error:
            self._dispatcher.observer.refused(error)
            raise

    async def _number(
        self, request: generation_pb2.GenerateRequest, context: Context, call: Call
    ) -> tuple[int, types_pb2.Stamp, bool]:
        left = remaining(context)
        if left is not None and left <= 0:
            raise errors.DeadlineExceeded("the deadline had passed before anything was numbered")
        check(request, self._settings)
        self.held.check()
        most = response_bytes_max(context.invocation_metadata() or (), self._settings)
        if request.idempotency_key:
            binding = await self._dispatcher.journal.binding(caller().tenant, request.idempotency_key)
            if binding is not None:
                return 0, await self._join(request, binding, call), True
        prepare = engine_pb2.PrepareRequest(items=request.items, parameters=request.parameters)
        prepared = await self._dispatcher.link.prepare(prepare, left)
        check_size(prepared, most, verify=request.verify)
        deadline = None if left is None else self._dispatcher.clock() + (remaining(context) or 0.0)
        admission = draft(request, prepared, caller().tenant)
        ticket, answer = await self._dispatcher.admit(admission, call, deadline, lambda: gone(context, left))
        if isinstance(answer, Binding):
            return 0, await self._join(request, answer, call), True
        return ticket, answer, False

    async def _join(self, request: generation_pb2.GenerateRequest, binding: Binding, call: Call) -> types_pb2.Stamp:
        """The recorded outcomes of a bound key, and those still to come. Raises KeyReused for another request."""
        if request_digest(request) != binding.request_digest:
            named = _shown(request.idempotency_key)
            raise errors.KeyReused(
                f"the idempotency key {named} was used for another request: use another key, or send the same request"
            )
        self._dispatcher.observer.repeated()
        first, last = binding.first_sequence, binding.first_sequence + binding.count - 1
        call.sequences = range(first, last + 1)
        joined = {number: self._dispatcher.works[number] for number in call.sequences if number in self._dispatcher.works}
        for work in joined.values():
            work.join(call)
        recorded = await self._dispatcher.journal.items(first, last, binding.count)
        elsewhere = []
        for entries in recorded:
            if entries.admitted.header.sequence in joined:
                continue
            if is_whole(entries):
                call.result(answer_of(entries))
            else:
                elsewhere.append(entries.admitted.header.sequence)
        if elsewhere:
            await self._dispatcher.elsewhere.join(call, elsewhere)
        return stamp_of(recorded[0].admitted.header)


def gone(context: Context, patience: float | None) -> errors.OstinatoError:
    """Why gRPC cancelled the handler of a caller that came with this many seconds to its deadline: it shows both alike."""
    if ran_out(remaining(context), patience):
        return errors.DeadlineExceeded("the caller's deadline passed")
    return errors.Cancelled("the caller went away")


def _shown(key: str) -> str:
    """The key in quotes, in one line of ASCII, or its beginning and dots."""
    shown = json.dumps(key[:KEY_CHARACTERS_SHOWN])
    return shown if len(key) <= KEY_CHARACTERS_SHOWN else f"{shown}..."
