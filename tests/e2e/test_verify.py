"""Answers that their callers want made twice: the verdict comes with the answer, and is the same for whoever asks later."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from ostinato import errors
from ostinato.chain import check_result
from ostinato.requests import batch
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.kit import Door, audited, counted, eventually, missing, opened, own, rule, scripted
from tests.pair import Pair

UNSPECIFIED, MATCH, DIVERGED = types_pb2.VERDICT_UNSPECIFIED, types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED
HANG = rule("hang", 0, "VERIFY")


def asked(prompts: list[str], key: str = "") -> generation_pb2.GenerateRequest:
    """Eight tokens each, verified."""
    return batch(prompts, key, sampling={"max_new_tokens": 8, "ignore_eos": True}, verify=True)


def why(result: types_pb2.Result) -> str:
    """Why an answer that is there has no verdict."""
    assert result.HasField("output"), result
    assert check_result(result) == []
    assert (result.comparison.kind, result.comparison.verdict) == (types_pb2.COMPARISON_KIND_VERIFY, UNSPECIFIED), result
    return errors.from_status(result.comparison.status).reason


async def verifying(door: Door, sequence: int) -> None:
    """Until the first run has its outcome: what is left is the second."""
    await eventually(lambda: _completed(door, sequence), f"sequence {sequence} has completed")


async def _completed(door: Door, sequence: int) -> bool:
    kinds = {types_pb2.ENTRY_KIND_COMPLETED}
    return any([e.header.sequence == sequence and e.header.kind in kinds async for e in door.client.tail()])


async def test_verdicts_come_with_the_answers() -> None:
    """Of six items whose second runs differ twice, two verdicts are DIVERGED at the token that differs: in the answers, in
    AUDITED entries behind the outcomes, in the metrics; in a stream, and for whoever comes back with the key."""
    rules = [rule("diverge", 3, "VERIFY", sequences=[2, 5, 8])]
    async with own(rules=rules) as door:
        response = await door.generation.Generate(asked([f"p{n}" for n in range(6)], key="k"))

        assert [result.comparison.verdict for result in response.results] == [MATCH, DIVERGED, MATCH, MATCH, DIVERGED, MATCH]
        for result in response.results:
            said = result.comparison
            assert check_result(result) == []
            assert (said.sequence, said.kind) == (result.sequence, types_pb2.COMPARISON_KIND_VERIFY)
            assert said.compared_tokens == (3 if said.verdict == DIVERGED else 8)
            assert said.HasField("first_difference") == (said.verdict == DIVERGED)
        entries = await audited(door.client, "verify")
        assert sorted((each.sequence, each.said.comparison.SerializeToString()) for each in entries) == [
            (result.sequence, result.comparison.SerializeToString()) for result in response.results
        ]
        for each in entries:
            (record,) = await door.client.get(each.sequence)
            assert record.result.receipt.header.index < each.index
            assert record.result == response.results[each.sequence - 1]

        events = await door.streamed(asked(["p6", "p7"]))
        finished = [event.finished for event in events if event.HasField("finished")]
        assert sorted((each.sequence, each.comparison.verdict) for each in finished) == [(7, MATCH), (8, DIVERGED)]
        assert counted(door.pair, "verify") == Counter(match=5, diverged=3)

        head = await door.client.head()
        again = await door.generation.Generate(asked([f"p{n}" for n in range(6)], key="k"))
        assert again.SerializeToString(deterministic=True) == response.SerializeToString(deterministic=True)
        assert (await door.client.head()).entry_hash == head.entry_hash

        plain = await door.client.generate("p0", max_new_tokens=8)
        assert not plain.results[0].HasField("comparison")


async def test_an_item_that_fails_is_not_verified() -> None:
    """There is nothing to compare: the status comes as ever, with no comparison."""
    async with own(rules=[rule("fail", 2, sequences=[1])]) as door:
        first, second = (await door.generation.Generate(asked(["a", "b"]))).results

        assert errors.from_status(first.status).reason == "ENGINE_FAILED"
        assert not first.HasField("comparison")
        assert second.comparison.verdict == MATCH


async def test_an_engine_lost_in_the_second_run() -> None:
    """The answer leaves without a verdict and says why; nothing runs again, and the key brings the same bytes."""
    with Pair(service=scripted(rules=[rule("crash", 1, "VERIFY")])) as pair:
        pair.start()
        async with opened(pair) as door:
            response = await door.generation.Generate(asked(["a"], key="k"))

            assert why(response.results[0]) == "ENGINE_UNAVAILABLE"
            assert missing(pair, "verify") == {"ENGINE_UNAVAILABLE": 1}
            assert counted(pair, "verify") == Counter()
            again = await door.generation.Generate(asked(["a"], key="k"))
            assert again.SerializeToString(deterministic=True) == response.SerializeToString(deterministic=True)


async def test_a_second_run_that_fails() -> None:
    """A second run that the engine fails, or that takes longer than an item may, costs the verdict and not the answer."""
    rules = [rule("fail", 1, "VERIFY", sequences=[1]), rule("hang", 1, "VERIFY", sequences=[2])]
    async with own("--item-timeout-seconds", "0.5", rules=rules) as door:
        first, second = (await door.generation.Generate(asked(["a", "b"]))).results

        assert (why(first), why(second)) == ("ENGINE_FAILED", "DEADLINE_EXCEEDED")
        await door.freed()


async def test_a_drain_does_not_wait_for_second_runs() -> None:
    """Told to stop while a second run hangs, the sidecar lets the answer go without a verdict and exits 0."""
    async with own(rules=[HANG]) as door:
        call = asyncio.ensure_future(door.generation.Generate(asked(["a"])))
        await verifying(door, 1)
        code = await asyncio.to_thread(door.pair.sidecar.stop, signal.SIGTERM)

        assert (why((await call).results[0]), code) == ("DRAINING", 0)


async def test_a_caller_that_goes_frees_the_engine() -> None:
    """Where the deadline passes in a second run the outcome stays, the engine is freed, and the record says why there is no
    verdict; with a key the second run goes on, until Cancel ends it and the answer is there."""
    async with own(rules=[HANG]) as door:
        with pytest.raises(errors.DeadlineExceeded):
            await door.client.generate(asked(["a"]), timeout=2)  # of which the first run takes next to nothing
        await door.freed()
        assert await door.outcome(1) == ("COMPLETED", "")
        (record,) = await door.client.get(1)
        assert why(record.result) in ("DEADLINE_EXCEEDED", "CANCELLED")

        with pytest.raises(errors.DeadlineExceeded):
            await door.client.generate(asked(["b"], key="k"), timeout=0.5)
        call = asyncio.ensure_future(door.generation.Generate(asked(["b"], key="k")))
        await verifying(door, 2)
        cancelled = await door.client.cancel(2)
        assert (cancelled.cancelled, cancelled.ended) == (0, 1)
        assert why((await call).results[0]) == "CANCELLED"
        await door.freed()


async def test_a_sidecar_killed_in_the_second_run() -> None:
    """The outcome is durable by then: after the restart the key brings the answer, without a verdict, always the same."""
    async with own(rules=[HANG]) as door:
        call = asyncio.ensure_future(door.generation.Generate(asked(["a"], key="k")))
        await verifying(door, 1)
        door.pair.sidecar.kill()
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await call
        door.pair.start_sidecar().wait_for("engine connected")

        answers = [await door.generation.Generate(asked(["a"], key="k"), wait_for_ready=True) for _ in range(2)]
        assert why(answers[0].results[0]) == "ABANDONED"
        assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
        (record,) = (await door.sequencer.Get(sequencer_pb2.GetRequest(sequence=1))).items
        assert record.result == answers[0].results[0]
