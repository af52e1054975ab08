"""A second service that gets a share of the work and answers nobody."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from tests.e2e.conftest import Door, eventually, opened
from tests.e2e.reruns_kit import audited, counted, missing, rule, service
from tests.pair import Pair, Program


@contextlib.asynccontextmanager
async def shadowed(*rules: dict[str, Any], flags: tuple[str, ...] = (), **script: Any) -> AsyncIterator[tuple[Door, Program]]:
    """A pair, all of whose items are mirrored, and a second service with this script."""
    with Pair(service=service()) as pair:
        address = f"unix:{pair.folder}/shadow.sock"
        second = Program("service", ["--engine", "scripted", "--listen", address, *service(*rules, **script), *LOGS])
        pair.programs.append(second)
        pair.start_service()
        pair.start_sidecar("--shadow", address, "--shadow-rate", "1", *flags).wait_for("engine connected")
        await eventually(lambda: pair.metrics()["ostinato_shadow_connected"] == 1, "the shadow is connected")
        async with opened(pair) as door:
            yield door, second


LOGS = ("--log-format", "json", "--metrics", "127.0.0.1:0")


async def items(door: Door, count: int) -> list[list[int]]:
    """The answers of one request."""
    response = await door.client.generate([f"p{n}" for n in range(count)], seed=1, max_new_tokens=8, ignore_eos=True)
    assert all(result.HasField("output") for result in response.results)
    return [list(result.output.token_ids) for result in response.results]


def drift(door: Door) -> dict[str, float]:
    """Outputs under another fingerprint."""
    metrics = door.pair.metrics()
    return {each: metrics.get(f'ostinato_shadow_drift_total{{outputs="{each}"}}', 0) for each in ("equal", "unequal")}


async def test_what_differs_in_the_shadow() -> None:
    """Under the same fingerprint the two items of eight that the shadow makes otherwise are DIVERGED; the callers get the
    first service's answers, which make no difference to a later request."""
    async with shadowed(rule("diverge", 2, "SHADOW", sequences=[2, 5])) as (door, _):
        answers = await items(door, 8)
        await eventually(lambda: counted(door.pair, "shadow").total() == 8, "all are compared")
        found = await audited(door.client, "shadow")

        assert sorted(each.sequence for each in found) == list(range(1, 9))
        assert sorted(each.sequence for each in found if each.verdict == "diverged") == [2, 5]
        assert counted(door.pair, "shadow") == Counter(match=6, diverged=2)
        assert drift(door) == {"equal": 0, "unequal": 0}
        assert await items(door, 8) == answers


async def test_another_fingerprint() -> None:
    """A shadow on another device is INCOMPARABLE, and no divergence; whether its outputs are equal is counted apart."""
    async with shadowed(rule("diverge", 2, "SHADOW", sequences=[3]), fields={"device": "another"}) as (door, _):
        await items(door, 6)
        await eventually(lambda: counted(door.pair, "shadow") == Counter(incomparable=6), "all are looked at")
        found = await audited(door.client, "shadow")

        assert drift(door) == {"equal": 5, "unequal": 1}
        unequal = [
            e.sequence for e in found if e.said.comparison.expected_output_digest != e.said.comparison.actual_output_digest
        ]
        assert unequal == [3]
        assert {tuple(each.said.comparison.drift) for each in found} == {("fingerprint.device",)}


async def test_another_tokenizer() -> None:
    """Token ids that mean something else there are not run there."""
    async with shadowed(fields={"tokenizer": "another"}) as (door, _):
        await items(door, 3)
        await eventually(lambda: missing(door.pair, "shadow") == {"FINGERPRINT_CHANGED": 3}, "all are counted")
        assert await audited(door.client, "shadow") == []


async def test_a_shadow_that_hangs_and_dies() -> None:
    """While it answers nothing the first service answers all; what its queue does not hold is dropped and counted, and what it
    held is lost with it."""
    flags = ("--shadow-queue-max", "2")
    async with shadowed(rule("hang", 0, "SHADOW"), flags=flags, runs=1) as (door, second):
        await items(door, 10)
        await items(door, 10)
        await eventually(lambda: missing(door.pair, "shadow") == {"QUEUE_FULL": 17}, "one runs, two wait")

        second.kill()
        await eventually(lambda: missing(door.pair, "shadow").get("ENGINE_UNAVAILABLE") == 3, "they are lost")
        await items(door, 2)
        await eventually(lambda: missing(door.pair, "shadow").get("ENGINE_UNAVAILABLE") == 5, "nobody to mirror to")
        assert await audited(door.client, "shadow") == []
        assert door.pair.sidecar is not None
        assert door.pair.sidecar.stop() == 0
