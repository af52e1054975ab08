"""Audits: sampled items are run again, and the entries, the metrics and the engine's script agree on what diverged."""

from __future__ import annotations

from collections import Counter

from ostinato.digest import is_sampled

from tests.e2e.kit import Audited, Door, audited, counted, eventually, missing, opened, own, rule, scripted
from tests.pair import Pair

ALL = ("--audit-rate", "1")


async def items(door: Door, *counts: int, tokens: int = 8) -> None:
    """Requests one after the other, with these numbers of items."""
    for count in counts:
        response = await door.client.generate([f"p{n}" for n in range(count)], max_new_tokens=tokens, ignore_eos=True)
        assert all(result.HasField("output") for result in response.results)


async def judged(door: Door, count: int) -> list[Audited]:
    """The AUDITED entries, once there are `count` of them in the metrics and in the journal."""
    await eventually(lambda: counted(door.pair, "audit").total() >= count, f"{count} audits have a verdict")
    found: list[Audited] = []

    async def written() -> bool:
        found[:] = await audited(door.client, "audit")
        return len(found) >= count

    await eventually(written, f"{count} audits are recorded")
    return found


async def test_the_sampling_hash_decides() -> None:
    """At a rate of one third exactly those items are audited that the sampling hash selects."""
    async with own("--audit-rate", "0.3333") as door:
        await items(door, 30, 30)
        log_id = (await door.client.head()).log_id
        chosen = [sequence for sequence in range(1, 61) if is_sampled("audit", log_id, sequence, 0.3333)]

        assert sorted(each.sequence for each in await judged(door, len(chosen))) == chosen
        await door.freed()
        assert len(await audited(door.client, "audit")) == len(chosen)


async def test_items_that_ran_alone_are_audited_together() -> None:
    """Four items that each ran alone are audited together, which shows an engine that diverges only beside other runs."""
    slow_ticks = ("--tick-seconds", "60")  # else the first three may be run beside the fourth
    async with own(*ALL, *slow_ticks, rules=[rule("diverge", 1, "AUDIT", company=True)], delay_seconds=0.002) as door:
        await items(door, 1, 1, 1)
        assert door.pair.metrics()["ostinato_audit_backlog_items"] == 3
        await items(door, 1)

        assert Counter(each.verdict for each in await judged(door, 4)) == Counter(diverged=4)


async def test_a_restart_continues_audits() -> None:
    """Audits that a killed sidecar left are run by the next one: each sampled item gets one verdict."""
    hang = rule("hang", 0, "AUDIT", sequences=[4, 5, 6, 7, 8, 9])
    with Pair(service=scripted(rules=[hang]), sidecar=ALL) as pair:
        pair.start()
        async with opened(pair) as door:
            await items(door, 9)
            assert {each.sequence for each in await judged(door, 3)} == {1, 2, 3}
            pair.sidecar.kill()
            pair.service.kill()
        pair.start_service("--script", scripted(rules=[rule("diverge", 2, "AUDIT", sequences=[5, 6])])[-1])
        pair.start_sidecar("--audit-patience-seconds", "0").wait_for("engine connected")
        async with opened(pair) as door:
            found = await judged(door, 9)

            assert sorted(each.sequence for each in found) == list(range(1, 10))
            assert sorted(each.sequence for each in found if each.verdict == "diverged") == [5, 6]
            assert counted(pair, "audit") == Counter(match=7, diverged=2)


async def test_the_budget_and_the_backlog() -> None:
    """Audits beyond the backlog are counted, as BUDGET if the budget is spent. An item has a verdict, waits, or is counted."""
    flags = ("--audit-tokens-per-second", "0.001", "--audit-backlog-max", "3")
    async with own(*ALL, *flags) as door:
        await items(door, 20, 20)
        await door.freed()

        def settled() -> bool:
            waiting = door.pair.metrics()["ostinato_audit_backlog_items"]
            skipped = missing(door.pair, "audit")
            return counted(door.pair, "audit").total() + sum(skipped.values()) + waiting == 40 and waiting == 3

        await eventually(settled, "all forty are accounted for")
        assert missing(door.pair, "audit")["BUDGET"] > 0


async def test_another_engine_skips_audits() -> None:
    """Audits that wait while the engine is replaced by one with another fingerprint are skipped and counted."""
    with Pair(service=scripted(), sidecar=ALL) as pair:
        pair.start()
        async with opened(pair) as door:
            await items(door, 1, 1)
            pair.service.kill()
            pair.start_service("--script", scripted(fields={"device": "another"})[-1]).wait_for("serving")
            await eventually(lambda: pair.metrics()["ostinato_engine_connected"] == 1, "the other engine is connected")
            await items(door, 1, 1)
            await eventually(lambda: missing(pair, "audit") == {"FINGERPRINT_CHANGED": 2}, "the first two are skipped")
            await items(door, 1, 1)

            assert {3, 4} <= {each.sequence for each in await judged(door, 2)}
            assert missing(pair, "audit") == {"FINGERPRINT_CHANGED": 2}
