"""What the sidecar costs: the scripted engine driven over Execute by itself, and through the sidecar."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import grpc

from ostinato.client import Client
from ostinato.v1 import engine_pb2, engine_pb2_grpc, types_pb2

from tests.bench.loop import Round, closed_loop, middle
from tests.bench.table import Table, median, millis
from tests.pair import Pair, Program

PROMPT, TOKENS = "Shanghai is", 16
CLIENTS = (1, 16, 64)


class Direct:
    """Drives a service as a sidecar does, but orders, journals and proves nothing."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub: Any = engine_pb2_grpc.EngineStub(self._channel)
        self._ends: dict[int, asyncio.Future[None]] = {}
        self._waiting: deque[engine_pb2.Submit] = deque()
        self._bell = asyncio.Event()
        self._last = 0

    async def __aenter__(self) -> Self:
        item = types_pb2.Item(text=PROMPT, parameters=types_pb2.Parameters(max_new_tokens=TOKENS, ignore_eos=True))
        prepared = await self._stub.Prepare(engine_pb2.PrepareRequest(items=[item]), wait_for_ready=True)
        self._prepared = prepared.items[0]
        self._stream = self._stub.Execute()
        await self._stream.write(engine_pb2.ExecuteRequest(hello=engine_pb2.Hello(log_id="0" * 32, writer="bench", epoch=1)))
        await self._stream.read()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self._channel.close()

    async def run(self, *, stream: bool) -> None:
        """One item, to its end."""
        self._last += 1
        end = self._ends[self._last] = asyncio.get_running_loop().create_future()
        self._waiting.append(
            engine_pb2.Submit(
                run_id=self._last,
                purpose=engine_pb2.PURPOSE_PRIMARY,
                sequence=self._last,
                attempt=1,
                token_ids=self._prepared.token_ids,
                parameters=self._prepared.parameters,
                seed=self._last,
                stream=stream,
            )
        )
        self._bell.set()
        await end

    async def _write(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            request = engine_pb2.ExecuteRequest(submits=self._waiting)
            self._waiting.clear()
            await self._stream.write(request)

    async def _read(self) -> None:
        while True:
            for event in (await self._stream.read()).events:
                if event.HasField("finished"):
                    self._ends.pop(event.run_id).set_result(None)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have an item made, or something to compare that with."""

    name: str
    request: Callable[[], Awaitable[object]]
    service: Program
    sidecar: Program | None = None
    items: int = 1
    """In a request."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One round: its loop, and processor seconds an item."""

    loop: Round
    sidecar: float | None
    service: float
    client: float


async def measure(rounds: int, seconds: float) -> Table:
    """Every way, in turn."""
    with Pair() as through, Pair() as alone:
        await asyncio.to_thread(through.start)
        bare: Program = await asyncio.to_thread(alone.start_service)
        await asyncio.to_thread(bare.wait_for, "serving")
        assert through.service is not None and through.sidecar is not None
        programs = through.service, through.sidecar
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(Client(through.target))
            direct = await stack.enter_async_context(Direct(alone.engine_address))
            ways = (
                Way("engine alone, not streamed", lambda: direct.run(stream=False), bare),
                Way("engine alone, streamed", lambda: direct.run(stream=True), bare),
                Way("sidecar, Tokenize only", lambda: client.tokenize(PROMPT), *programs),
                Way("sidecar, Generate", lambda: unary(client, 1), *programs),
                Way("sidecar, Generate, batches of 8", lambda: unary(client, 8), *programs, items=8),
                Way("sidecar, GenerateStream", lambda: _streamed(client), *programs),
            )
            return _table(await _in_turn(ways, rounds, seconds))


async def _in_turn(ways: Sequence[Way], rounds: int, seconds: float) -> dict[tuple[str, int], list[Seen]]:
    seen: dict[tuple[str, int], list[Seen]] = {}
    for way in ways:
        await closed_loop(8, 0.3, way.request)
    for _ in range(rounds):
        for clients in CLIENTS:
            for way in ways:
                seen.setdefault((way.name, clients), []).append(await one_round(way, clients, seconds))
    return seen


Loop = Callable[[int, float, Callable[[], Awaitable[object]]], Awaitable[Round]]


async def one_round(way: Way, clients: int, seconds: float, run: Loop = closed_loop) -> Seen:
    """A loop of one way. `clients` is whatever the loop takes first."""
    programs = [program for program in (way.service, way.sidecar) if program is not None]
    before, began, client = [processor_seconds(program) for program in programs], time.perf_counter(), time.process_time()
    loop = await run(clients, seconds, way.request)
    client = time.process_time() - client
    items = loop.per_second * (time.perf_counter() - began) * way.items
    service, *sidecar = ((processor_seconds(each) - first) / items for each, first in zip(programs, before, strict=True))
    return Seen(replace(loop, per_second=loop.per_second * way.items), sidecar[0] if sidecar else None, service, client / items)


def processor_seconds(program: Program) -> float:
    """That it has used, in all of its threads."""
    fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _table(seen: dict[tuple[str, int], list[Seen]]) -> Table:
    note = (
        f"The scripted engine, {TOKENS} tokens an item, one item in a request unless it says otherwise; latencies are those of "
        "requests. Tokenize passes through both programs as Generate's preparation does, and is neither numbered nor recorded. "
        "The last two columns are processor time."
    )
    columns = ["", "clients", "items/s", "p50 ms", "p99 ms", "sidecar ms/item", "service ms/item"]
    table = Table("Cost of the sidecar, end to end", columns, note)
    for name, clients in sorted(seen, key=lambda case: case[1]):
        rounds = seen[name, clients]
        sidecar = [each.sidecar for each in rounds if each.sidecar is not None]
        processor = [millis(median(sidecar)) if sidecar else "", millis(median([each.service for each in rounds]))]
        table.rows.append([name, str(clients), *middle([each.loop for each in rounds]).cells(), *processor])
    return table


async def unary(client: Client, items: int) -> None:
    """One request."""
    await client.generate([PROMPT] * items, max_new_tokens=TOKENS, ignore_eos=True)


async def _streamed(client: Client) -> None:
    async for _ in client.stream(PROMPT, max_new_tokens=TOKENS, ignore_eos=True):
        pass
