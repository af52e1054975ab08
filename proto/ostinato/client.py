"""The asyncio client: one method for each RPC, Python values in, the contract's messages out, `ostinato.errors` raised.

What is safe to send twice is tried again while the sidecar, its engine or room in its queue is missing: pure reads, and batches
with an idempotency key; until the timeout, or without one for a few seconds (reads) or a minute (keys). Anything else is
sent once, because a Generate that is sent again is another request with other numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self, Unpack

import grpc

from ostinato import errors, requests
from ostinato.joined import joined
from ostinato.patience import KEYED_SECONDS, PAUSE_SECONDS, PAUSE_SECONDS_MAX, READ_SECONDS, Patience
from ostinato.requests import GradeName, Prompts, Sampling
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2
from ostinato.wire import Wire

DEFAULT_TARGET = "localhost:7001"
DEFAULT_RESPONSE_BYTES = 4 * 2**20
"""What gRPC receives unless told otherwise."""


class Client:
    """A sidecar at `target`: "host:port", "https://host:port" or "unix:/path". Belongs to one event loop:
    `async with Client(...) as client`.

    `credentials`: for TLS with files of your own, `ostinato.tls(...)`; https:// alone trusts whom everybody trusts. `token`: of
    the caller; it travels with every call, so over a network only under TLS. `max_response_bytes`: the largest answer to
    receive; the sidecar refuses a batch that could exceed it before doing any work.

    Every method takes a `timeout` in seconds, which travels as the call's deadline (None: no deadline), and raises
    `errors.OstinatoError`; a bad argument is a TypeError or ValueError that names it. Cancelling the task, or closing the
    iterator, ends the call.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        max_response_bytes: int = DEFAULT_RESPONSE_BYTES,
    ) -> None:
        self.target = target
        bytes_max = requests.integer("max_response_bytes", max_response_bytes, 1, 2**31 - 1)
        self._wire = Wire(target, credentials, bytes_max, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call and connection. A later call opens them again."""
        await self._wire.close()

    async def generate(
        self,
        prompts: Prompts | generation_pb2.GenerateRequest,
        *,
        key: str = "",
        request_id: str = "",
        required_grade: GradeName | None = None,
        verify: bool = False,
        timeout: float | None = None,
        **parameters: Unpack[Sampling],
    ) -> generation_pb2.GenerateResponse:
        """All outcomes of a batch, in the order of its prompts. A failed item raises nothing: its result has a status.

        With a `key`, the same call again returns the recorded answer, and the client makes it again by itself while the sidecar
        is away or full. Without one, a lost connection or an expired `timeout` ends the work. With `verify`, each answer was
        made twice, and its result has the verdict in `comparison`.
        """
        request = requests.batch(prompts, key, request_id, required_grade, parameters, verify=verify)
        bound = KEYED_SECONDS if request.idempotency_key else 0.0
        return await self._wire.ask(self._wire.stubs.generation.Generate, request, timeout, bound)

    def stream(
        self,
        prompts: Prompts | generation_pb2.GenerateRequest,
        *,
        key: str = "",
        request_id: str = "",
        required_grade: GradeName | None = None,
        verify: bool = False,
        timeout: float | None = None,
        **parameters: Unpack[Sampling],
    ) -> AsyncGenerator[generation_pb2.GenerateEvent, None]:
        """As `generate`, event by event: admitted, tokens, restarted, and one finished or failed for each item.

        With a `key` a lost stream is joined again and goes on behind what was told: nothing comes twice, and tokens that
        nobody streamed meanwhile come in one run before their item's finished.
        """
        request = requests.batch(prompts, key, request_id, required_grade, parameters, verify=verify)
        if request.idempotency_key:
            return joined(self._wire, request, requests.seconds(timeout))
        return self._wire.read(self._wire.stubs.generation.GenerateStream, request, timeout)

    async def cancel(
        self, first: int | None = None, last: int | None = None, *, key: str = "", timeout: float | None = None
    ) -> generation_pb2.CancelResponse:
        """Ends what has not ended of the items `first` to `last` (`first` alone without it), or of the batch with this key."""
        if _by_key("first", first, key):
            request = generation_pb2.CancelRequest(idempotency_key=key)
        else:
            request = generation_pb2.CancelRequest(range=requests.span(first, last))
        return await self._wire.ask(self._wire.stubs.generation.Cancel, request, timeout)

    async def model(self, *, timeout: float | None = None) -> types_pb2.Model:
        """What is running, its limits, its fingerprint and the grade it has earned."""
        request = generation_pb2.GetModelRequest()
        return (await self._wire.ask(self._wire.stubs.generation.GetModel, request, timeout, READ_SECONDS)).model

    async def tokenize(self, prompts: Prompts, *, timeout: float | None = None) -> list[list[int]]:
        """For each prompt the token ids that `generate` would make of it."""
        request = generation_pb2.TokenizeRequest(items=requests.items(prompts))
        response = await self._wire.ask(self._wire.stubs.generation.Tokenize, request, timeout, READ_SECONDS)
        return [list(tokens.ids) for tokens in response.results]

    async def get(
        self, sequence: int | None = None, *, key: str = "", timeout: float | None = None
    ) -> list[sequencer_pb2.ItemRecord]:
        """What the journal holds of one item, or of every item of the batch with this key, ascending."""
        if _by_key("sequence", sequence, key):
            request = sequencer_pb2.GetRequest(idempotency_key=key)
        else:
            request = sequencer_pb2.GetRequest(sequence=requests.integer("sequence", sequence, 1, 2**64 - 1))
        return list((await self._wire.ask(self._wire.stubs.sequencer.Get, request, timeout, READ_SECONDS)).items)

    async def head(self, *, timeout: float | None = None) -> sequencer_pb2.HeadResponse:
        """Where the journal and its writer stand."""
        return await self._wire.ask(self._wire.stubs.sequencer.Head, sequencer_pb2.HeadRequest(), timeout, READ_SECONDS)

    async def report(self, *, confidence: float = 0.0, timeout: float | None = None) -> sequencer_pb2.ReportResponse:
        """Divergence in summary. `confidence`: of its intervals, above 0 and below 1; 0 is the sidecar's choice."""
        request = sequencer_pb2.ReportRequest(confidence=confidence)
        return await self._wire.ask(self._wire.stubs.sequencer.Report, request, timeout, READ_SECONDS)

    def tail(
        self, from_index: int = 1, *, follow: bool = False, payloads: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        """Entries in order of their index, to the head, or with `follow` for ever.

        With `follow` a sidecar that goes away is waited for, and the entries go on where they ended: none is missing, none
        comes twice. Only one that is not there at first is an error.
        """
        from_index = requests.integer("from_index", from_index, 0, 2**64 - 1)
        request = sequencer_pb2.TailRequest(from_index=from_index, follow=follow, payloads=payloads)
        requests.seconds(timeout)
        return self._follow(request, timeout) if follow else self._entries(request, timeout, READ_SECONDS)

    def replay(
        self,
        first: int,
        last: int | None = None,
        *,
        concurrency: int = 0,
        alone: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[sequencer_pb2.ReplayResponse, None]:
        """Runs the completed items `first` to `last` (`first` alone without it) again; a verdict for each, in any order, and
        the sequences of those that were passed over. `ostinato.against` runs them at another sidecar.

        `concurrency`: runs at once, 1 to 64; 0 is the sidecar's choice. `alone`: each with nothing else of the sidecar
        beside it in the engine, whatever it has to wait for.
        """
        concurrency = requests.integer("concurrency", concurrency, 0, 2**32 - 1)
        request = sequencer_pb2.ReplayRequest(range=requests.span(first, last), concurrency=concurrency, alone=alone)
        return self._wire.read(self._wire.stubs.sequencer.Replay, request, timeout)

    async def _entries(
        self, request: sequencer_pb2.TailRequest, timeout: float | None, bound: float = 0.0
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        async with aclosing(self._wire.read(self._wire.stubs.sequencer.Tail, request, timeout, bound)) as responses:
            async for response in responses:
                for entry in response.entries:
                    yield entry

    async def _follow(
        self, request: sequencer_pb2.TailRequest, timeout: float | None
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        patience = Patience(timeout, 0.0)
        await self.head(timeout=timeout)  # a silent Tail does not say whether anybody is there
        pause = PAUSE_SECONDS
        while True:
            try:
                async with aclosing(self._entries(request, patience.left)) as entries:
                    async for entry in entries:
                        request.from_index = entry.header.index + 1
                        pause = PAUSE_SECONDS
                        yield entry
                wait = pause  # a follow never ends by itself: the sidecar is going away
            except errors.OstinatoError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE and not isinstance(error, errors.SlowReader):
                    raise
                wait = error.retry_after or pause
            await asyncio.sleep(min(wait, patience.left or wait))
            pause = min(2 * pause, PAUSE_SECONDS_MAX)


def _by_key(name: str, number: int | None, key: str) -> bool:
    if (number is None) == (key == ""):
        raise TypeError(f"{name}, key: give one of them")
    return number is None
