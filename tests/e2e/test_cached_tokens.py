"""What an engine says it took from its prefix cache: told, recorded, counted, and of no weight in any comparison."""

from __future__ import annotations

import asyncio
import json

from ostinato.chain import check_record
from ostinato.digest import output_digest
from ostinato.v1 import types_pb2

from tests.e2e.kit import ostinato, own

PROMPT = "Shanghai is"
COUNTER = "ostinato_engine_cached_prompt_tokens_total"


async def test_cached_tokens_are_told_recorded_and_never_compared() -> None:
    """Output, timing, journal, command and metric have them; twins and replays that found another part of the prompt in the
    cache match, and the record holds."""
    async with own(cached_tokens=5) as door:
        pair, client = door.pair, door.client
        first = (await client.generate([PROMPT], seed=1)).results[0]
        counted = pair.metrics(pair.service)[COUNTER]
        await asyncio.to_thread(pair.replace_service, "--script", '{"cached_tokens": 7}')
        second = (await client.generate([PROMPT], seed=1)).results[0]
        found = [response.comparison async for response in client.replay(1, 2)]
        (record,) = await client.get(1)
        shown = ostinato("get", "1", "--target", pair.target).stdout
        told = json.loads(ostinato("get", "2", "--json", "--target", pair.target).stdout)
        twins = pair.metrics()

    assert [(each.output.cached_tokens, each.timing.cached_tokens) for each in (first, second)] == [(5, 5), (7, 7)]
    assert counted == 5
    assert (record.result.output, record.result.timing) == (first.output, first.timing)
    assert f"5 of {first.output.prompt_tokens} prompt tokens" in shown
    assert (told["result"]["output"]["cached_tokens"], told["result"]["timing"]["cached_tokens"]) == (7, 7)
    assert [comparison.verdict for comparison in found] == [types_pb2.VERDICT_MATCH] * 2
    assert sum(value for name, value in twins.items() if "comparisons_total" in name and 'verdict="diverged"' in name) == 0
    assert check_record(record) == []
    assert output_digest(first.output) == output_digest(second.output)
