"""The Execute stream over a real socket: the events of runs, the rules for the sidecar, and the ends of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from ostinato import errors
from ostinato.chain import SEQUENCE_MAX
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Events, Run
from service.engines.scripted import ByteVocabulary
from service.fence import EPOCH_MAX
from tests.service.support import ENDLESS, REPLAY, SLOW, Service, Stream, hello_of, served, submit_of
from tests.waiting import eventually


async def test_welcome_comes_first() -> None:
    """The first message has the description of Describe."""
    async with served() as service, service.stream() as stream:
        frame = await stream.read()

        assert frame is not None
        assert frame.welcome.description == await service.stub.Describe(engine_pb2.DescribeRequest())
        assert frame.welcome.description.model.engine == "scripted"


async def test_events_of_a_run_are_in_order() -> None:
    """A streamed run starts, delivers its tokens without gaps, and finishes with the same tokens and text; one that does not
    stream is silent in between."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(9), submit_of(10, stream=False))
        output, silent = await stream.output(9), await stream.output(10)

        kinds = [event.WhichOneof("event") for event in stream.events if event.run_id == 9]
        assert [event.WhichOneof("event") for event in stream.events if event.run_id == 10] == ["started", "finished"]
        assert silent == output
        tokens = [event.tokens for event in stream.of(9, "tokens")]
        assert (kinds[0], kinds[-1]) == ("started", "finished")
        assert [token for each in tokens for token in each.token_ids] == list(output.token_ids)
        assert "".join(each.text for each in tokens) == output.text
        assert (output.prompt_tokens, output.seed, output.engine_seed) == (5, 1, 1)
        assert output.grade == types_pb2.GRADE_BEST_EFFORT


async def test_submission_order_is_engine_order() -> None:
    """Runs reach the engine in the order of the messages and, within one, of its submits; with room for two they start so."""
    async with served({"runs": 2}) as service, service.stream() as stream:
        await stream.send(*(submit_of(i, max_new_tokens=1 + i % 3) for i in range(1, 40)))
        await stream.send(*(submit_of(i, max_new_tokens=1 + i % 3) for i in range(40, 80)))
        for i in range(1, 80):
            await stream.end(i)

        assert list(service.engine.submitted) == list(range(1, 80))
        assert [event.run_id for event in stream.events if event.HasField("started")] == list(range(1, 80))


async def test_the_engine_begins_before_a_large_message_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message with many runs is received in parts: the first runs have started when the last are submitted."""
    happened: list[str] = []
    async with served({"runs": 200}) as service, service.stream() as stream:
        submit, report = service.engine.submit, service.engine._on_events

        def submitted(run: Run) -> None:
            happened.append("submitted")
            submit(run)

        def reported(events: Events) -> None:
            happened.extend("started" for event in events if event.HasField("started"))
            report(events)

        monkeypatch.setattr(service.engine, "submit", submitted)
        monkeypatch.setattr(service.engine, "_on_events", reported)
        await stream.send(*(submit_of(i) for i in range(1, 101)))
        for i in range(1, 101):
            await stream.end(i)

    assert happened.count("submitted") == happened.count("started") == 100
    assert happened.index("started") < len(happened) - 1 - happened[::-1].index("submitted")


async def test_frames_coalesce() -> None:
    """A sidecar that reads late gets few messages, not one per token."""
    async with served() as service, service.stream() as stream:
        await stream.read()
        await stream.send(*(submit_of(i, max_new_tokens=500) for i in range(1, 9)))
        await eventually(lambda: service.sample("ostinato_engine_runs_total", purpose="primary", end="finished") == 8)
        for i in range(1, 9):
            await stream.end(i)

        assert sum(len(e.tokens.token_ids) for i in range(1, 9) for e in stream.of(i, "tokens")) == 4000
        assert stream.frames < 1000


async def test_large_backlog_comes_in_bounded_messages() -> None:
    """No message grows far beyond frame_bytes_max, however much waits."""
    async with served(frame_bytes_max=10_000) as service, service.stream() as stream:
        await stream.send(*(submit_of(i, max_new_tokens=1000, stream=False) for i in range(1, 30)))
        sizes = []
        while len(stream.events) < 58:
            frame = await stream.read()
            assert frame is not None
            sizes.append(frame.ByteSize())

        assert max(sizes) < 20_000


async def test_slow_reader_loses_its_stream() -> None:
    """A sidecar that does not read is cut off at buffer_bytes_max, and the engine is free."""
    async with served(buffer_bytes_max=50_000) as service, service.stream() as stream:
        await stream.read()
        await stream.send(*(submit_of(i, max_new_tokens=4000, logprobs=20) for i in range(1, 65)))
        await eventually(lambda: service.sample("ostinato_engine_runs_total", purpose="primary", end="cancelled") == 64)

        assert service.idle()
        assert isinstance(await stream.broken(), errors.SlowReader)


async def test_preparing_over_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prepare request is answered by its id with what the Prepare call would have returned, refusals and INTERNAL too.
    Runs go on meanwhile."""
    encode = ByteVocabulary.encode

    def crash(self: ByteVocabulary, text: str, *, special: bool, most: int = 0) -> list[int]:
        assert text != "crash"
        return encode(self, text, special=special)

    monkeypatch.setattr(ByteVocabulary, "encode", crash)
    async with served() as service, service.stream() as stream:
        asked = [
            engine_pb2.PrepareRequest(items=[types_pb2.Item(text=text)], prepare_id=prepare_id)
            for prepare_id, text in enumerate(("good", "", "crash", "good"), 1)
        ]
        await stream.send(submit_of(1), prepares=asked)
        answered = dict[int, engine_pb2.PrepareResponse]()
        while len(answered) < len(asked):
            frame = await stream.read()
            assert frame is not None
            answered |= {each.prepare_id: each for each in frame.prepared}

        called = await service.stub.Prepare(engine_pb2.PrepareRequest(items=[types_pb2.Item(text="good")]))
        for prepare_id in (1, 4):
            answered[prepare_id].prepare_id = 0
            assert answered[prepare_id] == called
        refused, broken = (errors.from_status(answered[prepare_id].refused) for prepare_id in (2, 3))
        assert isinstance(refused, errors.InvalidRequest)
        assert [violation.field for violation in refused.violations] == ["items[0].text"]
        assert (type(broken), broken.message) == (errors.Internal, "internal error")
        assert len((await stream.output(1)).token_ids) == 8


async def test_cancel_before_start() -> None:
    """A queued run that is cancelled never starts, and has no event."""
    held = {"runs": 1, "rules": [{"do": "hang", "sequences": [1]}]}
    async with served(held) as service, service.stream() as stream:
        await stream.send(submit_of(1), submit_of(2), submit_of(3))
        await stream.send(cancels=[2])
        await stream.send(cancels=[1])
        await stream.end(3)

        assert not [event for event in stream.events if event.run_id == 2]


async def test_cancel_while_running() -> None:
    """A running run that is cancelled stops, makes room, and has no further event; unknown and ended ones are ignored."""
    async with served({"runs": 1, **SLOW}) as service, service.stream() as stream:
        await stream.send(submit_of(1, **ENDLESS), submit_of(2))
        await stream.until(1, "tokens")
        await stream.send(cancels=[1])
        await stream.end(2)
        await stream.send(submit_of(3), cancels=[1, 2, 77])
        await stream.end(3)

        assert not stream.of(1, "finished")
        assert not stream.of(1, "failed")
        assert service.sample("ostinato_engine_runs_total", purpose="primary", end="cancelled") == 1


async def test_cancel_in_the_message_of_the_submit() -> None:
    """Within a message, cancels come after submits."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, **ENDLESS), cancels=[1])
        await stream.done()

        assert stream.events == []


async def test_deadline() -> None:
    """A run that takes longer than its timeout fails with DEADLINE_EXCEEDED and frees the engine; others go on."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, timeout_millis=60, **ENDLESS), submit_of(2, max_new_tokens=30))

        assert isinstance(await stream.failure(1), errors.DeadlineExceeded)
        assert len((await stream.output(2)).token_ids) == 30
        assert service.sample("ostinato_engine_runs_in_flight") == 0


async def test_deadline_counts_from_submission() -> None:
    """A queued run expires too."""
    async with served({"runs": 1, "rules": [{"do": "hang"}]}) as service, service.stream() as stream:
        await stream.send(submit_of(1), submit_of(2, timeout_millis=40))

        assert isinstance(await stream.failure(2), errors.DeadlineExceeded)
        assert not stream.of(2, "started")


async def test_engine_failure_fails_one_run() -> None:
    """A run that the engine fails ends with ENGINE_FAILED; another finishes."""
    async with served({"rules": [{"do": "fail", "at": 3, "sequences": [1]}]}) as service, service.stream() as stream:
        await stream.send(submit_of(1), submit_of(2))

        assert isinstance(await stream.failure(1), errors.EngineFailed)
        assert sum(len(event.tokens.token_ids) for event in stream.of(1, "tokens")) == 3
        assert (await stream.output(2)).token_ids


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"prompt": [1, 262]}, "token_ids"),
        ({"max_new_tokens": 4096}, "parameters.max_new_tokens"),
        ({"top_k": 1025}, "parameters.top_k"),
        ({"temperature": float("nan")}, "parameters.temperature"),
        ({"top_p": 0.0}, "parameters.top_p"),
        ({"repetition_penalty": float("inf")}, "parameters.repetition_penalty"),
        ({"min_new_tokens": 9}, "parameters.min_new_tokens"),
        ({"stop_token_ids": [262]}, "parameters.stop_token_ids[0]"),
        ({"bad_token_ids": [262]}, "parameters.bad_token_ids[0]"),
        ({"logprobs": 21}, "parameters.logprobs"),
        ({"min_p": 1.5}, "parameters.min_p"),
        ({"stop": ["x"] * 17}, "parameters.stop"),
        ({"stop": ["x" * 257]}, "parameters.stop[0]"),
        ({"response_format": types_pb2.ResponseFormat(regex="x" * 65537)}, "parameters.response_format.regex"),
    ],
)
async def test_run_that_does_not_fit_fails_alone(changes: dict[str, Any], path: str) -> None:
    """A run that this engine cannot take fails with what is wrong; the stream and the other runs go on."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1, **changes), submit_of(2))
        error = await stream.failure(1)

        assert isinstance(error, errors.InvalidRequest)
        assert [violation.field for violation in error.violations] == [path]
        assert (await stream.output(2)).token_ids


async def test_a_recorded_length_outlives_the_setting() -> None:
    """A run recorded before new_tokens_max was lowered is accepted: only the context bounds it."""
    async with served(new_tokens_max=4) as service, service.stream() as stream:
        await stream.send(submit_of(1, max_new_tokens=9))

        assert len((await stream.output(1)).token_ids) == 9


async def test_too_many_runs_are_turned_away() -> None:
    """Beyond runs_max a run fails at once with QUEUE_FULL."""
    async with served({"rules": [{"do": "hang", "sequences": [1, 2]}]}, runs_max=2) as service, service.stream() as stream:
        await stream.send(submit_of(1), submit_of(2), submit_of(3))

        assert isinstance(await stream.failure(3), errors.QueueFull)


async def test_grade_lost_mid_run() -> None:
    """When the engine loses its grade, Welcome is sent again, and the active run and all later ones have the lower grade."""
    rules = [{"do": "lose_grade", "at": 4, "sequences": [2], "to": "BEST_EFFORT"}]
    async with served({"rules": rules}, self_test="full") as service, service.stream() as stream:
        await stream.send(submit_of(1))
        before = await stream.output(1)
        await stream.send(submit_of(2))
        during = await stream.output(2)
        await stream.send(submit_of(3))
        after = await stream.output(3)

        grades = [before.grade, during.grade, after.grade]
        assert grades == [types_pb2.GRADE_EXACT, types_pb2.GRADE_BEST_EFFORT, types_pb2.GRADE_BEST_EFFORT]
        assert [welcome.model.grade for welcome in stream.welcomes] == [types_pb2.GRADE_EXACT, types_pb2.GRADE_BEST_EFFORT]
        assert "token 4 of sequence 2" in stream.welcomes[-1].model.grade_reason


async def test_crash_is_not_survived() -> None:
    """A scripted crash ends the process with its exit code, after the reported events were sent."""
    async with (
        served({"rules": [{"do": "crash", "at": 1, "sequences": [1], "purposes": ["PRIMARY"]}]}) as service,
        service.stream() as stream,
    ):
        await stream.send(submit_of(1), submit_of(2, purpose=REPLAY))
        await stream.until(1, "tokens")
        await eventually(lambda: service.end_codes)  # in this test the process is only told to end

        assert service.end_codes == [70]


async def test_stale_epoch_is_refused() -> None:
    """An epoch lower than one seen of this writer and log is refused, also after that stream has ended; another is not."""
    async with served() as service:
        async with service.stream(epoch=5) as stream:
            await stream.read()
            await stream.done()
        async with service.stream(epoch=4) as stale:
            error = await stale.broken()

        async with service.stream(log="e" * 32, writer="x", epoch=1) as other:
            await other.send(submit_of(1))
            assert (await other.output(1)).token_ids

        assert isinstance(error, errors.EpochStale)
        assert error.details["highest"] == "5"
        assert service.sample("ostinato_service_streams_refused_total", reason="EPOCH_STALE") == 1


@pytest.mark.parametrize("epoch", [3, 4])
async def test_same_or_higher_epoch_takes_over(epoch: int) -> None:
    """A writer that reconnects ends its earlier stream, whose runs stop before the new runs begin."""
    async with served(SLOW) as service, service.stream(epoch=3) as old:
        await old.send(*(submit_of(i, **ENDLESS) for i in range(1, 70)))
        await old.until(1, "tokens")
        async with service.stream(epoch=epoch) as new:
            await new.read()
            await new.send(submit_of(1))

            assert (await new.output(1)).token_ids
            assert isinstance(await old.broken(), errors.EpochStale)
            assert service.idle()


async def test_replaced_stream_can_submit_nothing() -> None:
    """Submissions of a replaced sidecar never reach the engine, even while a write to it hangs."""
    async with served() as service:
        old_says, new_says = Said(), Said()
        context: Any = None
        old_says(engine_pb2.ExecuteRequest(hello=hello_of(epoch=1)))
        async with contextlib.aclosing(service.servicer.Execute(old_says.all(), context)) as old:
            await anext(old)  # and not read on: as if a write hung
            new_says(engine_pb2.ExecuteRequest(hello=hello_of(epoch=2)))
            async with contextlib.aclosing(service.servicer.Execute(new_says.all(), context)) as new:
                await anext(new)
                old_says(engine_pb2.ExecuteRequest(submits=[submit_of(66)]))
                new_says(engine_pb2.ExecuteRequest(submits=[submit_of(1)]))
                await eventually(lambda: service.engine.submitted)
                await asyncio.sleep(0.02)

                assert list(service.engine.submitted) == [1]
                with pytest.raises(errors.EpochStale):
                    await anext(old)


class Said(asyncio.Queue[engine_pb2.ExecuteRequest]):
    """A sidecar's messages, without a socket."""

    __call__ = asyncio.Queue.put_nowait

    async def all(self) -> AsyncIterator[engine_pb2.ExecuteRequest]:
        while True:
            yield await self.get()


@pytest.mark.parametrize("other", [{"writer": "x"}, {"log": "f" * 32}, {"writer": "x", "epoch": 9}])
async def test_another_writer_is_refused(other: dict[str, Any]) -> None:
    """A second log or writer is refused while one is connected, whatever its epoch, and the first goes on."""
    async with served(SLOW) as service, service.stream() as first:
        await first.send(submit_of(1, max_new_tokens=20))
        await first.read()
        async with service.stream(**other) as second:
            assert isinstance(await second.broken(), errors.WriterBusy)

        assert len((await first.output(1)).token_ids) == 20


@pytest.mark.parametrize(
    ("submits", "kind"),
    [
        ([submit_of(0, sequence=1)], errors.ProtocolViolation),
        ([submit_of(1), submit_of(1, sequence=2)], errors.ProtocolViolation),
        ([submit_of(1, purpose=engine_pb2.PURPOSE_UNSPECIFIED)], errors.ProtocolViolation),
        ([submit_of(1, purpose=42)], errors.ProtocolViolation),
        ([submit_of(1, attempt=0)], errors.ProtocolViolation),
        ([submit_of(1, prompt=b"")], errors.ProtocolViolation),
        ([engine_pb2.Submit(run_id=1, purpose=REPLAY, sequence=1, attempt=1, token_ids=[1])], errors.ProtocolViolation),
        ([submit_of(1, sequence=5), submit_of(2, sequence=5)], errors.OutOfOrder),
        ([submit_of(1, sequence=5), submit_of(2, sequence=4)], errors.OutOfOrder),
        ([submit_of(1, sequence=5), submit_of(2, sequence=9, ahead=True), submit_of(3, sequence=5)], errors.OutOfOrder),
        ([submit_of(1, sequence=0)], errors.OutOfOrder),
        ([submit_of(1, sequence=0, attempt=2)], errors.OutOfOrder),
        ([submit_of(1, sequence=5), submit_of(2, sequence=3, attempt=2), submit_of(3, sequence=4)], errors.OutOfOrder),
    ],
)
async def test_broken_rules_end_the_stream(submits: list[engine_pb2.Submit], kind: type[errors.OstinatoError]) -> None:
    """A submission that breaks a rule ends the stream with its error and stops its runs."""
    async with served({"rules": [{"do": "hang"}]}) as service, service.stream() as stream:
        await stream.send(*submits)

        assert type(await stream.broken()) is kind
        await eventually(service.idle)


async def test_run_id_is_used_up_by_its_run() -> None:
    """A run_id is unique in the stream, also after its run has ended."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1))
        await stream.end(1)
        await stream.send(submit_of(1, sequence=2))

        assert isinstance(await stream.broken(), errors.ProtocolViolation)


async def test_what_has_no_place_in_the_order() -> None:
    """First attempts rise, gaps allowed. Reruns, later attempts and what goes ahead of others may come between. Whatever their
    ids, attempts and purposes, one input has one output."""
    async with served() as service, service.stream() as stream:
        await stream.send(submit_of(1, sequence=5), submit_of(2, sequence=9, ahead=True), submit_of(3, sequence=6))
        await stream.send(submit_of(4, sequence=3, attempt=2), submit_of(5, sequence=3, purpose=REPLAY))
        await stream.send(submit_of(6, sequence=900), submit_of(7, sequence=950, attempt=3), submit_of(8, sequence=901))

        outputs = [await stream.output(run_id) for run_id in range(1, 9)]
        assert outputs == [outputs[0]] * 8


async def test_largest_sequences_and_ids() -> None:
    """2^63 and 2^64-1 are valid run ids, seeds and timeouts, and SEQUENCE_MAX and EPOCH_MAX valid sequences and epochs."""
    async with served() as service, service.stream(epoch=EPOCH_MAX, last_sequence=SEQUENCE_MAX - 2) as stream:
        given = submit_of(2**63, sequence=SEQUENCE_MAX - 1, seed=2**64 - 1, timeout_millis=2**64 - 1)
        await stream.send(given, submit_of(2**64 - 1, sequence=SEQUENCE_MAX))

        assert (await stream.output(2**63)).seed == 2**64 - 1
        await stream.output(2**64 - 1)
        assert list(service.engine.submitted) == [SEQUENCE_MAX - 1, SEQUENCE_MAX]


@pytest.mark.parametrize(
    "hellos",
    [[hello_of(log="")], [hello_of(writer="")], [hello_of(epoch=0)], [None], [hello_of(), hello_of(epoch=2)]],
    ids=["log", "writer", "epoch", "none", "two"],
)
async def test_stream_begins_with_a_whole_hello(hellos: list[engine_pb2.Hello | None]) -> None:
    """A first message without a complete hello ends the stream, and so does a second hello."""
    async with served() as service:
        stream = Stream(service.stub.Execute())
        for number, hello in enumerate(hellos, 1):
            await stream.send(submit_of(number), hello=hello)

        assert isinstance(await stream.broken(), errors.ProtocolViolation)


async def test_malformed_message_ends_the_stream() -> None:
    """Bytes that cannot be parsed end the stream with INVALID_ARGUMENT and stop its runs."""
    async with served(SLOW) as service, grpc.aio.insecure_channel(service.address) as channel:
        raw: Any = channel.stream_stream(
            "/ostinato.v1.Engine/Execute", response_deserializer=engine_pb2.ExecuteResponse.FromString
        )()
        await raw.write(engine_pb2.ExecuteRequest(hello=hello_of(), submits=[submit_of(1, **ENDLESS)]).SerializeToString())
        stream = Stream(raw)
        await stream.until(1, "tokens")
        await raw.write(b"\xff\xff\xff")

        assert isinstance(await stream.broken(), errors.MalformedMessage)
        await eventually(service.idle)


NEVER = 1000.0
"""In seconds. Longer than any test."""


async def refusing(service: Service) -> None:
    """Returns once a new call is refused. gRPC may drop a call that comes while the server stops: it has a timeout."""
    async with asyncio.timeout(30):
        while True:
            try:
                await service.stub.Describe(engine_pb2.DescribeRequest(), timeout=2)
                await asyncio.sleep(0.005)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    return


async def test_disconnect_frees_the_engine() -> None:
    """When the sidecar disconnects, all its runs stop at once."""
    async with served(SLOW) as service:
        async with service.stream() as stream:
            await stream.send(*(submit_of(i, **ENDLESS) for i in range(1, 100)))
            await stream.until(1, "tokens")
            assert not service.idle()
        await eventually(service.idle)

        assert service.sample("ostinato_service_streams") == 0
        assert service.sample("ostinato_engine_runs_in_flight") == 0
        assert service.sample("ostinato_engine_runs_queued") == 0


@pytest.mark.parametrize("runs", [0, 4])
async def test_half_close_drains(runs: int) -> None:
    """After half-close runs go on to their ends, and then the stream ends without an error: without runs after its welcome."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(*(submit_of(i, max_new_tokens=20) for i in range(1, runs + 1)))
        await stream.done()

        assert sum(event.HasField("finished") for event in stream.events) == runs
        assert len(stream.welcomes) == 1


async def test_stop_waits_for_the_stream() -> None:
    """A draining service keeps the stream until the sidecar half-closes, and refuses other calls."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, max_new_tokens=30))
        await stream.until(1, "tokens")
        service.streams.drain(NEVER)
        stopping = asyncio.create_task(service.server.stop(NEVER))
        await refusing(service)
        await stream.send(submit_of(2))
        await stream.end(1)
        await stream.end(2)
        await stream.send(submit_of(3))
        await stream.done()
        await stopping

        assert len((await stream.output(1)).token_ids) == 30
        assert (await stream.output(2)).token_ids
        assert (await stream.output(3)).token_ids


async def test_stop_lets_an_idle_sidecar_go() -> None:
    """A draining service ends an idle stream without an error, but not while it has runs."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, max_new_tokens=30), submit_of(2, max_new_tokens=60))
        await stream.until(1, "tokens")
        service.streams.drain(0.02)
        stopping = asyncio.create_task(service.server.stop(NEVER))
        while await stream.read() is not None:
            pass
        await stopping

        assert [len((await stream.output(run_id)).token_ids) for run_id in (1, 2)] == [30, 60]


async def test_a_stream_that_comes_during_a_drain_ends_too() -> None:
    """A stream that was admitted during the drain ends once it is idle."""
    async with served() as service:
        service.streams.drain(0.02)
        async with service.stream() as stream:
            while await stream.read() is not None:
                pass

        assert service.sample("ostinato_service_streams") == 0


async def test_stop_ends_when_grace_does() -> None:
    """A sidecar that never half-closes is disconnected after the grace period, and its runs stop."""
    async with served(SLOW) as service, service.stream() as stream:
        await stream.send(submit_of(1, **ENDLESS))
        await stream.until(1, "tokens")
        await service.server.stop(0.1)

        await eventually(service.idle)
        await stream.broken()
