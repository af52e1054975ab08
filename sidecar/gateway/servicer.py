"""The RPCs of `vllm.grpc.engine.VllmEngine` that a gateway calls. All work goes through our own Generation."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator
from typing import Any, Never

from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as vllm_grpc

from ostinato import __version__, errors
from ostinato.v1 import generation_pb2, types_pb2
from serving.auth import Context, caller
from serving.handlers import remaining, written

from sidecar.config import Settings
from sidecar.dispatcher import Dispatcher
from sidecar.gateway.answers import Answer
from sidecar.gateway.sampling import in_their_words, request_of
from sidecar.generation import GenerationServicer

NAME = "vllm.grpc.engine.VllmEngine"
RESTART_GATEWAY = "another tokenizer runs now than the gateway was given: restart the gateway"
register = vllm_grpc.add_VllmEngineServicer_to_server
GATEWAYS_MAX = 1024
"""Connections of which it is remembered what they were given."""
CHUNK_BYTES = 1 << 20
"""Of the tokenizer's files."""


class Given:
    """Which tokenizer each gateway was given last. A gateway keeps one for as long as it runs, and asks for it on the
    connection on which it generates; over a unix socket, connections cannot be told apart."""

    def __init__(self) -> None:
        self._by_peer: OrderedDict[str, str] = OrderedDict()
        """Of the newest connections."""
        self._ever: set[str] = set()

    def to(self, peer: str, tokenizer: str) -> None:
        """This connection's gateway has it now."""
        self._by_peer[peer] = tokenizer
        self._by_peer.move_to_end(peer)
        if len(self._by_peer) > GATEWAYS_MAX:
            self._by_peer.popitem(last=False)
        self._ever.add(tokenizer)

    def differs(self, peer: str, running: str | None) -> bool:
        """Whether this connection's gateway is known to have another than the one that runs."""
        return running is not None and self._by_peer.get(peer, running) != running

    def may_differ(self, peer: str, running: str | None) -> bool:
        """Whether its token ids may be those of another model. A connection that asked for none may be that of any gateway that
        did, which has connected anew."""
        if peer in self._by_peer:
            return self.differs(peer, running)
        return running is not None and not self._ever <= {running}


class VllmServicer(vllm_grpc.VllmEngineServicer):  # type: ignore[misc]  # the package has no types for it
    """Another face of `generation`."""

    def __init__(self, generation: GenerationServicer, dispatcher: Dispatcher, settings: Settings) -> None:
        self._generation = generation
        self._dispatcher = dispatcher
        self._items_max = settings.batch_items_max
        self._timeout_seconds = settings.vllm_timeout_seconds
        self._started = time.monotonic()
        self._given = Given()
        self._running: defaultdict[tuple[str, str], set[asyncio.Future[None]]] = defaultdict(set)
        """By tenant and request id, which need not be unique."""

    # Writes by itself, as Generation does.
    async def Generate(self, request: vllm.GenerateRequest, context: Context) -> None:
        running = asyncio.ensure_future(self._generate(request, context))
        name = (caller().tenant, request.request_id)
        self._running[name].add(running)
        try:
            await running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise errors.Cancelled("aborted") from None
        finally:
            self._running[name].discard(running)
            if not self._running[name]:
                del self._running[name]

    async def _generate(self, request: vllm.GenerateRequest, context: Context) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        patience = remaining(context)
        if patience is not None:
            deadline = min(deadline, time.monotonic() + patience)
        ours = self._ours(request, context.peer())
        with self._generation.held.account(stream=request.stream) as account:
            answer: Any = Answer(context, len(request.tokenized.input_ids), lambda: deadline - time.monotonic(), account)
            try:
                if request.stream:
                    await self._generation.stream(ours, answer, account)
                    ending = answer.end()
                else:
                    ending = answer.whole(await self._generation.answer(ours, answer, account))
            except errors.InvalidRequest as error:
                raise in_their_words(error) from error
            if not await written(ending, lost=account.lost):
                raise account.error

    def _ours(self, request: vllm.GenerateRequest, peer: str) -> generation_pb2.GenerateRequest:
        """Raises what refuses it, counted as Generation counts its own refusals."""
        try:
            if self._given.may_differ(peer, self._tokenizer()):
                raise errors.FingerprintChanged(RESTART_GATEWAY)
            return request_of(request, self._items_max)
        except errors.OstinatoError as error:
            self._dispatcher.observer.refused(error)
            raise

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        for request_id in request.request_ids:
            for running in self._running.get((caller().tenant, request_id), ()):
                running.cancel()
        return vllm.AbortResponse()

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        why = ""
        if self._dispatcher.engine is None:
            why = "no engine is connected"
        elif self._dispatcher.core.draining:
            why = "draining"
        elif self._dispatcher.journal.full:
            why = "the journal is full"
        elif self._given.differs(context.peer(), self._tokenizer()):
            why = RESTART_GATEWAY
        return vllm.HealthCheckResponse(healthy=not why, message=why or "OK")

    async def GetModelInfo(self, request: vllm.GetModelInfoRequest, context: Context) -> vllm.GetModelInfoResponse:
        model = self._model()
        return vllm.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            model_type=model.engine,
            is_generation=True,
            max_context_length=model.context_tokens,
            max_req_input_len=model.context_tokens - 1,
            vocab_size=model.vocabulary_size,
        )

    async def GetServerInfo(self, request: vllm.GetServerInfoRequest, context: Context) -> vllm.GetServerInfoResponse:
        return vllm.GetServerInfoResponse(
            server_type="vllm-grpc",
            active_requests=len(self._dispatcher.works),
            uptime_seconds=time.monotonic() - self._started,
            data_parallel_size=1,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        core = self._dispatcher.core
        running = core.window.runs if core.window is not None else 0
        waiting = core.queued + self._dispatcher.entrance.waiting.items
        load = vllm.SchedulerLoad(num_running_reqs=running, num_waiting_reqs=waiting, num_total_reqs=running + waiting)
        return vllm.GetLoadsResponse(version=__version__, dp_rank_count=1, loads=[load])

    async def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[common.GetTokenizerChunk]:
        told = self._model().fingerprint.fields["tokenizer"]
        files = await self._dispatcher.link.tokenizer(remaining(context))
        self._given.to(context.peer(), told)
        for start in range(0, len(files), CHUNK_BYTES):
            last = start + CHUNK_BYTES >= len(files)
            digest = hashlib.sha256(files).hexdigest() if last else ""
            yield common.GetTokenizerChunk(data=files[start : start + CHUNK_BYTES], sha256=digest)

    def _tokenizer(self) -> str | None:
        """The one that runs, as the fingerprint names it; None: there is no engine."""
        engine = self._dispatcher.engine
        return engine.model.fingerprint.fields["tokenizer"] if engine is not None else None

    def _model(self) -> types_pb2.Model:
        if self._dispatcher.engine is None:
            raise errors.EngineUnavailable("no engine is connected", retry_after=1.0)
        return self._dispatcher.engine.model

    async def Embed(self, request: Any, context: Context) -> Never:
        raise errors.NotBuilt("this is for text generation only")

    FlushCache = StartProfile = StopProfile = Embed

    async def SubscribeKvEvents(self, request: Any, context: Context) -> Never:
        raise errors.NotBuilt("there is no feed of cache events; GetLoads says how full it is")
