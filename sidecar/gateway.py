"""The service `vllm.grpc.engine.VllmEngine` over our own Generation, for OpenAI gateways.

A gateway's request is translated and handed to Generation; what Generation writes is translated back. Imports an optional
package, so this module is imported only with --vllm-face.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from typing import Any, Never

from google.protobuf import json_format
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as vllm_grpc

from ostinato import __version__, errors
from ostinato.errors import Violation
from ostinato.v1 import generation_pb2, types_pb2
from serving.auth import Context, caller
from serving.handlers import remaining, written

from sidecar.api import GenerationServicer
from sidecar.config import Settings
from sidecar.held import Account
from sidecar.pipeline import Pipeline

NAME = "vllm.grpc.engine.VllmEngine"
register = vllm_grpc.add_VllmEngineServicer_to_server

SEED_MAX = 2**31 - 2
"""The gateway turns every larger seed into 2**31 - 1, so that one may not be the caller's."""
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "logprobs": "logprobs",
    "json_schema": "response_format.json_schema",
    "json_object": "response_format.json_schema",
    "regex": "response_format.regex",
    "choice": "response_format.regex",
    "grammar": "response_format.ebnf",
    "structural_tag": "response_format.structural_tag",
    "seed": "seed",
}
"""The gateway's names of parameters, and ours."""
IGNORED_PARAMETERS = frozenset({"skip_special_tokens", "spaces_between_special_tokens", "grammar_from_first_token"})
"""These have no effect here: the gateway detokenises, and our grammars always start at the first token."""
_ALSO = ("json_object", "choice")
"""Further names of what has one."""
_SPECIAL = re.compile(r"[\\.^$|?*+()\[\]{}]")
"""In a regular expression."""
REQUEST_FIELDS = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream"})
_PATHS = {f"parameters.{own}": f"sampling_params.{theirs}" for theirs, own in PARAMETERS.items() if theirs not in _ALSO}

STAMP_METADATA, RECEIPT_METADATA = "ostinato-stamp-bin", "ostinato-receipt-bin"
RECEIPTS_MAX, RECEIPTS_BYTES_MAX = 8, 5 << 10
"""Receipts in a call's trailers, before base64: a peer need not accept more than 8 KiB. Sequencer.Get returns all of them."""

RESTART_GATEWAY = "another tokenizer runs now than the gateway was given: restart the gateway"
GATEWAYS_MAX = 1024
"""Connections whose tokenizer is remembered."""
CHUNK_BYTES = 1 << 20
"""Size of a message with a part of the tokenizer's files."""
TOKENIZER_COST = 1 << 20
"""Packing a tokenizer takes as long as this much text."""


# ---- requests


def request_of(theirs: vllm.GenerateRequest, items_max: int) -> generation_pb2.GenerateRequest:
    """The request with one item for each of `n`. A given seed is that of the first item, and counts up.

    Every field is translated or refused. Raises InvalidRequest that lists every bad field by the gateway's name.
    """
    given = theirs.sampling_params
    violations = [*_unknown(theirs, REQUEST_FIELDS, "")]
    violations += _unknown(given, {*PARAMETERS, *IGNORED_PARAMETERS, "n"}, "sampling_params.")
    violations += _bad(theirs, items_max)
    if violations:
        raise errors.InvalidRequest(violations=violations)
    prompt = types_pb2.Item()
    if theirs.WhichOneof("input") == "text":
        prompt.text = theirs.text
    else:
        prompt.token_ids.ids.extend(theirs.tokenized.input_ids)
    request = generation_pb2.GenerateRequest(request_id=theirs.request_id, parameters=_parameters(given))
    for index in range(given.n or 1):
        request.items.append(prompt)
        if given.HasField("seed"):
            request.items[-1].parameters.seed = given.seed + index
    return request


def with_gateway_names(error: errors.OstinatoError) -> errors.OstinatoError:
    """The error, with bad fields under the gateway's names."""
    if not isinstance(error, errors.InvalidRequest) or not error.violations:
        return error
    return errors.InvalidRequest(violations=[Violation(_path(each.field), each.description) for each in error.violations])


def _parameters(given: vllm.SamplingParams) -> types_pb2.Parameters:
    """All parameters but the seed. A field that reads as zero because it is not set is left out.

    Converted through JSON, which writes a 32-bit 0.7 as 0.7 and not as 0.699999988079071: the request is the same input as that
    of another client.
    """
    made: dict[str, Any] = {}
    for theirs, value in json_format.MessageToDict(given, preserving_proto_field_name=True).items():
        group, _, own = PARAMETERS.get(theirs, "").rpartition(".")
        if not own or own == "seed" or (theirs == "json_object" and not value):
            continue
        if theirs == "choice":
            value = "|".join(_SPECIAL.sub(r"\\\g<0>", each) for each in value["choices"])
        elif theirs == "json_object":
            value = '{"type":"object"}'
        made[group or own] = {own: value} if group else value
    return json_format.ParseDict(made, types_pb2.Parameters())


def _bad(theirs: vllm.GenerateRequest, items_max: int) -> Iterator[Violation]:
    given = theirs.sampling_params
    if theirs.WhichOneof("input") is None:
        yield Violation("tokenized", "is missing, and so is text")
    if given.HasField("seed") and not 0 <= given.seed <= SEED_MAX:
        why = "the gateway cuts other seeds to 32 bits without an error, so this may not be the caller's seed"
        yield Violation("sampling_params.seed", f"must be 0 to {SEED_MAX}, is {given.seed}: {why}")
    if given.n > items_max:
        yield Violation("sampling_params.n", f"must be at most {items_max}, is {given.n}")
    for name in ("top_k", "max_tokens", "min_tokens"):
        if getattr(given, name) >= 1 << 31:
            yield Violation(f"sampling_params.{name}", f"{getattr(given, name)} is too large")


def _unknown(message: Message, known: Collection[str], path: str) -> Iterator[Violation]:
    for field, _ in message.ListFields():
        if field.name not in known:
            yield Violation(f"{path}{field.name}", "is not supported")


def _path(field: str) -> str:
    """The gateway's name of one of our fields. All its items have one prompt, and their parameters are those of the batch."""
    own = re.sub(r"^items\[\d+\]\.(?=parameters\.)", "", field)
    if own.startswith("items["):
        return "tokenized.input_ids"
    if own == "items":
        return "sampling_params.n"
    longest = max((path for path in _PATHS if re.match(rf"{re.escape(path)}\b", own)), key=len, default=None)
    return own if longest is None else _PATHS[longest] + own.removeprefix(longest)


# ---- answers


class GatewayAnswer:
    """Takes the place of gRPC's context in a handler of Generation, and writes the gateway's messages.

    `time_left`: seconds until the call's deadline. `account`: of the bytes that are held until the call ends.
    """

    def __init__(self, context: Context, prompt_tokens: int, time_left: Callable[[], float], account: Account) -> None:
        self._context = context
        self._account = account
        self._prompt_tokens = prompt_tokens
        self._stamp = types_pb2.Stamp()
        self._results: list[bytes] = []
        """Serialised, which takes less memory."""
        self._restarted = 0
        self.time_remaining = time_left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, data: bytes) -> None:
        """Translate one GenerateEvent. Results are kept until `end`: the call has one status, so it is known only then."""
        event = generation_pb2.GenerateEvent.FromString(data)
        match event.WhichOneof("event"):
            case "admitted":
                self._admitted(event.admitted.stamp)
            case "tokens" if not self._restarted:
                for run in event.tokens.runs:
                    await self._chunk(run)
            case "restarted":
                self._restarted = self._restarted or event.restarted.sequence
            case "finished":
                self._result(event.finished)
            case "failed":
                self._result(event.failed)

    async def end(self) -> None:
        """Write the last messages, one for each item. Raises the error of a failed item.

        Raises Abandoned if an item was restarted with other tokens than were sent: this protocol cannot take tokens back.
        """
        for data in self._completes():
            await self._context.write(data)

    async def write_response(self, data: bytes) -> None:
        """Translate a GenerateResponse."""
        self._take(generation_pb2.GenerateResponse.FromString(data))
        await self.end()

    # The parsed messages of these two are freed before the next write waits for its reader.

    def _take(self, response: generation_pb2.GenerateResponse) -> None:
        self._admitted(response.stamp)
        for result in response.results:
            self._result(result)

    def _completes(self) -> list[bytes]:
        results = [types_pb2.Result.FromString(data) for data in self._results]
        for result in results:
            if result.HasField("status"):
                raise errors.from_status(result.status)
        if self._restarted:
            why = "was answered anew after a crash, with other tokens than were sent; the journal has the whole"
            raise errors.Abandoned(f"sequence {self._restarted} {why}")
        self._set_trailers(results)
        results.sort(key=lambda result: result.sequence)
        completes = [_complete(result.output, result.sequence - self._stamp.first_sequence) for result in results]
        return [vllm.GenerateResponse(complete=complete).SerializeToString() for complete in completes]

    def _result(self, result: types_pb2.Result) -> None:
        data = result.SerializeToString()
        self._results.append(data)
        self._account.add(len(data))

    def _admitted(self, stamp: types_pb2.Stamp) -> None:
        self._stamp = stamp
        self._set_trailers(())

    def _set_trailers(self, results: Sequence[types_pb2.Result]) -> None:
        receipts = [result.receipt.SerializeToString() for result in results if result.HasField("receipt")]
        if len(receipts) > RECEIPTS_MAX or sum(map(len, receipts)) > RECEIPTS_BYTES_MAX:
            receipts = []
        stamp = (STAMP_METADATA, self._stamp.SerializeToString())
        self._context.set_trailing_metadata((stamp, *((RECEIPT_METADATA, receipt) for receipt in receipts)))

    async def _chunk(self, run: generation_pb2.TokenRun) -> None:
        chunk = vllm.GenerateStreamChunk(
            token_ids=run.token_ids,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=run.first_token + len(run.token_ids),
            output_logprobs=_logprobs(run.token_ids, run.logprobs),
            index=run.sequence - self._stamp.first_sequence,
        )
        await self._context.write(vllm.GenerateResponse(chunk=chunk))


def _complete(output: types_pb2.Output, index: int) -> vllm.GenerateComplete:
    made = vllm.GenerateComplete(
        output_ids=output.token_ids,
        finish_reason="length" if output.finish_reason == types_pb2.FINISH_REASON_LENGTH else "stop",
        prompt_tokens=output.prompt_tokens,
        completion_tokens=len(output.token_ids),
        cached_tokens=output.cached_tokens,
        output_logprobs=_logprobs(output.token_ids, output.logprobs),
        index=index,
    )
    if output.finish_reason == types_pb2.FINISH_REASON_STOP_STRING:
        made.matched_stop_str = output.matched_stop
    elif output.finish_reason == types_pb2.FINISH_REASON_STOP_TOKEN:
        made.matched_token_id = output.token_ids[-1]
    return made


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs]) -> vllm.OutputLogProbs | None:
    """None if no logprobs were requested."""
    if not logprobs:
        return None
    tops = [vllm.TopLogProbs(values=[t.logprob for t in p.top], token_ids=[t.token_id for t in p.top]) for p in logprobs]
    return vllm.OutputLogProbs(token_logprobs=[p.logprob for p in logprobs], token_ids=token_ids, top_logprobs=tops)


# ---- the service


class IssuedTokenizers:
    """Which tokenizer each gateway was given last.

    A gateway asks for the tokenizer once, on the connection on which it generates, and keeps it until it ends. Connections
    over a unix socket cannot be told apart.
    """

    def __init__(self) -> None:
        self._by_peer: OrderedDict[str, str] = OrderedDict()
        """Of the GATEWAYS_MAX newest connections."""
        self._all: set[str] = set()

    def issue(self, peer: str, tokenizer: str) -> None:
        self._by_peer[peer] = tokenizer
        self._by_peer.move_to_end(peer)
        if len(self._by_peer) > GATEWAYS_MAX:
            self._by_peer.popitem(last=False)
        self._all.add(tokenizer)

    def differs(self, peer: str, running: str | None) -> bool:
        """Whether this connection was given another tokenizer than the running one."""
        return running is not None and self._by_peer.get(peer, running) != running

    def may_differ(self, peer: str, running: str | None) -> bool:
        """Whether this connection's token ids may be those of another tokenizer.

        A connection that was given none may belong to any gateway that was given one and has reconnected.
        """
        if peer in self._by_peer:
            return self.differs(peer, running)
        return running is not None and not self._all <= {running}


class VllmServicer(vllm_grpc.VllmEngineServicer):  # type: ignore[misc]  # the package has no types for it
    """The RPCs that a gateway calls."""

    def __init__(self, generation: GenerationServicer, pipeline: Pipeline, settings: Settings) -> None:
        self._generation = generation
        self._pipeline = pipeline
        self._items_max = settings.batch_items_max
        self._timeout_seconds = settings.vllm_timeout_seconds
        self._started = time.monotonic()
        self._issued = IssuedTokenizers()
        self._running: defaultdict[tuple[str, str], set[asyncio.Future[None]]] = defaultdict(set)
        """By tenant and request id, which need not be unique."""

    # Writes its messages itself, as Generation does.
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
        seconds = remaining(context)
        deadline = time.monotonic() + min(self._timeout_seconds, self._timeout_seconds if seconds is None else seconds)
        ours = self._translated(request, context.peer())
        with self._generation.held.account(stream=request.stream) as account:
            tokens = len(request.tokenized.input_ids)
            answer: Any = GatewayAnswer(context, tokens, lambda: deadline - time.monotonic(), account)
            try:
                if request.stream:
                    await self._generation.stream(ours, answer, account)
                    ending = answer.end()
                else:
                    ending = answer.write_response(await self._generation.answer(ours, answer, account))
            except errors.InvalidRequest as error:
                raise with_gateway_names(error) from error
            if not await written(ending, lost=account.lost) and account.error is not None:
                raise account.error

    def _translated(self, request: vllm.GenerateRequest, peer: str) -> generation_pb2.GenerateRequest:
        """Raises what refuses the request, and counts it."""
        try:
            if self._issued.may_differ(peer, self._tokenizer()):
                raise errors.FingerprintChanged(RESTART_GATEWAY)
            return request_of(request, self._items_max)
        except errors.OstinatoError as error:
            self._pipeline.observer.refused(error)
            raise

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        for request_id in request.request_ids:
            for running in self._running.get((caller().tenant, request_id), ()):
                running.cancel()
        return vllm.AbortResponse()

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        faults = {
            "no engine is connected": self._pipeline.engine is None,
            "draining": self._pipeline.core.draining,
            "the journal is full": self._pipeline.journal.full,
            RESTART_GATEWAY: self._issued.differs(context.peer(), self._tokenizer()),
        }
        why = next((why for why, found in faults.items() if found), "")
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
            active_requests=sum(self._pipeline.load()),
            uptime_seconds=time.monotonic() - self._started,
            data_parallel_size=1,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        running, waiting = self._pipeline.load()
        load = vllm.SchedulerLoad(num_running_reqs=running, num_waiting_reqs=waiting, num_total_reqs=running + waiting)
        return vllm.GetLoadsResponse(version=__version__, dp_rank_count=1, loads=[load])

    async def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[common.GetTokenizerChunk]:
        name = self._model().fingerprint.fields["tokenizer"]
        async with self._pipeline.preparing.place(caller().tenant, TOKENIZER_COST):  # the service packs it in those threads
            files = await self._pipeline.link.tokenizer(remaining(context))
        self._issued.issue(context.peer(), name)
        for start in range(0, len(files), CHUNK_BYTES):
            last = start + CHUNK_BYTES >= len(files)
            digest = hashlib.sha256(files).hexdigest() if last else ""
            yield common.GetTokenizerChunk(data=files[start : start + CHUNK_BYTES], sha256=digest)

    def _tokenizer(self) -> str | None:
        """The running tokenizer, as the fingerprint names it. None without an engine."""
        engine = self._pipeline.engine
        return engine.model.fingerprint.fields["tokenizer"] if engine is not None else None

    def _model(self) -> types_pb2.Model:
        return self._pipeline.connected_engine().model

    async def Embed(self, request: Any, context: Context) -> Never:
        raise errors.NotBuilt("only text generation is supported")

    FlushCache = StartProfile = StopProfile = Embed

    async def SubscribeKvEvents(self, request: Any, context: Context) -> Never:
        raise errors.NotBuilt("cache events are not published; GetLoads has the load")
