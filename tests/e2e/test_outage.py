"""A sidecar that is away for longer than gRPC itself would try, and callers with keys who do not notice."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import generation_pb2

from tests.pair import Pair

HANGING = json.dumps({"rules": [{"do": "hang", "at": 2, "sequences": [1, 2, 3], "attempts": [1]}]})
"""Those under way make two tokens, and no more before their second attempt."""
OUTAGE_SECONDS = 4.0
"""gRPC's own retries, five at most, end after 3.0 to 3.6."""


async def test_an_outage_is_not_noticed() -> None:
    """A batch under way, a stream between its tokens and a batch that is sent meanwhile, each with a key and time, are answered
    once the sidecar is back: same numbers, each token once; a batch without a key is told."""
    with Pair(service=["--script", HANGING]) as pair:
        pair.start()
        async with Client(pair.target) as client:
            begun = asyncio.create_task(client.generate(["a", "b"], key="batch", max_new_tokens=8, ignore_eos=True, timeout=90))
            events: list[generation_pb2.GenerateEvent] = []
            two = asyncio.Event()

            async def listen() -> None:
                stream = client.stream("c", key="stream", max_new_tokens=8, ignore_eos=True, timeout=90)
                async with aclosing(stream) as source:
                    async for event in source:
                        events.append(event)
                        if len(_ids(events)) == 2:
                            two.set()

            listening = asyncio.create_task(listen())
            await asyncio.wait_for(two.wait(), 30)
            await asyncio.to_thread(pair.sidecar.kill)
            late = asyncio.create_task(client.generate("d", key="late", max_new_tokens=8, timeout=90))
            with pytest.raises(errors.Disconnected):
                await client.generate("e")
            await asyncio.sleep(OUTAGE_SECONDS)
            assert not any(task.done() for task in (begun, listening, late))
            await asyncio.to_thread(pair.start_sidecar)
            batch, _, last = await asyncio.gather(begun, listening, late)
            again = await client.generate(["a", "b"], key="batch", max_new_tokens=8, ignore_eos=True)

    kinds = [event.WhichOneof("event") for event in events]
    finished = events[-1].finished
    assert (kinds[0], kinds[-1], kinds.count("admitted"), kinds.count("restarted")) == ("admitted", "finished", 1, 0)
    assert _ids(events) == list(finished.output.token_ids)
    assert finished.attempt == 2
    assert {*(result.sequence for result in batch.results), finished.sequence} == {1, 2, 3}
    assert all(result.HasField("output") for result in (*batch.results, *last.results))
    assert again == batch


def _ids(events: list[generation_pb2.GenerateEvent]) -> list[int]:
    """All that was streamed, which must fit together."""
    ids: list[int] = []
    for run in (run for event in events for run in event.tokens.runs):
        assert run.first_token == len(ids)
        ids.extend(run.token_ids)
    return ids
