"""Canaries: an answer is learned once per fingerprint, and later answers that differ are found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.e2e.kit import audited, counted, ended, eventually, missing, opened, rule, scripted
from tests.pair import Pair
from tests.sidecar.journal_kit import verify_journal

WATCHING = ("--canary-seconds", "1000")
THREE = "".join(
    f'[[canary]]\nname = "{name}"\ntext = "Shanghai is"\n[canary.parameters]\n'
    f"seed = {tokens}\nmax_new_tokens = {tokens}\nignore_eos = true\n"
    for name, tokens in (("short", 4), ("middle", 6), ("long", 16))
)


def learned(pair: Pair) -> Counter[str]:
    """How often each canary's answer was learned, by all sidecars of the pair."""
    records = [record for program in pair.programs for record in program.records()]
    return Counter(str(record["canary"]) for record in records if record.get("message") == "canary learned")


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
            pair.service.kill()
            pair.start_service("--script", script[-1])
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
        assert [fault for page in verify_journal(pair.folder / "journal.sqlite") for fault in page.faults] == []


async def test_answers_survive_a_restart() -> None:
    """A restarted sidecar knows the answers of the default canaries. One that the engine refuses is logged once and counted."""
    with Pair(service=scripted(), sidecar=WATCHING) as pair:
        pair.start()
        await eventually(lambda: learned(pair).total() == 5, "all but one are learned")
        refused = pair.sidecar.wait_for("canary refused")
        assert refused["canary"] == "json"
        assert missing(pair, "canary") == {"INVALID_REQUEST": 1}
        pair.sidecar.kill()
        pair.start_sidecar()

        await eventually(lambda: counted(pair, "canary") == Counter(match=5), "all are compared")
        assert learned(pair).total() == 5


async def test_rounds() -> None:
    """Canaries also run on a timer. A refused one is counted in each round and logged once."""
    with Pair(service=scripted(), sidecar=["--canary-seconds", "0.2"]) as pair:
        pair.start()
        await eventually(lambda: counted(pair, "canary")["match"] >= 10, "two more rounds")
        await eventually(lambda: missing(pair, "canary")["INVALID_REQUEST"] >= 3, "each round counts the refused one")
        assert [record.get("message") for record in pair.sidecar.records()].count("canary refused") == 1


async def test_a_canary_that_kills_the_engine() -> None:
    """A canary under which two engines are lost is not run any more, so the third one survives."""
    with Pair(service=scripted(rules=[rule("crash", 20, "CANARY")]), sidecar=WATCHING) as pair:
        pair.start()
        for _ in range(2):
            ended(pair.service)
            pair.start_service()
        await eventually(lambda: missing(pair, "canary").get("ATTEMPTS_EXHAUSTED", 0) > 0, "those under it are given up")
        async with opened(pair) as door:
            assert (await door.client.generate("a", max_new_tokens=1)).results[0].HasField("output")
        assert pair.service.running
