"""A journal that keeps no payloads."""

from __future__ import annotations

import pytest

from ostinato import errors

from tests.e2e.kit import counted, own
from tests.pair import python
from tests.waiting import eventually


async def test_digests_only() -> None:
    """Without payloads a key's answer comes back until it is dropped, twins are compared, and nothing is run again."""
    async with own("--payloads", "digests") as door:
        pair, client = door.pair, door.client
        keyed = await client.generate("a", seed=1, key="k")
        plain = await client.generate("a", seed=1)
        assert plain.results[0].output == keyed.results[0].output
        await client.generate("b", seed=1)
        await client.generate("b", seed=1)
        await eventually(lambda: counted(pair, "twin")["match"] == 2, "one by its output, one by its digest")
        (record,) = await client.get(plain.stamp.first_sequence)
        assert not (record.HasField("input") or record.HasField("result"))
        (verdict,) = [response.comparison async for response in client.replay(plain.stamp.first_sequence)]
        assert errors.from_status(verdict.status).reason == "PAYLOAD_PRUNED"

        pair.sidecar.kill()
        pair.start_sidecar().wait_for("engine connected")
        assert await client.generate("a", seed=1, key="k") == keyed
        last = await door.last_sequence()
        pair.sidecar.stop()
        sequence, journal = str(keyed.stamp.first_sequence), str(pair.folder / "journal.sqlite")
        assert "2 payloads" in python("-m", "sidecar", "redact", sequence, "--journal", journal).stderr
        pair.start_sidecar().wait_for("engine connected")
        for _ in range(2):
            with pytest.raises(errors.PayloadPruned):
                await client.generate("a", seed=1, key="k")
        assert await door.last_sequence() == last
