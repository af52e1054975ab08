"""The yardstick of the door: a bare grpc.aio proxy that has the sidecar's hops and commits, and none of its features.

The front answers Generate. For each request it asks the back over one bidirectional stream to prepare the items, writes a row
an item in SQLite, submits the items over the same stream, writes a second row an item, and answers. What waits at the same
time shares a message and a commit. The rows have the tables, the sizes and the synchronous commits of the journal; one thread
writes them. There is no order, no digest, no check, no metric, no retry and no error handling.

The back answers what it is asked at once, with 16 tokens. Both are processes of their own:

    python -m tests.bench.bare back unix:/tmp/back.sock
    python -m tests.bench.bare front unix:/tmp/back.sock 127.0.0.1:7001 /dev/shm/bare.sqlite
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Generic, TypeVar

import apsw
import grpc

from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, generation_pb2_grpc, types_pb2

TOKENS = 16
HEADER, HASH = {"admitted": b"h" * 142, "completed": b"h" * 250}, b"e" * 32
"""Of the sizes of the journal's."""
SCHEMA = """
PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA locking_mode = EXCLUSIVE; PRAGMA temp_store = MEMORY;
CREATE TABLE entries (entry_index INTEGER PRIMARY KEY, header BLOB NOT NULL, entry_hash BLOB NOT NULL) STRICT;
CREATE TABLE payloads (entry_index INTEGER PRIMARY KEY, payload BLOB NOT NULL) STRICT;
CREATE TABLE items (sequence INTEGER PRIMARY KEY, admitted INTEGER NOT NULL, outcome INTEGER) STRICT;
CREATE INDEX unfinished ON items (sequence) WHERE outcome IS NULL;
CREATE TABLE twins (
  input_digest BLOB NOT NULL, fingerprint_digest BLOB NOT NULL, entry_index INTEGER NOT NULL,
  PRIMARY KEY (input_digest, fingerprint_digest)
) STRICT, WITHOUT ROWID;
"""

T = TypeVar("T")
Written = tuple[str, list[tuple[int, bytes]]]
"""A kind of entry; of each item its sequence and its payload."""


class Grouped(Generic[T]):
    """Passes what waits to `write`, all of it at once, one group at a time."""

    def __init__(self, write: Callable[[list[T]], Awaitable[object]]) -> None:
        self._write = write
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    def put(self, value: T) -> asyncio.Future[None]:
        """Done when it is written."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((value, done))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return done

    async def _run(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            await self._write([value for value, _ in group])
            for _, done in group:
                if not done.done():
                    done.set_result(None)
        self._task = None


class Database:
    """Two rows and an index entry for each admitted item, and as many for its outcome."""

    def __init__(self, path: str) -> None:
        self._db = apsw.Connection(path)
        self._db.execute(SCHEMA).fetchall()
        self._thread = ThreadPoolExecutor(1)
        self._index = 0

    async def write(self, group: list[Written]) -> None:
        """In one transaction, in the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, group)

    def _transaction(self, group: list[Written]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for kind, items in group:
            first = self._index + 1
            self._index += len(items)
            indexes = range(first, self._index + 1)
            self._db.executemany("INSERT INTO entries VALUES (?, ?, ?)", [(index, HEADER[kind], HASH) for index in indexes])
            rows = [(index, payload) for index, (_, payload) in zip(indexes, items, strict=True)]
            self._db.executemany("INSERT INTO payloads VALUES (?, ?)", rows)
            numbers = [(sequence, index) for index, (sequence, _) in zip(indexes, items, strict=True)]
            if kind == "admitted":
                self._db.executemany("INSERT INTO items (sequence, admitted) VALUES (?, ?)", numbers)
            else:
                self._db.executemany("UPDATE items SET outcome = ?2 WHERE sequence = ?1", numbers)
                twins = [(sequence.to_bytes(32), HASH, index) for sequence, index in numbers]
                self._db.executemany("INSERT OR IGNORE INTO twins VALUES (?, ?, ?)", twins)
        self._db.execute("COMMIT")


class Front(generation_pb2_grpc.GenerationServicer):
    """Stands where the sidecar stands."""

    def __init__(self, back: str, path: str) -> None:
        self._channel = grpc.aio.insecure_channel(back)  # a channel that is not kept is closed
        stub: Any = engine_pb2_grpc.EngineStub(self._channel)
        self._stream = stub.Execute()
        self._prepares, self._sequences = count(1), count(1)
        self._prepared: dict[int, asyncio.Future[Any]] = {}
        self._finished: dict[int, asyncio.Future[Any]] = {}
        self._requests = Grouped[engine_pb2.ExecuteRequest](self._send)
        self._rows = Grouped[Written](Database(path).write)
        self._reader = asyncio.ensure_future(self._read())

    async def Generate(self, request: generation_pb2.GenerateRequest, _: object) -> generation_pb2.GenerateResponse:
        new_future = asyncio.get_running_loop().create_future
        number, sequences = next(self._prepares), [next(self._sequences) for _ in request.items]
        ready = self._prepared[number] = new_future()
        prepare = engine_pb2.PrepareRequest(prepare_id=number, items=request.items, parameters=request.parameters)
        _ = self._requests.put(engine_pb2.ExecuteRequest(prepares=[prepare]))
        prepared = (await ready).items
        admitted = [(sequence, item.SerializeToString()) for sequence, item in zip(sequences, prepared, strict=True)]
        await self._rows.put(("admitted", admitted))
        ends = [new_future() for _ in sequences]
        self._finished |= zip(sequences, ends, strict=True)
        _ = self._requests.put(engine_pb2.ExecuteRequest(submits=_submits(sequences, prepared)))
        outputs = [(await end).output for end in ends]
        completed = [(sequence, output.SerializeToString()) for sequence, output in zip(sequences, outputs, strict=True)]
        await self._rows.put(("completed", completed))
        results = [
            types_pb2.Result(sequence=sequence, output=output, attempt=1)
            for sequence, output in zip(sequences, outputs, strict=True)
        ]
        return generation_pb2.GenerateResponse(results=results)

    async def _send(self, group: list[engine_pb2.ExecuteRequest]) -> None:
        first = group[0]
        for more in group[1:]:
            first.MergeFrom(more)
        await self._stream.write(first)

    async def _read(self) -> None:
        while True:
            response = await self._stream.read()
            for prepared in response.prepared:
                self._prepared.pop(prepared.prepare_id).set_result(prepared)
            for event in response.events:
                self._finished.pop(event.run_id).set_result(event.finished)


def _submits(sequences: list[int], prepared: Iterable[engine_pb2.PreparedItem]) -> Iterable[engine_pb2.Submit]:
    for sequence, item in zip(sequences, prepared, strict=True):
        yield engine_pb2.Submit(
            run_id=sequence,
            purpose=engine_pb2.PURPOSE_PRIMARY,
            sequence=sequence,
            attempt=1,
            token_ids=item.token_ids,
            parameters=item.parameters,
            seed=sequence,
        )


class Back(engine_pb2_grpc.EngineServicer):
    """Stands where the service stands."""

    async def Prepare(self, request: engine_pb2.PrepareRequest, _: object) -> engine_pb2.PrepareResponse:
        return _prepared(request)

    async def Execute(
        self, requests: AsyncIterator[engine_pb2.ExecuteRequest], _: object
    ) -> AsyncIterator[engine_pb2.ExecuteResponse]:
        async for request in requests:
            if request.HasField("hello"):
                yield engine_pb2.ExecuteResponse(welcome=engine_pb2.Welcome())
            else:
                events = [engine_pb2.RunEvent(run_id=each.run_id, finished=_finished(each)) for each in request.submits]
                yield engine_pb2.ExecuteResponse(events=events, prepared=map(_prepared, request.prepares))


def _prepared(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=TOKENS)
    items = [
        engine_pb2.PreparedItem(token_ids=item.text.encode(), parameters=parameters, kv_tokens=64, result_bytes=1024)
        for item in request.items
    ]
    return engine_pb2.PrepareResponse(prepare_id=request.prepare_id, items=items, model_digest=HASH)


def _finished(submit: engine_pb2.Submit) -> engine_pb2.Finished:
    output = types_pb2.Output(
        text="x" * 3 * TOKENS,
        token_ids=range(TOKENS),
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        seed=submit.seed,
        prompt_tokens=len(submit.token_ids),
        grade=types_pb2.GRADE_EXACT,
    )
    return engine_pb2.Finished(output=output)


async def main(role: str, back: str, listen: str = "", path: str = "") -> None:
    server = grpc.aio.server()
    if role == "back":
        engine_pb2_grpc.add_EngineServicer_to_server(Back(), server)  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
        server.add_insecure_port(back)
    else:
        front = Front(back, path)  # type: ignore[abstract]  # likewise
        generation_pb2_grpc.add_GenerationServicer_to_server(front, server)
        server.add_insecure_port(listen)
    await server.start()
    print(json.dumps({"message": "listening"}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
