"""A tenant that floods a real pair, and another that does not."""

from __future__ import annotations

from typing import Any

from ostinato import errors
from serving.auth import TENANT_METADATA

from tests.e2e.kit import Door, asked, one, own, refused, rule, span
from tests.waiting import eventually

FLAGS = ("--trust-tenant-metadata", "--window-runs-max", "1", "--numbered-items-max", "1", "--tenant-queue-items-max", "20")


def generated(door: Door, tenant: str, request: Any) -> Any:
    return door.generation.Generate(request, metadata=[(TENANT_METADATA, tenant)], wait_for_ready=True)


async def test_a_flood_waits_in_its_own_queue() -> None:
    """While an item holds the engine, 20 of one tenant wait without numbers and its next is refused with a hint; one who leaves
    burns no number; another tenant's request is numbered at once, and every number ends."""
    async with own(*FLAGS, runs=1, rules=[rule("hang", 0, sequences=[1])]) as door:
        metrics, request = door.pair.metrics, one(max_new_tokens=200)

        async def waiting(count: int) -> None:
            await eventually(lambda: metrics()["ostinato_unnumbered_items"] == count, f"{count} wait")

        first = generated(door, "flood", request)
        await eventually(lambda: metrics()["ostinato_inflight_items"] == 1, "an item holds the engine")
        flood = [generated(door, "flood", request) for _ in range(20)]
        await waiting(19)
        leaver = generated(door, "flood", request)
        await waiting(20)
        full = await refused(generated(door, "flood", request), errors.QueueFull)
        other = generated(door, "other", request)
        await eventually(lambda: metrics()["ostinato_queue_items"] == 2, "it is numbered")
        leaver.cancel()
        await waiting(19)
        await door.generation.Cancel(span(1, 1), metadata=[(TENANT_METADATA, "flood")])
        answers = [await call for call in (first, *flood)]
        answer = await other

    assert full.retry_after is not None and full.retry_after > 0
    assert answer.stamp.first_sequence == 3
    assert sorted(each.stamp.first_sequence for each in (answer, *answers)) == list(range(1, len(answers) + 2))
    assert [result.WhichOneof("outcome") for each in answers[1:] for result in each.results] == ["output"] * 20


async def test_a_tenant_that_has_filled_its_part_of_the_journal_is_refused_alone() -> None:
    """At its bound a tenant is refused with the setting's name, also after a restart, and gets a key's recorded answer; another
    tenant is served."""
    small, keyed = one(max_new_tokens=8), asked("x", key="first", max_new_tokens=8)
    async with own("--trust-tenant-metadata", "--tenant-journal-bytes-max", "20000") as door:
        first = await generated(door, "flood", keyed)
        await generated(door, "flood", asked(["x"] * 64, max_new_tokens=8))
        full = [await refused(generated(door, "flood", small), errors.JournalFull)]
        door.pair.sidecar.stop()
        door.pair.start_sidecar().wait_for("engine connected")
        full.append(await refused(generated(door, "flood", small), errors.JournalFull))
        again = await generated(door, "flood", keyed)
        other = await generated(door, "other", small)

    assert [error.details for error in full] == [{"setting": "tenant_journal_bytes_max"}] * 2
    assert again == first
    assert other.results[0].HasField("output")
