"""What end-to-end tests share: a pair seen by a client, requests, listeners, and the verdicts in journal and metrics."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner, Result

from ostinato import errors
from ostinato.cli.app import app
from ostinato.client import Client
from ostinato.requests import batch
from ostinato.v1 import generation_pb2, generation_pb2_grpc, sequencer_pb2, sequencer_pb2_grpc, types_pb2
from serving import auth
from serving.auth import Role

from tests.pair import Pair, Program, running_pair
from tests.simulation.history import Call
from tests.waiting import eventually

GENERATE = "/ostinato.v1.Generation/Generate"
STREAM = "/ostinato.v1.Generation/GenerateStream"

SLOWLY = {"delay_seconds": 0.005}
"""The script of an engine that takes its time."""


async def refusal(call: Awaitable[object]) -> errors.OstinatoError:
    """The error of a call that must fail."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return errors.from_rpc_error(error)
    raise AssertionError(f"the call should have failed, but was answered:\n{answer}")


async def refused(call: Awaitable[object], kind: type[errors.OstinatoError], *fields: str) -> errors.OstinatoError:
    """The error of a call that must fail with this one, for these fields."""
    error = await refusal(call)
    named = [violation.field for violation in error.violations] if isinstance(error, errors.InvalidRequest) else []
    assert (type(error), named) == (kind, [*fields]), repr(error)
    return error


class Door:
    """A running pair, as its clients see it. The client retries some calls; the stubs do not."""

    def __init__(self, pair: Pair, client: Client, channel: grpc.aio.Channel) -> None:
        self.pair, self.client, self.channel = pair, client, channel
        self.generation: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
        self.sequencer: sequencer_pb2_grpc.SequencerAsyncStub = sequencer_pb2_grpc.SequencerStub(channel)

    async def streamed(self, request: generation_pb2.GenerateRequest) -> list[generation_pb2.GenerateEvent]:
        return [event async for event in self.generation.GenerateStream(request)]

    async def begun(self, request: Request) -> tuple[Any, Heard]:
        """A stream that has received its first tokens."""
        stream: Any = self.generation.GenerateStream(request)
        return stream, heard([await stream.read(), await stream.read()])

    async def entries(self, from_index: int, *, payloads: bool = False) -> list[int]:
        """The indexes of the entries that Tail sends without follow."""
        stream = self.sequencer.Tail(sequencer_pb2.TailRequest(from_index=from_index, payloads=payloads))
        return [entry.header.index async for response in stream for entry in response.entries]

    async def health(self, service: str = "ostinato.v1.Generation") -> str:
        answer = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    async def becomes(self, status: str) -> None:
        async def became() -> bool:
            return await self.health() == status

        await eventually(became, f"health says {status}")

    async def last_sequence(self) -> int:
        return (await self.client.head()).last_sequence

    @contextlib.asynccontextmanager
    async def nothing_numbered(self) -> AsyncIterator[None]:
        """Nothing in this block takes a sequence number, and a good request right after it works."""
        before = await self.last_sequence()
        yield
        assert await self.last_sequence() == before, "a sequence number was taken"
        good = await self.client.generate("good", max_new_tokens=1)
        assert good.stamp.first_sequence == before + 1, good
        assert good.results[0].HasField("output"), good

    async def outcome(self, sequence: int) -> tuple[str, str]:
        """Wait for an item's outcome: the kind of its entry, and the error's reason or ""."""
        found: list[types_pb2.Result] = []

        async def over() -> bool:
            (record,) = await self.client.get(sequence)
            found[:] = [record.result] if record.HasField("result") else []
            return bool(found)

        await eventually(over, f"sequence {sequence} has an outcome")
        kinds = await self.kinds(sequence)
        assert len(kinds) == 1, f"sequence {sequence} ended {len(kinds)} times: {kinds}"
        reason = "" if found[0].HasField("output") else errors.from_status(found[0].status).reason
        return kinds[0], reason

    async def kinds(self, sequence: int) -> list[str]:
        """The outcome entries of a sequence in the whole journal; there must never be more than one."""
        outcomes = {"COMPLETED", "FAILED", "CANCELLED", "ABANDONED"}
        named = [
            types_pb2.EntryKind.Name(entry.header.kind).removeprefix("ENTRY_KIND_")
            async for entry in self.client.tail()
            if entry.header.sequence == sequence
        ]
        return [name for name in named if name in outcomes]

    async def freed(self) -> None:
        """Wait until the engine has no run."""
        service = self.pair.service
        await eventually(lambda: self.pair.metrics(service)["ostinato_engine_runs_in_flight"] == 0, "the engine has no run")


@contextlib.asynccontextmanager
async def opened(pair: Pair) -> AsyncIterator[Door]:
    """Connect to a pair whose sidecar listens."""
    async with Client(pair.target) as client, grpc.aio.insecure_channel(pair.target) as channel:
        yield Door(pair, client, channel)


def scripted(**script: Any) -> list[str]:
    """Flags of a service without a self-test, which starts quickly. The script is the last one."""
    return ["--self-test", "off", "--script", json.dumps(script)]


@contextlib.asynccontextmanager
async def own(*sidecar: str, **script: Any) -> AsyncIterator[Door]:
    """A pair for one test."""
    with running_pair(service=scripted(**script), sidecar=sidecar) as pair:
        async with opened(pair) as door:
            yield door


def ended(program: Program, seconds: float = 40.0) -> tuple[int, str]:
    """Exit code and log of a program that exits by itself."""
    deadline = time.monotonic() + seconds
    while program.running:
        if time.monotonic() > deadline:
            program.kill()
            raise AssertionError(f"{program.name} still runs:\n" + "\n".join(program.lines[-20:]))
        time.sleep(0.01)
    return program.stop(), "\n".join(program.lines)


def ostinato(*arguments: str, stdin: str = "", **environment: str) -> Result:
    """The command, in this process: what it prints, and its exit code."""
    with ThreadPoolExecutor(1) as apart:  # it has an event loop of its own, and so may the test
        return apart.submit(CliRunner().invoke, app, arguments, input=stdin, env=environment).result()


@dataclass(frozen=True)
class Tenants:
    """A pair that asks for tokens, and those of its tenants and of an admin, "ops"."""

    pair: Pair
    tokens: dict[str, str]

    def client(self, name: str) -> Client:
        return Client(self.pair.target, token=self.tokens[name])

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[name]}"),)


@contextlib.contextmanager
def tenants(folder: Path, *names: str, sidecar: Sequence[str] = (), **script: Any) -> Iterator[Tenants]:
    """A pair for these tenants, with this script."""
    listed, tokens = tokens_file(folder, *names)
    with running_pair(service=scripted(**script), sidecar=["--tokens", str(listed), *sidecar]) as pair:
        yield Tenants(pair, tokens)


def tokens_file(folder: Path, *tenants: str) -> tuple[Path, dict[str, str]]:
    """A file for --tokens, of these tenants and of an admin, "ops"; and the token of each."""
    made = {name: auth.new_token(name, Role.ADMIN if name == "ops" else Role.TENANT) for name in (*tenants, "ops")}
    file = folder / "tokens"
    file.touch(mode=0o600)
    file.write_text("\n".join(line for _, line in made.values()))
    return file, {name: token for name, (token, _) in made.items()}


# Requests and listeners

Request = generation_pb2.GenerateRequest
Item, Parameters, TokenIds = types_pb2.Item, types_pb2.Parameters, types_pb2.TokenIds

ENDLESS: dict[str, Any] = {"max_new_tokens": 4000, "ignore_eos": True}
"""At least 20 seconds on a slow engine."""


def items(*given: types_pb2.Item, **parameters: Any) -> Request:
    return Request(items=given, parameters=Parameters(**parameters))


def one(**parameters: Any) -> Request:
    """A good prompt with these parameters."""
    return items(Item(text="hello"), **parameters)


def asked(prompts: Any, key: str = "", **parameters: Any) -> Request:
    """The request that the client would send."""
    return batch(prompts, key, sampling=parameters)  # type: ignore[arg-type]


def ids(count: int) -> types_pb2.Item:
    return Item(token_ids=TokenIds(ids=[65] * count))


def bytes_of(response: generation_pb2.GenerateResponse) -> bytes:
    return response.SerializeToString(deterministic=True)


class Heard(Call):
    """The state of a client that follows a stream; asserts that nothing is missing or repeated."""

    def __init__(self) -> None:
        super().__init__(0, 0, Request(), streamed=True, sent=0)

    def hear(self, event: generation_pb2.GenerateEvent, step: int = 0) -> None:
        super().hear(event, step)
        assert not self.faults, (self.faults, event)
        self.results.sort(key=lambda result: result.sequence)

    @property
    def first(self) -> int:
        """The first of its numbers."""
        assert self.stamp is not None
        return self.stamp.first_sequence

    def whole(self) -> None:
        """Assert that the streamed tokens and text are those of the results."""
        for result in self.results:
            assert result.HasField("output"), result
            assert self.tokens[result.sequence] == list(result.output.token_ids)
            assert self.texts[result.sequence] == result.output.text


def heard(events: Sequence[generation_pb2.GenerateEvent]) -> Heard:
    listener = Heard()
    for event in events:
        listener.hear(event)
    return listener


async def rest(stream: Any, listener: Heard) -> Heard:
    """Read a stream to its end."""
    while (event := await stream.read()) is not grpc.aio.EOF:
        listener.hear(event)
    return listener


async def numbered(client: Client, sequence: int) -> None:
    """Wait until this sequence exists."""

    async def exists() -> bool:
        return (await client.head()).last_sequence >= sequence

    await eventually(exists, f"sequence {sequence} exists")


def span(first: int, last: int) -> generation_pb2.CancelRequest:
    return generation_pb2.CancelRequest(range=generation_pb2.SequenceRange(first=first, last=last))


# Second runs


def rule(do: str, at: int, *purposes: str, **more: Any) -> dict[str, Any]:
    """A rule of the scripted engine."""
    return {"do": do, "at": at, "purposes": purposes or ("PRIMARY",), **more}


@dataclass(frozen=True)
class Audited:
    """An AUDITED entry."""

    index: int
    sequence: int
    verdict: str
    said: sequencer_pb2.AuditedPayload


async def audited(client: Client, kind: str) -> list[Audited]:
    """The AUDITED entries of this kind, in order."""
    wanted = types_pb2.ComparisonKind.Value(f"COMPARISON_KIND_{kind.upper()}")
    found = []
    async for entry in client.tail(payloads=True):
        if entry.header.kind == types_pb2.ENTRY_KIND_AUDITED:
            said = sequencer_pb2.AuditedPayload.FromString(entry.payload)
            if said.comparison.kind == wanted:
                verdict = types_pb2.Verdict.Name(said.comparison.verdict).removeprefix("VERDICT_").lower()
                found.append(Audited(entry.header.index, entry.header.sequence, verdict, said))
    return found


def counted(pair: Pair, kind: str) -> Counter[str]:
    """The verdicts of this kind in the metrics, summed over grades."""
    found: Counter[str] = Counter()
    for name, value in pair.metrics().items():
        if name.startswith("ostinato_comparisons_total{") and f'kind="{kind}"' in name:
            found[name.split('verdict="')[1].split('"')[0]] += int(value)
    return found


def missing(pair: Pair, kind: str) -> dict[str, int]:
    """Second runs of this kind without a verdict, by reason."""
    prefix = f'ostinato_not_compared_total{{kind="{kind}",reason="'
    return {
        name.removeprefix(prefix).removesuffix('"}'): int(value)
        for name, value in pair.metrics().items()
        if name.startswith(prefix)
    }
