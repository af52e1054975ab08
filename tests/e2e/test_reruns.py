"""Audits, canaries, verified answers and replays through real programs."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ostinato import errors
from ostinato.chain import check_result
from ostinato.client import Client
from ostinato.digest import is_sampled
from ostinato.requests import Sampling, batch
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.kit import Audited, Door, audited, bytes_of, counted, ended, missing, opened, own, rule, scripted
from tests.pair import Pair
from tests.sidecar.journal_kit import faults
from tests.waiting import eventually

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
            await eventually(lambda: counted(pair, "audit") == Counter(match=7, diverged=2), "they are counted")


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
    async with own(*ALL) as door:
        pair = door.pair
        await items(door, 1, 1)
        await asyncio.to_thread(pair.replace_service, "--script", scripted(fields={"device": "another"})[-1])
        await items(door, 1, 1)
        await eventually(lambda: missing(pair, "audit") == {"FINGERPRINT_CHANGED": 2}, "the first two are skipped")
        await items(door, 1, 1)

        assert {3, 4} <= {each.sequence for each in await judged(door, 2)}
        assert missing(pair, "audit") == {"FINGERPRINT_CHANGED": 2}


WATCHING = ("--canary-seconds", "1000")
THREE = "".join(
    f'[[canary]]\nname = "{name}"\ntext = "Shanghai is"\n[canary.parameters]\n'
    f"seed = {tokens}\nmax_new_tokens = {tokens}\nignore_eos = true\n"
    for name, tokens in (("short", 4), ("middle", 6), ("long", 16))
)


def learned(pair: Pair) -> Counter[str]:
    """How often each canary's answer was learned, by all sidecars of the pair."""
    return Counter(str(record["canary"]) for program in pair.programs for record in program.said("canary learned"))


async def test_a_changed_answer_is_found(tmp_path: Path) -> None:
    """Answers are learned at the first connection, equal at the next one, learned again under another fingerprint, and DIVERGED
    if an engine with the first fingerprint makes another token: in the metrics, and in entries that name the canary."""
    file = tmp_path / "canaries.toml"
    file.write_text(THREE)
    with Pair(service=scripted(), sidecar=[*WATCHING, "--canaries", str(file)]) as pair:
        pair.start()
        await eventually(lambda: learned(pair) == Counter(short=1, middle=1, long=1), "all are learned")
        assert counted(pair, "canary") == Counter()

        for script, verdicts, known in (
            (scripted(), Counter(match=3), 3),
            (scripted(fields={"device": "another"}), Counter(match=3), 6),
            (scripted(rules=[rule("diverge", 5, "CANARY")]), Counter(match=4, diverged=2), 6),
        ):
            await asyncio.to_thread(pair.replace_service, "--script", script[-1])
            await eventually(
                lambda verdicts=verdicts, known=known: (  # type: ignore[misc]
                    counted(pair, "canary") == verdicts and learned(pair).total() == known
                ),
                f"{verdicts}, {known} learned",
            )
        async with opened(pair) as door:
            found = await audited(door.client, "canary")
            assert {each.sequence for each in found} == {0}
            assert Counter(f"{each.said.canary} {each.verdict}" for each in found) == Counter(
                {"short match": 2, "middle match": 1, "middle diverged": 1, "long match": 1, "long diverged": 1}
            )
            assert {each.said.comparison.first_difference for each in found if each.verdict == "diverged"} == {5}
            assert await door.last_sequence() == 0
        pair.stop()
        assert faults(pair.folder / "journal.sqlite") == []


async def test_answers_survive_a_restart() -> None:
    """A restarted sidecar knows the answers of the default canaries, and compares them in each round of the timer. One that the
    engine refuses is counted in each round and logged once."""
    async with own(*WATCHING) as door:
        pair = door.pair
        await eventually(lambda: learned(pair).total() == 5, "all but one are learned")
        assert pair.sidecar.wait_for("canary refused")["canary"] == "json"
        await eventually(lambda: missing(pair, "canary") == {"INVALID_REQUEST": 1}, "it is counted")
        pair.sidecar.kill()
        pair.start_sidecar("--canary-seconds", "0.2")

        await eventually(lambda: counted(pair, "canary")["match"] >= 15, "three rounds")
        await eventually(lambda: missing(pair, "canary")["INVALID_REQUEST"] >= 3, "each round counts the refused one")
        assert set(+counted(pair, "canary")) == {"match"}
        assert learned(pair).total() == 5
        assert len(pair.sidecar.said("canary refused")) == 1


async def test_a_canary_that_kills_the_engine() -> None:
    """A canary under which two engines are lost is not run any more, so the third one survives."""
    async with own(*WATCHING, rules=[rule("crash", 20, "CANARY")]) as door:
        pair = door.pair
        for _ in range(2):
            ended(pair.service)
            pair.start_service()
        await eventually(lambda: missing(pair, "canary").get("ATTEMPTS_EXHAUSTED", 0) > 0, "those under it are given up")
        assert (await door.client.generate("a", max_new_tokens=1)).results[0].HasField("output")
        assert pair.service.running


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
    """Wait until the first run has its outcome and only the second run is left."""

    async def completed() -> bool:
        return await door.kinds(sequence) == ["COMPLETED"]

    await eventually(completed, f"sequence {sequence} has completed")


async def test_verdicts_come_with_the_answers() -> None:
    """If two of six second runs diverge, two verdicts are DIVERGED with the first differing token: in the answers, in AUDITED
    entries after the outcomes, in the metrics, in a stream, and in a retry by key."""
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
        for each in entries:
            assert each.said.comparison.company >= 1
            each.said.comparison.ClearField("company")  # it is the sidecar's, not the caller's
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
        await eventually(lambda: counted(door.pair, "verify") == Counter(match=5, diverged=3), "they are counted")

        head = await door.client.head()
        again = await door.generation.Generate(asked([f"p{n}" for n in range(6)], key="k"))
        assert bytes_of(again) == bytes_of(response)
        assert (await door.client.head()).entry_hash == head.entry_hash

        plain = await door.client.generate("p0", max_new_tokens=8)
        assert not plain.results[0].HasField("comparison")


async def test_second_runs_that_end_without_a_verdict() -> None:
    """If the second run fails, exceeds the item timeout, or is lost with the engine, the answer has a reason in place of a
    verdict, and it is counted. Nothing runs again, and a retry by key gets the same bytes."""
    ways = [rule("fail", 1, "VERIFY", sequences=[1]), rule("hang", 1, "VERIFY", sequences=[2])]
    async with own("--item-timeout-seconds", "0.5", rules=[*ways, rule("crash", 1, "VERIFY", sequences=[3])]) as door:
        pair = door.pair
        first, second = (await door.generation.Generate(asked(["a", "b"]))).results
        await door.freed()
        response = await door.generation.Generate(asked(["c"], key="k"))

        reasons = [why(first), why(second), why(response.results[0])]
        assert reasons == ["ENGINE_FAILED", "DEADLINE_EXCEEDED", "ENGINE_UNAVAILABLE"]
        await eventually(lambda: missing(pair, "verify") == dict.fromkeys(reasons, 1), "they are counted")
        assert counted(pair, "verify") == Counter()
        again = await door.generation.Generate(asked(["c"], key="k"))
        assert bytes_of(again) == bytes_of(response)


async def test_a_drain_does_not_wait_for_second_runs() -> None:
    """On SIGTERM while a second run hangs, the sidecar returns the answer without a verdict and exits with 0."""
    async with own(rules=[HANG]) as door:
        call = asyncio.ensure_future(door.generation.Generate(asked(["a"])))
        await verifying(door, 1)
        code = await asyncio.to_thread(door.pair.sidecar.stop, signal.SIGTERM)

        assert (why((await call).results[0]), code) == ("DRAINING", 0)


async def test_a_caller_that_goes_frees_the_engine() -> None:
    """If the deadline passes during a second run, the outcome stays, the run is cancelled, and the record says why there is no
    verdict. With a key the second run continues, until Cancel ends it and the answer is returned."""
    async with own(rules=[HANG]) as door:
        with pytest.raises(errors.DeadlineExceeded):
            await door.client.generate(asked(["a"]), timeout=2)  # much longer than the first run
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
    """After the restart a retry by key gets the answer without a verdict, and always the same."""
    async with own(rules=[HANG]) as door:
        call = asyncio.ensure_future(door.generation.Generate(asked(["a"], key="k")))
        await verifying(door, 1)
        door.pair.sidecar.kill()
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await call
        door.pair.start_sidecar().wait_for("engine connected")

        answers = [await door.generation.Generate(asked(["a"], key="k"), wait_for_ready=True) for _ in range(2)]
        assert why(answers[0].results[0]) == "ABANDONED"
        assert len(set(map(bytes_of, answers))) == 1
        (record,) = (await door.sequencer.Get(sequencer_pb2.GetRequest(sequence=1))).items
        assert record.result == answers[0].results[0]


INCOMPARABLE = types_pb2.VERDICT_INCOMPARABLE
ASKED = Sampling(seed=2**64 - 1, temperature=0.0, max_new_tokens=8, ignore_eos=True, logprobs=2)


async def all_of(source: Any) -> list[sequencer_pb2.ReplayResponse]:
    return [response async for response in source]


async def test_items_that_are_passed_over() -> None:
    """Items that have not completed are listed and not run. The counts add up. A divergence comes with the record."""
    rules = [
        {"do": "fail", "at": 0, "sequences": [2, 4]},
        {"do": "diverge", "at": 3, "sequences": [5], "purposes": ["REPLAY"]},
    ]
    async with own(rules=rules) as door:
        results = (await door.client.generate(list("abcdef"), **ASKED)).results
        said = await all_of(door.client.replay(2, 2**64 - 1))
        [record] = await door.client.get(5)
        assert await door.last_sequence() == 6, "a replay takes no number"

    assert {each.total for each in said} == {5}
    assert max(each.seen for each in said) == 5
    assert [sequence for each in said for sequence in each.passed_over] == [2, 4]
    [differing] = [each for each in said if each.HasField("record")]
    assert (differing.comparison.sequence, differing.comparison.first_difference) == (5, 3)
    assert differing.record == record
    assert differing.record.result.output == results[4].output
    assert differing.comparison.actual.token_ids[:3] == results[4].output.token_ids[:3]


async def test_drift_names_its_fields_also_after_a_restart() -> None:
    """After a restart of both programs, a replay and a twin on another device name that field, and the first difference."""
    before, after = {"device": "abacus", "driver": "1"}, {"device": "loom", "threads": "2", "driver": "1"}
    differs = [{"do": "diverge", "at": 3, "sequences": [1], "purposes": ["REPLAY"]}]
    fields = ["fingerprint.device", "fingerprint.threads"]
    async with own(fields=before) as door:
        await door.client.generate("a", **ASKED)
        await asyncio.to_thread(door.pair.replace_service, "--script", json.dumps({"fields": after, "rules": differs}))
        await asyncio.to_thread(door.pair.sidecar.stop)
        (await asyncio.to_thread(door.pair.start_sidecar)).wait_for("engine connected")
        async with Client(door.pair.target) as client:
            twin = (await client.generate("a", **ASKED)).results[0]
            said = await all_of(client.replay(1, 2))
            [record] = await client.get(1)
            payloads = [entry.payload async for entry in client.tail(payloads=True) if entry.header.sequence == twin.sequence]

    first, second = sorted(said, key=lambda each: each.comparison.sequence)
    assert (first.comparison.verdict, list(first.comparison.drift)) == (INCOMPARABLE, fields)
    assert (first.comparison.first_difference, first.record.result.output.seed) == (3, 2**64 - 1)
    assert second.comparison.verdict == MATCH
    assert dict(record.fingerprint.fields).items() >= before.items()
    assert list(sequencer_pb2.CompletedPayload.FromString(payloads[1]).twin.drift) == fields
