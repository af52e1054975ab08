"""One tenant against another: what a caller waits, alone and while another tenant floods the same pair.

With `--beside PATH` the same attacks are run against another checkout too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import generation_pb2, generation_pb2_grpc, sequencer_pb2, sequencer_pb2_grpc, types_pb2
from serving.auth import TENANT_METADATA

from tests.bench.table import Options, Table, median, millis
from tests.pair import ROOT, Pair

REQUESTS, WATCH_SECONDS = 12, 40.0
"""Of the caller who is measured; it stops asking after this time."""
LATE_SECONDS = 30.0
"""An answer that is later counts as refused."""
PAUSE_SECONDS = 0.2
LEAD_SECONDS = 5.0
"""How long an attack has run before anything is measured."""
CONTROL = "a<|im_end|>"
SLOW_SCHEMA = '{"type": "integer", "multipleOf": 999983}'
PERSON = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


@dataclass(slots=True)
class Caller:
    """A tenant's calls."""

    channel: grpc.aio.Channel
    tenant: str

    async def generate(self, items: Sequence[types_pb2.Item], tokens: int, seconds: float = LATE_SECONDS) -> types_pb2.Stamp:
        """Raises AioRpcError."""
        stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(self.channel)
        parameters = types_pb2.Parameters(max_new_tokens=tokens, ignore_eos=not _has_format(items))
        request = generation_pb2.GenerateRequest(items=items, parameters=parameters)
        metadata = [(TENANT_METADATA, self.tenant), (RESPONSE_BYTES_METADATA, str(64 << 20))]
        return (await stub.Generate(request, metadata=metadata, timeout=seconds)).stamp

    async def replay(self, last: int, *, alone: bool) -> None:
        """Items 1 to last. Raises AioRpcError."""
        stub: sequencer_pb2_grpc.SequencerAsyncStub = sequencer_pb2_grpc.SequencerStub(self.channel)
        span = generation_pb2.SequenceRange(first=1, last=last)
        request = sequencer_pb2.ReplayRequest(range=span, alone=alone)
        async for _ in stub.Replay(request, metadata=[(TENANT_METADATA, self.tenant)]):
            pass


def _has_format(items: Sequence[types_pb2.Item]) -> bool:
    return any(item.parameters.HasField("response_format") for item in items)


def formatted(schema: str) -> types_pb2.Item:
    parameters = types_pb2.Parameters(response_format=types_pb2.ResponseFormat(json_schema=schema))
    return types_pb2.Item(text="A person: ", parameters=parameters)


Work = Callable[[Caller], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Attack:
    """What one tenant does again and again, in `loops` at once, and what the other asks meanwhile."""

    name: str
    attack: Work
    ask: Work
    loops: int
    engine: str = "scripted"
    script: Mapping[str, object] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    before: Work | None = None
    """What the first does once, before it begins."""


def chat() -> types_pb2.Item:
    """A megabyte of control tokens."""
    text = CONTROL * (1_000_000 // len(CONTROL))
    given = types_pb2.Chat(messages=[types_pb2.Message(role="user", content=text)], allow_control_tokens=True)
    return types_pb2.Item(chat=given)


SHORT = types_pb2.Item(text="Shanghai is")
LONG = types_pb2.Item(text="Shanghai is " * 450)
FILLER = types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[200] * 3000))
SLOW: Mapping[str, object] = {"runs": 8, "kv_blocks": 2200, "block_tokens": 16, "context_tokens": 4096, "delay_seconds": 0.001}
ATTACKS = (
    Attack(
        "66 requests of 1 MB of control tokens; the other sends a prompt of 5 KB",
        lambda caller: caller.generate([chat()], 1, 300.0),
        lambda caller: caller.generate([LONG], 1),
        loops=66,
        engine="llama",
    ),
    Attack(
        "8 loops of a schema that takes too long; the other sends a small one",
        lambda caller: caller.generate([formatted(SLOW_SCHEMA)], 8),
        lambda caller: caller.generate([formatted(PERSON)], 8),
        loops=8,
        engine="llama",
    ),
    *(
        Attack(
            f"4 loops of Replay{', alone' if alone else ''}; the other sends 16 tokens",
            partial(Caller.replay, last=32, alone=alone),
            lambda caller: caller.generate([SHORT], 16),
            loops=4,
            script=SLOW,
            before=lambda caller: caller.generate([SHORT] * 32, 400),
        )
        for alone in (True, False)
    ),
    Attack(
        "batches of 64 x 4,000 tokens; the other sends 4 tokens",
        lambda caller: caller.generate([SHORT] * 64, 4000, 300.0),
        lambda caller: caller.generate([SHORT], 4),
        loops=1,
        script=SLOW,
    ),
    Attack(
        "a journal of 4 MiB is filled; the other sends 16 tokens",
        lambda caller: caller.generate([FILLER] * 16, 16),
        lambda caller: caller.generate([SHORT], 16),
        loops=4,
        script={"context_tokens": 4096},
        flags=("--journal-bytes-max", str(4 << 20)),
    ),
)


@dataclass(slots=True)
class Seen:
    """Seconds of the answers, and how many requests got none."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0

    def cells(self) -> list[str]:
        if not self.seconds:
            return ["", "", f"{self.refused}/{self.refused}"]
        return [millis(median(self.seconds)), millis(max(self.seconds)), f"{self.refused}/{self.refused + len(self.seconds)}"]


async def watched(ask: Callable[[], Awaitable[object]]) -> Seen:
    """One request after the other."""
    seen, end = Seen(), time.monotonic() + WATCH_SECONDS
    while len(seen.seconds) + seen.refused < REQUESTS and time.monotonic() < end:
        sent = time.perf_counter()
        try:
            await ask()
            seen.seconds.append(time.perf_counter() - sent)
        except grpc.aio.AioRpcError:
            seen.refused += 1
        await asyncio.sleep(PAUSE_SECONDS)
    return seen


async def _loop(attack: Callable[[], Awaitable[object]]) -> None:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await attack()
        await asyncio.sleep(0.01)  # a refusal comes back at once


async def measured(attack: Attack, root: Path) -> tuple[Seen, Seen]:
    """Alone, and under the attack."""
    service = ["--script", json.dumps(dict(attack.script))] if attack.engine == "scripted" else []
    with Pair(root=root, engine=attack.engine, service=service, sidecar=["--trust-tenant-metadata", *attack.flags]) as pair:
        await asyncio.to_thread(pair.start)
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(pair.target, options=options) as one,
            grpc.aio.insecure_channel(pair.target, options=options) as two,
        ):
            flood, other = Caller(one, "flood"), Caller(two, "other")
            if attack.before is not None:
                await attack.before(flood)
            await attack.ask(other)
            alone = await watched(partial(attack.ask, other))
            tasks = [asyncio.create_task(_loop(partial(attack.attack, flood))) for _ in range(attack.loops)]
            await asyncio.sleep(LEAD_SECONDS)
            under = await watched(partial(attack.ask, other))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return alone, under


async def rivals(options: Options) -> list[Table]:
    """Each attack, against this checkout and the one beside it."""
    columns = ["what one tenant does", "", "alone p50 ms", "p50 ms", "worst ms", "without an answer"]
    note = (
        f"{REQUESTS} requests of the other tenant, one after the other, or as many as {WATCH_SECONDS:.0f} s allow. The last "
        f"three columns are under the attack. Without an answer: refused, or later than {LATE_SECONDS:.0f} s."
    )
    table = Table("What one tenant does to another", columns, note)
    roots = [("before", options.beside), ("now", ROOT)] if options.beside is not None else [("now", ROOT)]
    for attack in ATTACKS:
        if attack.engine == "llama" and not options.llama:
            continue
        for name, root in roots:
            assert root is not None
            alone, under = await measured(attack, root)
            table.rows.append([attack.name, name, *alone.cells()[:1], *under.cells()])
    return [table]
