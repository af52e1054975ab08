"""The door: what the sidecar adds to a request, and the most that it passes on; beside an engine alone and a bare proxy.

On a host without network: Python 3.11 or newer, and the packages that `table` names. `TMPDIR=/dev/shm` keeps the journals of
both sides off the disk.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc

from ostinato.client import Client
from ostinato.v1 import engine_pb2, engine_pb2_grpc, types_pb2

from tests.bench.table import Options, Seen, Table, Way, closed_loop, count, median, middle, millis, one_round, open_loop
from tests.hop import proved
from tests.pair import ROOT, Pair, Program

PROMPT, TOKENS = "Shanghai is", 16
CLIENTS = (1, 16, 64)
PACES = (50, 200, 500)
BATCH, FAN_TOKENS = 64, 256
"""Items of a batch; tokens of an item of a streamed one."""
GOALS = {("single items", 1): 1.5, ("single items", 64): 1.3, ("batches of 64", 8): 3.0}
"""What the sidecar may take of processor time, as a multiple of the bare proxy's."""
BARE, BACK, FRONT = "bare proxy, ", "back.sock", "front.sock"
AUDIT_RATES, AUDIT_CLIENTS = ("0", "0.01", "0.1"), (1, 16)

Case = tuple[Way, int]
"""With the number of its clients."""


class Direct:
    """Drives a service as a sidecar does, but orders, journals and proves nothing."""

    def __init__(self, address: str, program: Program, *, bare: bool = False) -> None:
        """`bare`: a service that asks for no proof."""
        self.program, self._proves = program, not bare
        self._address, self._channel = address, grpc.aio.insecure_channel(address)
        self._ends: dict[int, asyncio.Future[None]] = {}
        self._waiting: deque[engine_pb2.Submit] = deque()
        self._bell = asyncio.Event()
        self._last = 0

    async def __aenter__(self) -> Self:
        item = types_pb2.Item(text=PROMPT, parameters=types_pb2.Parameters(max_new_tokens=TOKENS, ignore_eos=True))
        stub: Any = await proved(self._channel, self._address) if self._proves else engine_pb2_grpc.EngineStub(self._channel)
        prepared = await stub.Prepare(engine_pb2.PrepareRequest(items=[item]), wait_for_ready=True)
        self._prepared = prepared.items[0]
        self._stream = stub.Execute()
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


async def overhead(options: Options) -> list[Table]:
    """The scripted engine driven over Execute by itself, and through the sidecar, by several numbers of clients."""
    async with AsyncExitStack() as stack:
        through, direct = await _pair(stack, ROOT), await _engine_alone(stack)
        client = await stack.enter_async_context(Client(through.target))
        programs = through.service, through.sidecar
        ways = (
            Way("engine alone, not streamed", partial(direct.run, stream=False), direct.program),
            Way("engine alone, streamed", partial(direct.run, stream=True), direct.program),
            Way("sidecar, Tokenize only", lambda: client.tokenize(PROMPT), *programs),
            Way("sidecar, Generate", partial(unary, client, 1), *programs),
            Way("sidecar, Generate, batches of 8", partial(unary, client, 8), *programs, items=8),
            Way("sidecar, GenerateStream", partial(_streamed, client, 1, TOKENS), *programs),
        )
        seen = await _in_turn([(way, clients) for clients in CLIENTS for way in ways], options)
    note = (
        f"The scripted engine, {TOKENS} tokens an item, one item in a request unless it says otherwise; latencies are those of "
        "requests. Tokenize passes both programs as Generate's preparation does, and is neither numbered nor recorded. The "
        "last two columns are processor time."
    )
    columns = ["", "clients", "items/s", "p50 ms", "p99 ms", "sidecar ms/item", "service ms/item"]
    table = Table("Cost of the sidecar, end to end", columns, note)
    for (name, clients), rounds in seen.items():
        costs = [millis(_cost(rounds, "front")), millis(_cost(rounds, "service"))]
        table.rows.append([name, str(clients), *middle([each.loop for each in rounds]).cells(), *costs])
    return [table]


async def door(options: Options) -> list[Table]:
    """At a given pace, at the most that passes, and beside the bare proxy; all in turn, in the same rounds."""
    async with AsyncExitStack() as stack:
        pair, direct = await _pair(stack, ROOT), await _engine_alone(stack)
        ours = await _cases(stack, pair.target, "", pair.service, pair.sidecar)
        back, front, target = await _bare_proxy(stack)
        bare = await _cases(stack, target, BARE, back, front)
        echo = await stack.enter_async_context(Direct(target.removesuffix(FRONT) + BACK, back, bare=True))
        alone = [Way("engine", partial(each.run, stream=False), each.program) for each in (direct, echo)]
        for way in alone:
            await closed_loop(8, 0.3, way.request)
        paced = await _paces(alone, [ours[0][0], bare[0][0]], options)
        cases = [*ours, *bare]
        if options.beside is not None:
            other = await _pair(stack, options.beside)
            cases += await _cases(stack, other.target, "beside, ", other.service, other.sidecar)
        seen = await _in_turn(cases, options)
    return [paced, _saturation(seen), _yardstick(seen)]


async def audits(options: Options) -> list[Table]:
    """The same load on three pairs that differ in their audit rate only; in every other round in the other order."""
    async with AsyncExitStack() as stack:
        cases = list[Case]()
        for rate in AUDIT_RATES:
            pair = await _pair(stack, ROOT, "--audit-rate", rate)
            client = await stack.enter_async_context(Client(pair.target))
            way = Way(rate, partial(unary, client, 1), pair.service, pair.sidecar)
            await closed_loop(4, 0.5, way.request)
            cases += [(way, clients) for clients in AUDIT_CLIENTS]
        seen = await _in_turn(cases, options)
    note = (
        f"The scripted engine, one item of {TOKENS} tokens in a request, unseeded; each rate is a pair of its own, and all "
        "three take turns. The last three columns are against the same round without audits, the median of all rounds; "
        "processor time is that of both programs."
    )
    columns = ["audit rate", "clients", "items/s", "p50 ms", "p99 ms", "items/s", "p99 ms", "processor"]
    table = Table("Cost of audits", columns, note)
    for (rate, clients), rounds in sorted(seen.items(), key=lambda case: case[0][1]):
        pairs = list(zip(rounds, seen[AUDIT_RATES[0], clients], strict=True))
        against = [
            f"{(median([some.loop.per_second / none.loop.per_second for some, none in pairs]) - 1) * 100:+.1f} %",
            f"{median([some.loop.p99 - none.loop.p99 for some, none in pairs]) * 1000:+.2f}",
            f"{(median([(some.front + some.service) / (none.front + none.service) for some, none in pairs]) - 1) * 100:+.1f} %",
        ]
        cells = middle([each.loop for each in rounds]).cells()
        table.rows.append([rate, str(clients), *cells, *(["", "", ""] if rate == AUDIT_RATES[0] else against)])
    return [table]


async def _pair(stack: AsyncExitStack, root: Path, *flags: str) -> Pair:
    pair = stack.enter_context(Pair(root=root, sidecar=flags))
    await asyncio.to_thread(pair.start)
    return pair


async def _engine_alone(stack: AsyncExitStack) -> Direct:
    """Another service, driven directly."""
    pair = stack.enter_context(Pair())
    service: Program = await asyncio.to_thread(pair.start_service)
    await asyncio.to_thread(service.wait_for, "serving")
    return await stack.enter_async_context(Direct(pair.engine_address, service))


async def _bare_proxy(stack: AsyncExitStack) -> tuple[Program, Program, str]:
    """The back, the front, and where the front listens."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ostinato-"))
    back, front, programs = f"unix:{folder}/{BACK}", f"unix:{folder}/{FRONT}", list[Program]()
    for arguments in (("back", back), ("front", back, front, f"{folder}/bare.sqlite")):
        programs.append(Program("tests.bench.bare", arguments))
        stack.callback(programs[-1].kill)
        await asyncio.to_thread(programs[-1].wait_for, "listening")
    return programs[0], programs[1], front


async def _cases(stack: AsyncExitStack, target: str, mark: str, service: Program | None, front: Program | None) -> list[Case]:
    """What is sent to a target, and by how many clients."""
    assert service is not None
    client = await stack.enter_async_context(Client(target))
    single = Way(f"{mark}single items", partial(unary, client, 1), service, front)
    batches = Way(f"{mark}batches of {BATCH}", partial(unary, client, BATCH), service, front, items=BATCH)
    cases = [(single, 64), (single, 1), (batches, 8)]
    if mark != BARE:
        streamed = partial(_streamed, client, BATCH, FAN_TOKENS)
        cases.append((Way(f"{mark}streams of {BATCH} items", streamed, service, front, items=BATCH), 4))
    for way, _ in cases:
        await closed_loop(8, 0.3, way.request)
    return cases


async def unary(client: Client, items: int) -> None:
    """One request."""
    await client.generate([PROMPT] * items, max_new_tokens=TOKENS, ignore_eos=True)


async def _streamed(client: Client, items: int, tokens: int) -> None:
    async for _ in client.stream([PROMPT] * items, max_new_tokens=tokens, ignore_eos=True):
        pass


async def _in_turn(cases: Sequence[Case], options: Options) -> dict[tuple[str, int], list[Seen]]:
    """The rounds of each case by name and clients; every second round in the other order."""
    seen: dict[tuple[str, int], list[Seen]] = {(way.name, clients): [] for way, clients in cases}
    for number in range(options.rounds):
        for way, clients in cases[:: -1 if number % 2 else 1]:
            seen[way.name, clients].append(await one_round(way, clients, options.seconds))
    return seen


async def _paces(alone: Sequence[Way], through: Sequence[Way], options: Options) -> Table:
    """What is added to the engine alone, by the sidecar and by the bare proxy to its own back."""
    note = (
        f"One item of {TOKENS} tokens in a request; requests leave at random moments, from one client. What is added is the "
        "difference of the medians: by the sidecar to the scripted engine alone, by the bare proxy to its back alone."
    )
    columns = ["requests/s", "engine alone p50 ms", "p99 ms", "added p50 ms", "added p99 ms", "sidecar ms/item"]
    columns += ["bare proxy added p50 ms", "added p99 ms", "ms/item"]
    table = Table("What the sidecar adds", columns, note)
    for per_second in PACES:
        seen = [list[Seen]() for _ in range(4)]
        for _ in range(options.rounds):
            for own, way in zip(seen, [*alone, *through], strict=True):
                own.append(await one_round(way, per_second, options.seconds, open_loop))
        engine, echo, sidecar, proxy = (middle([each.loop for each in own]) for own in seen)
        cells = [millis(engine.p50), millis(engine.p99)]
        for less, more, own in ((engine, sidecar, seen[2]), (echo, proxy, seen[3])):
            cells += [millis(more.p50 - less.p50), millis(more.p99 - less.p99), millis(_cost(own, "front"))]
        table.rows.append([str(per_second), *cells])
    return table


def _saturation(seen: dict[tuple[str, int], list[Seen]]) -> Table:
    note = (
        f"{TOKENS} tokens an item; {FAN_TOKENS} where they are streamed, each token as soon as it is made. Processor time is "
        "that of all three programs, the client's with them."
    )
    columns = ["", "clients", "items/s", "tokens/s", "sidecar ms/item", "service ms/item", "client ms/item", "all, ms/item"]
    table = Table("The most that passes", columns, note)
    for (name, clients), rounds in seen.items():
        items, tokens = median([each.loop.per_second for each in rounds]), FAN_TOKENS if "streams" in name else TOKENS
        costs = [_cost(rounds, program) for program in ("front", "service", "client")]
        table.rows.append([name, str(clients), count(items), count(items * tokens), *map(millis, costs), millis(sum(costs))])
    return table


def _yardstick(seen: dict[tuple[str, int], list[Seen]]) -> Table:
    note = "Processor time of the sidecar, and of the front of a proxy with the same hops and commits and no features."
    columns = ["", "clients", "p50 ms", "bare p50 ms", "items/s", "bare items/s", "ms/item", "bare ms/item", "ratio", "goal"]
    table = Table("Beside the bare proxy", columns, note)
    for (name, clients), goal in GOALS.items():
        both = [seen[mark + name, clients] for mark in ("", BARE)]
        loops, costs = [middle([each.loop for each in own]) for own in both], [_cost(own, "front") for own in both]
        cells = [*(millis(loop.p50) for loop in loops), *(count(loop.per_second) for loop in loops), *map(millis, costs)]
        table.rows.append([name, str(clients), *cells, f"{costs[0] / costs[1]:.2f}", f"{goal:g}"])
    return table


def _cost(rounds: Sequence[Seen], program: str) -> float:
    """Processor seconds an item."""
    return median([getattr(each, program) for each in rounds])
