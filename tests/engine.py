"""A service that behaves, except for the faults that a test queues."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

from ostinato.digest import fingerprint_digest, model_digest
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from ostinato.v1.engine_pb2 import RunEvent, Submit
from serving.hop import PEER_SUFFIX, ServiceEnd
from serving.server import Unix

Wire = Any
"""A message of the service, or bytes that are none."""

FIELDS = {"engine": "fake", "model": "fake"}
NEW_TOKENS, VOCABULARY = 4, 256


def description(**changes: Any) -> engine_pb2.DescribeResponse:
    fingerprint = types_pb2.Fingerprint(fields=FIELDS, digest=fingerprint_digest(FIELDS))
    given: dict[str, Any] = {
        "name": "fake",
        "engine": "fake",
        "vocabulary_size": VOCABULARY,
        "grade": types_pb2.GRADE_EXACT,
    } | changes
    capacity = given.pop("capacity", engine_pb2.Capacity(runs=4, kv_blocks=64, block_tokens=16))
    return engine_pb2.DescribeResponse(model=types_pb2.Model(fingerprint=fingerprint, **given), capacity=capacity)


def welcome(**changes: Any) -> engine_pb2.ExecuteResponse:
    return engine_pb2.ExecuteResponse(welcome=engine_pb2.Welcome(description=description(**changes)))


def prepared(item: types_pb2.Item) -> engine_pb2.PreparedItem:
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    return engine_pb2.PreparedItem(token_ids=item.text.encode(), parameters=parameters, kv_tokens=16, result_bytes=1024)


def prepare(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    return engine_pb2.PrepareResponse(items=map(prepared, request.items), model_digest=model_digest(FIELDS))


def answer(submit: Submit) -> list[int]:
    """Equal inputs have equal answers."""
    return [(sum(submit.token_ids) + index) % VOCABULARY for index in range(NEW_TOKENS)]


def started(submit: Submit) -> RunEvent:
    return RunEvent(run_id=submit.run_id, started=engine_pb2.Started())


def tokens(submit: Submit, first_token: int, *ids: int) -> RunEvent:
    return RunEvent(run_id=submit.run_id, tokens=engine_pb2.RunTokens(first_token=first_token, token_ids=ids))


def finished(submit: Submit, **changes: Any) -> RunEvent:
    made: dict[str, Any] = {
        "token_ids": answer(submit),
        "finish_reason": types_pb2.FINISH_REASON_LENGTH,
        "seed": submit.seed,
        "engine_seed": submit.seed,
        "grade": types_pb2.GRADE_EXACT,
    }
    return RunEvent(run_id=submit.run_id, finished=engine_pb2.Finished(output=types_pb2.Output(**(made | changes))))


def failed(submit: Submit, *details: any_pb2.Any, code: int = 13) -> RunEvent:
    return RunEvent(run_id=submit.run_id, failed=status_pb2.Status(code=code, message="no", details=details))


def behave(submit: Submit) -> Sequence[Wire]:
    """What a good service says of a run."""
    said = [started(submit), *([tokens(submit, 0, *answer(submit))] if submit.stream else []), finished(submit)]
    return [frame(*said)]


def frame(*events: RunEvent) -> engine_pb2.ExecuteResponse:
    return engine_pb2.ExecuteResponse(events=events)


CLOSE = object()
"""In place of a message: the stream ends here."""


@dataclass
class Fake:
    """Behaves, except for the faults that a test queues."""

    welcomes: list[Wire] = field(default_factory=list)
    """Said once each, in place of Welcome."""
    runs: list[Callable[[Submit], Sequence[Wire]]] = field(default_factory=list)
    """Done once each, to the runs that are submitted next."""
    prepares: list[Callable[[engine_pb2.PrepareRequest], Wire]] = field(default_factory=list)
    hellos: list[engine_pb2.Hello] = field(default_factory=list)
    """Of all streams, in order."""
    submits: list[Submit] = field(default_factory=list)

    async def execute(self, requests: AsyncIterator[engine_pb2.ExecuteRequest], context: Any) -> AsyncIterator[Wire]:
        self.hellos.append((await anext(requests)).hello)
        yield self.welcomes.pop(0) if self.welcomes else welcome()
        async for request in requests:
            for asked in request.prepares:
                response = self._prepared(asked)
                response.prepare_id = asked.prepare_id
                yield engine_pb2.ExecuteResponse(prepared=[response])
            for submit in request.submits:
                self.submits.append(submit)
                for message in (self.runs.pop(0) if self.runs else behave)(submit):
                    if message is CLOSE:
                        return
                    yield message

    async def prepare(self, request: engine_pb2.PrepareRequest, context: Any) -> Wire:
        return self._prepared(request)

    def _prepared(self, request: engine_pb2.PrepareRequest) -> Wire:
        return (self.prepares.pop(0) if self.prepares else prepare)(request)

    async def tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> Wire:
        return b"\xff"


@contextlib.asynccontextmanager
async def served(fake: Fake, address: str) -> AsyncIterator[None]:
    """The fake, on a socket, until the end."""

    def serialised(message: Wire) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    server = grpc.aio.server()
    hop = ServiceEnd()
    engine_pb2_grpc.add_HopServicer_to_server(hop, server)
    handlers: dict[str, Any] = {
        "Execute": grpc.stream_stream_rpc_method_handler(
            fake.execute, request_deserializer=engine_pb2.ExecuteRequest.FromString, response_serializer=serialised
        ),
        "Prepare": grpc.unary_unary_rpc_method_handler(
            fake.prepare, request_deserializer=engine_pb2.PrepareRequest.FromString, response_serializer=serialised
        ),
        "Tokenize": grpc.unary_unary_rpc_method_handler(
            fake.tokenize, request_deserializer=generation_pb2.TokenizeRequest.FromString, response_serializer=serialised
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ostinato.v1.Engine", handlers),))
    server.add_insecure_port(address)
    await hop.hand_out(Unix("--listen", Path(address.removeprefix("unix:") + PEER_SUFFIX)).listening())
    await server.start()
    try:
        yield
    finally:
        hop.close()
        await server.stop(0)
