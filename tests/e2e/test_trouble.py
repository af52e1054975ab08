"""No engine, a full journal or queue, and an engine that hangs or crashes."""

from __future__ import annotations

import asyncio

import grpc

from ostinato import errors
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2

from tests.e2e.kit import SLOWLY, Door, Item, asked, bytes_of, ended, ids, items, one, opened, own, refused, rest, scripted
from tests.hop import proved
from tests.pair import Pair
from tests.sidecar.journal_kit import SqliteKit
from tests.waiting import eventually


async def test_no_engine() -> None:
    """Without a service, work is refused with a retry delay, nothing is numbered, and reads are served. When a service
    connects or dies, health changes at once, not at the next tick."""
    with Pair(service=scripted(), sidecar=["--tick-seconds", "1000"]) as pair:
        waiting = pair.start_sidecar().wait_for("waiting for the engine")
        assert waiting["address"] == pair.engine_address
        async with opened(pair) as door:
            for call in (
                door.generation.Generate(one()),
                door.streamed(one()),
                door.generation.GetModel(generation_pb2.GetModelRequest()),
                door.generation.Tokenize(generation_pb2.TokenizeRequest(items=[Item(text="a")])),
            ):
                said = await refused(call, errors.EngineUnavailable)
                assert said.retry_after is not None, said
            assert await door.last_sequence() == 0
            assert len(await door.entries(1)) == 1
            assert await door.health() == "NOT_SERVING"

            service = pair.start_service()

            pair.sidecar.wait_for("engine connected")
            assert (await door.client.generate("a", max_new_tokens=1)).stamp.first_sequence == 1
            await door.becomes("SERVING")

            service.kill()
            await door.becomes("NOT_SERVING")


async def test_a_sidecar_that_was_replaced_ends() -> None:
    """When a later epoch of the same writer has the engine, the earlier sidecar exits and says so; its successor works."""
    async with own() as door:
        head = await door.client.head()
        hello = engine_pb2.Hello(log_id=head.log_id, writer=head.writer, epoch=head.epoch + 1)
        async with grpc.aio.insecure_channel(door.pair.engine_address) as channel:
            stream = (await proved(channel, door.pair.engine_address)).Execute()
            await stream.write(engine_pb2.ExecuteRequest(hello=hello))

            code, log = await asyncio.to_thread(ended, door.pair.sidecar)

            assert code == 1, log
            assert f"replaced by a stream of epoch {head.epoch + 1}" in log, log
            stream.cancel()
        door.pair.start_sidecar().wait_for("engine connected")
        assert (await door.client.generate("a", max_new_tokens=1)).stamp.epoch == head.epoch + 1


async def test_a_full_journal() -> None:
    """New work is refused with a retry delay; work in flight ends, the journal can be read, and health and metrics show it."""
    limits = ("--journal-bytes-max", str(1 << 20), "--journal-reserve-bytes", str(256 << 10))
    async with own(*limits, **SLOWLY) as door:
        kept = await door.client.generate("kept", key="kept", max_new_tokens=2)
        # Its outcome has some hundred thousand bytes, taken from the reserve once nothing else is left.
        stream, listener = await door.begun(one(max_new_tokens=400, ignore_eos=True, logprobs=20))
        said = await filled(door)
        assert isinstance(said, errors.JournalFull)
        assert said.retry_after is not None, said
        last = await door.last_sequence()

        (result,) = (await rest(stream, listener)).results

        listener.whole()
        assert len(result.output.token_ids) == 400
        assert await door.kinds(result.sequence) == ["COMPLETED"]
        assert (await door.client.head()).unfinished == 0
        assert (await door.client.get(result.sequence))[0].result == result
        await refused(door.streamed(one()), errors.JournalFull)
        assert await door.last_sequence() == last
        assert bytes_of(await door.client.generate("kept", key="kept", max_new_tokens=2)) == bytes_of(kept)
        await door.becomes("NOT_SERVING")
        assert await door.health("ostinato.v1.Sequencer") == "SERVING"
        assert door.pair.metrics()["ostinato_journal_full"] == 1


async def filled(door: Door) -> errors.OstinatoError:
    """Fill the journal until it refuses."""
    for _ in range(100):
        try:
            await door.generation.Generate(items(*[ids(4000)] * 16, max_new_tokens=1))
        except grpc.aio.AioRpcError as error:
            return errors.from_rpc_error(error)
    raise AssertionError("the journal takes more than it may")


async def test_a_record_that_was_changed() -> None:
    """An answer that was changed in the file is served neither to a retry by key nor by Get. The sidecar logs and counts each
    read, and serves on."""
    async with own() as door:
        request = asked("text", key="k", max_new_tokens=4)
        (answer,) = (await door.client.generate(request)).results
        assert door.pair.sidecar.stop() == 0
        change = "UPDATE payloads SET payload = x'00' WHERE entry_index = ?"
        SqliteKit(door.pair.folder / "journal.sqlite").execute(change, answer.receipt.header.index)
        sidecar = door.pair.start_sidecar()
        sidecar.wait_for("engine connected")

        for call in (door.generation.Generate(request), door.sequencer.Get(sequencer_pb2.GetRequest(sequence=1))):
            await refused(call, errors.RecordDamaged)
        assert (await door.client.generate("other", max_new_tokens=1)).results[0].sequence == 2
        logged = sidecar.wait_for("a record is damaged: look at the journal with verify", nth=2)
        assert f"the payload of entry {answer.receipt.header.index} is damaged" in str(logged["why"])
        assert door.pair.metrics()["ostinato_journal_damaged_reads_total"] == 2


async def test_load_is_on_one_page() -> None:
    """The sidecar's page says in vLLM's names what waits, in the engine too, what runs, and the share of KV blocks in use."""
    script = {
        "runs": 2,
        "kv_blocks": 64,
        "block_tokens": 16,
        "rules": [{"do": "hang", "at": 1, "sequences": list(range(1, 10))}],
    }
    async with own(**script) as door:
        calls = [asyncio.ensure_future(door.client.generate("a", max_new_tokens=100)) for _ in range(7)]

        def load() -> tuple[float, float, float, float]:
            seen = door.pair.metrics()
            names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
            waiting, running, usage = (seen[f"vllm:{name}"] for name in names)
            return waiting, running, usage, seen["ostinato_inflight_kv_blocks"]

        await eventually(lambda: load()[:2] == (5, 2), "five wait, two run")
        *_, usage, blocks = load()
        assert 0 < usage == blocks / 64 <= 1
        await door.client.cancel(1, 7)
        await asyncio.gather(*calls)
        await eventually(lambda: load() == (0, 0, 0, 0), "nothing is left")
