"""A fake sidecar: it answers from a script, or from a small journal, and keeps every call."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from typing import IO, Any

import grpc
import grpc.aio
from grpc_status import rpc_status
from typer.testing import CliRunner, Result

from ostinato import chain, digest, errors
from ostinato.cli.app import app
from ostinato.client import Client
from ostinato.v1 import generation_pb2, generation_pb2_grpc, sequencer_pb2, sequencer_pb2_grpc, types_pb2

LOG_ID = "0123456789abcdef0123456789abcdef"


@dataclass
class Call:
    """A call as the server saw it."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    seconds_left: float | None
    cancelled: bool = False


@dataclass
class Journal:
    """Enough of a journal for valid receipts."""

    entries: list[sequencer_pb2.Entry] = field(default_factory=list)

    def append(self, payload: bytes, **header: Any) -> sequencer_pb2.Entry:
        previous = self.entries[-1].entry_hash if self.entries else chain.GENESIS
        made = types_pb2.EntryHeader(
            index=len(self.entries) + 1,
            log_id=LOG_ID,
            writer="fake",
            epoch=1,
            time_unix_millis=1_700_000_000_000 + len(self.entries),
            payload_digest=chain.payload_digest(payload),
            **header,
        )
        self.entries.append(sequencer_pb2.Entry(header=made, entry_hash=chain.entry_hash(previous, made), payload=payload))
        return self.entries[-1]

    def previous_hash(self, entry: sequencer_pb2.Entry) -> bytes:
        return self.entries[entry.header.index - 2].entry_hash


class Fake(generation_pb2_grpc.GenerationServicer, sequencer_pb2_grpc.SequencerServicer):
    """Each element of `script[method]` answers one call: an error is raised, a message or a list of messages is sent (errors
    may stand in the list), a function is awaited with request and context. A method without script does its best."""

    def __init__(self) -> None:
        self.script: defaultdict[str, deque[Any]] = defaultdict(deque)
        self.calls: list[Call] = []
        self.journal = Journal()
        self.records: dict[int, sequencer_pb2.ItemRecord] = {}
        self.keyed: dict[str, generation_pb2.GenerateResponse] = {}
        self.diverging: set[int] = set()
        self.grown = asyncio.Event()

    def count(self, method: str) -> int:
        return sum(call.method == method for call in self.calls)

    def _seen(self, method: str, request: Any, context: Any) -> Call:
        call = Call(method, request, dict(context.invocation_metadata()), context.time_remaining())
        self.calls.append(call)
        return call

    async def _unary(self, method: str, default: str, request: Any, context: Any) -> Any:
        call = self._seen(method, request, context)
        try:
            answer = self.script[method].popleft() if self.script[method] else getattr(self, default)(request)
            if callable(answer):
                answer = await answer(request, context)
        except errors.OstinatoError as error:
            answer = error
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        if isinstance(answer, errors.OstinatoError):
            await context.abort_with_status(rpc_status.to_status(errors.to_status(answer)))
        return answer

    async def _stream(self, method: str, default: str, request: Any, context: Any) -> AsyncIterator[Any]:
        call = self._seen(method, request, context)
        source = _each(self.script[method].popleft()) if self.script[method] else getattr(self, default)(request)
        try:
            async for answer in source:
                if isinstance(answer, errors.OstinatoError):
                    await context.abort_with_status(rpc_status.to_status(errors.to_status(answer)))
                yield answer
        except (asyncio.CancelledError, GeneratorExit):  # the latter if it ended while an answer was being written
            call.cancelled = True
            raise

    Generate: Any = partialmethod(_unary, "Generate", "_generate")
    GenerateStream: Any = partialmethod(_stream, "GenerateStream", "_events")
    Cancel: Any = partialmethod(_unary, "Cancel", "_cancel")
    GetModel: Any = partialmethod(_unary, "GetModel", "_model")
    Tokenize: Any = partialmethod(_unary, "Tokenize", "_tokenize")
    Get: Any = partialmethod(_unary, "Get", "_get")
    Tail: Any = partialmethod(_stream, "Tail", "_tail")
    Replay: Any = partialmethod(_stream, "Replay", "_replay")
    Head: Any = partialmethod(_unary, "Head", "_head")
    Report: Any = partialmethod(_unary, "Report", "_report")
    Witness: Any = partialmethod(_unary, "Witness", "_witness")

    def _generate(self, request: generation_pb2.GenerateRequest) -> generation_pb2.GenerateResponse:
        key = request.idempotency_key
        if key in self.keyed:
            return self.keyed[key]
        first, count = len(self.records) + 1, len(request.items)
        stamp = types_pb2.Stamp(log_id=LOG_ID, writer="fake", epoch=1, first_sequence=first, count=count)
        results = [self._run(request, item, first, first + position) for position, item in enumerate(request.items)]
        response = generation_pb2.GenerateResponse(stamp=stamp, results=results)
        if key:
            self.keyed[key] = response
        return response

    def altering(self, change: Callable[[types_pb2.Result], object]) -> Any:
        """For a script: as without one, with a change of the first result."""

        async def answer(request: generation_pb2.GenerateRequest, _context: Any) -> generation_pb2.GenerateResponse:
            response = self._generate(request)
            change(response.results[0])
            return response

        return answer

    def _run(
        self, request: generation_pb2.GenerateRequest, item: types_pb2.Item, first: int, sequence: int
    ) -> types_pb2.Result:
        given = types_pb2.Parameters()
        given.MergeFrom(request.parameters)
        given.MergeFrom(item.parameters)
        seed = given.seed if given.HasField("seed") else digest.sampling_hash("seed", LOG_ID, sequence)
        token_ids = _token_ids(item)
        resolved = types_pb2.ResolvedParameters(temperature=1.0, max_new_tokens=4)
        about: dict[str, Any] = {"sequence": sequence, "first_sequence": first, "count": len(request.items), "seed": seed}
        nonce = sequence.to_bytes(chain.NONCE_BYTES)
        admitted = sequencer_pb2.AdmittedPayload(
            token_ids=token_ids, parameters=resolved, seed=seed, idempotency_key=request.idempotency_key, nonce=nonce
        )
        about |= {"form": chain.FORM, "input_digest": chain.sealed_input(chain.FORM, admitted)}
        header = self.journal.append(admitted.SerializeToString(), kind=types_pb2.ENTRY_KIND_ADMITTED, **about).header
        made = list(hashlib.sha256(f"{seed} {token_ids}".encode()).digest()[:4])
        output = types_pb2.Output(
            text="".join(chr(97 + token % 26) for token in made),
            token_ids=made,
            finish_reason=types_pb2.FINISH_REASON_LENGTH,
            seed=seed,
            engine_seed=seed,
            prompt_tokens=len(token_ids),
            grade=types_pb2.GRADE_EXACT,
        )
        if given.HasField("logprobs"):
            output.logprobs.extend(types_pb2.TokenLogprobs(logprob=-0.1 * (token + 1)) for token in made)
        timing = types_pb2.Timing(queue_micros=10, total_micros=2500)
        completed = self.journal.append(
            sequencer_pb2.CompletedPayload(output=output, timing=timing, nonce=nonce).SerializeToString(),
            kind=types_pb2.ENTRY_KIND_COMPLETED,
            attempt=1,
            grade=output.grade,
            **chain.sealed_output(chain.FORM, nonce, output),
            fingerprint_digest=MODEL.fingerprint.digest,
            **about,
        )
        receipt = chain.receipt(completed.header, self.journal.previous_hash(completed), completed.entry_hash, nonce)
        result = types_pb2.Result(sequence=sequence, output=output, receipt=receipt, timing=timing, attempt=1)
        self.records[sequence] = sequencer_pb2.ItemRecord(
            admitted=header,
            input=admitted,
            result=result,
            outcome=completed.header,
            fingerprint=MODEL.fingerprint,
        )
        self.grown.set()
        return result

    async def _events(self, request: generation_pb2.GenerateRequest) -> AsyncIterator[generation_pb2.GenerateEvent]:
        response = self._generate(request)
        yield generation_pb2.GenerateEvent(admitted=generation_pb2.Admitted(stamp=response.stamp))
        for at in range(4):
            runs = [
                generation_pb2.TokenRun(
                    sequence=result.sequence, attempt=1, first_token=at, token_ids=[token], text=result.output.text[at]
                )
                for result in response.results
                for token in [result.output.token_ids[at]]
            ]
            yield generation_pb2.GenerateEvent(tokens=generation_pb2.Tokens(runs=runs))
        for result in response.results:
            yield generation_pb2.GenerateEvent(finished=result)

    def _cancel(self, _: generation_pb2.CancelRequest) -> generation_pb2.CancelResponse:
        return generation_pb2.CancelResponse(cancelled=1, ended=2)

    def _model(self, _: generation_pb2.GetModelRequest) -> generation_pb2.GetModelResponse:
        return generation_pb2.GetModelResponse(model=MODEL)

    def _witness(self, request: sequencer_pb2.WitnessRequest) -> sequencer_pb2.WitnessResponse:
        return sequencer_pb2.WitnessResponse(header=types_pb2.EntryHeader(index=request.head.last_index))

    def _tokenize(self, request: generation_pb2.TokenizeRequest) -> generation_pb2.TokenizeResponse:
        return generation_pb2.TokenizeResponse(results=[types_pb2.TokenIds(ids=_token_ids(item)) for item in request.items])

    def _get(self, request: sequencer_pb2.GetRequest) -> sequencer_pb2.GetResponse:
        found = [
            record
            for sequence, record in self.records.items()
            if sequence == request.sequence
            or (request.idempotency_key and record.input.idempotency_key == request.idempotency_key)
        ]
        if not found:
            raise errors.NotFound(f"no item {request.sequence or request.idempotency_key}")
        return sequencer_pb2.GetResponse(items=found)

    def _head(self, request: sequencer_pb2.HeadRequest) -> sequencer_pb2.HeadResponse:
        entries = self.journal.entries
        return sequencer_pb2.HeadResponse(
            log_id=LOG_ID,
            writer="fake",
            epoch=1,
            index=len(entries),
            entry_hash=entries[-1].entry_hash if entries else chain.GENESIS,
            last_sequence=len(self.records),
        )

    def _report(self, request: sequencer_pb2.ReportRequest) -> sequencer_pb2.ReportResponse:
        return sequencer_pb2.ReportResponse(log_id=LOG_ID, writer="fake", confidence=request.confidence or 0.95)

    async def _tail(self, request: sequencer_pb2.TailRequest) -> AsyncIterator[sequencer_pb2.TailResponse]:
        at = max(request.from_index, 1) - 1
        while True:
            entries = [sequencer_pb2.Entry.FromString(entry.SerializeToString()) for entry in self.journal.entries[at:]]
            for entry in entries:
                if not request.payloads:
                    entry.ClearField("payload")
            if entries:
                yield sequencer_pb2.TailResponse(entries=entries)
            at += len(entries)
            if not request.follow:
                return
            self.grown.clear()
            await self.grown.wait()

    async def _replay(self, request: sequencer_pb2.ReplayRequest) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
        newest = len(self.records)
        if request.range.first > newest:
            raise errors.NotFound(f"the newest sequence is {newest}")
        wanted = range(request.range.first, min(request.range.last, newest) + 1)
        for seen, sequence in enumerate(wanted, 1):
            record = self.records[sequence]
            response = sequencer_pb2.ReplayResponse(seen=seen, total=len(wanted))
            if record.outcome.kind != types_pb2.ENTRY_KIND_COMPLETED:
                response.passed_over.append(sequence)
                yield response
                continue
            made = response.comparison
            made.sequence, made.kind = sequence, types_pb2.COMPARISON_KIND_REPLAY
            made.verdict, made.compared_tokens = types_pb2.VERDICT_MATCH, 4
            if sequence in self.diverging:
                made.verdict, made.first_difference, made.compared_tokens, made.margin = types_pb2.VERDICT_DIVERGED, 2, 2, 0.25
                made.actual.CopyFrom(self.another(record.result.output))
                response.record.CopyFrom(record)
            yield response

    def another(self, output: types_pb2.Output) -> types_pb2.Output:
        """The same up to token 2, which is the next one."""
        made = types_pb2.Output()
        made.CopyFrom(output)
        made.token_ids[2] = (made.token_ids[2] + 1) % 256
        made.text = f"{made.text[:2]}\n{made.text[3:]}"
        return made


MODEL = types_pb2.Model(
    name="fake-1",
    engine="scripted",
    vocabulary_size=256,
    context_tokens=128,
    limits=types_pb2.Limits(batch_items_max=4, new_tokens_max=64, top_k_max=100, logprobs_max=20),
    fingerprint=types_pb2.Fingerprint(
        digest=digest.fingerprint_digest({"model": "fake-1", "threads": "1"}), fields={"model": "fake-1", "threads": "1"}
    ),
    grade=types_pb2.GRADE_EXACT,
    grade_reason="self-test: 4 of 4 equal",
    chat=True,
)


def _token_ids(item: types_pb2.Item) -> list[int]:
    if item.HasField("token_ids"):
        return list(item.token_ids.ids)
    prompt = item.text if item.HasField("text") else "".join(f"{each.role}:{each.content}\n" for each in item.chat.messages)
    return list(prompt.encode())


async def _each(answer: Any) -> AsyncIterator[Any]:
    for each in answer if isinstance(answer, list) else [answer]:
        if callable(each):
            await each()
        else:
            yield each


@asynccontextmanager
async def serving(fake: Fake, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The fake behind a real socket, on this loop; yields its target."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    generation_pb2_grpc.add_GenerationServicer_to_server(fake, server)
    sequencer_pb2_grpc.add_SequencerServicer_to_server(fake, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def talking(**options: Any) -> AsyncIterator[tuple[Fake, Client]]:
    """A fake with a client."""
    fake = Fake()
    async with serving(fake) as target, Client(target, **options) as client:
        yield fake, client


COMMAND = (sys.executable, "-m", "ostinato.cli")


def start(
    *arguments: object, target: str = "127.0.0.1:1", stdout: IO[str] | int = subprocess.PIPE, **environ: str
) -> subprocess.Popen[str]:
    """The command as a process that Ctrl-C interrupts, also if this one ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited; preexec_fn does not go with gRPC's threads
    try:
        pipe, environment = subprocess.PIPE, {**os.environ, "OSTINATO_TARGET": target, **environ}
        command = [*COMMAND, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=stdout, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """The command with a fake as its target."""

    def __init__(self, fake: Fake, target: str) -> None:
        self.fake = fake
        self.target = target

    def __call__(self, *arguments: object, stdin: str | bytes | None = None, **environment: str) -> Result:
        given = ["--target", self.target, *map(str, arguments)]
        return CliRunner().invoke(app, given, input=stdin, env={"OSTINATO_TARGET": None, **environment})

    def lines(self, *arguments: object, stdin: str | bytes | None = None) -> list[Any]:
        result = self("--json", *arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    @property
    def sent(self) -> list[generation_pb2.GenerateRequest]:
        return [call.request for call in self.fake.calls if call.method.startswith("Generate")]
