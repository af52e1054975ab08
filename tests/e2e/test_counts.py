"""An engine that diverges in exactly k of n items, and everything that counts them: journal, metrics, report, answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ostinato.client import Client
from ostinato.requests import Sampling
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.kit import Door, counted, opened
from tests.pair import Pair, Program
from tests.waiting import eventually

N, TOKENS, SENT = 10, 16, 4
"""Items per range; tokens of an answer; tokens that a lost attempt had sent."""
FREE_TOKENS = 128
"""Tokens of an unseeded answer: enough choice for a collision check."""
REPEATED, TWINS, RECOVERED, UNSEEDED = (range(first, first + N) for first in range(1, 4 * N, N))
"""Ranges of sequences: verified and replayed; their twins; lost and recovered; equal but for their seeds."""
SHORT = 2
"""Tokens of a canary that ends before it could diverge."""


@dataclass(frozen=True)
class Expected:
    """The expected comparisons of one kind. Items are sequences or canary numbers."""

    kind: str
    equal: Mapping[int, int]
    """Compared tokens of the items whose runs are equal."""
    parted: Mapping[int, int]
    """First differing token of the items whose runs are not."""

    @classmethod
    def of(cls, kind: str, first: Mapping[int, int], second: Mapping[int, int], tokens: Mapping[int, int]) -> Expected:
        """`first`, `second`: from which token on a run has other tokens; `tokens`: the length of each item."""
        never = max(tokens.values())
        parted = {
            item: min(first.get(item, never), second.get(item, never)) for item in tokens if first.get(item) != second.get(item)
        }
        return cls(kind, {item: count for item, count in tokens.items() if item not in parted}, parted)

    @property
    def n(self) -> int:
        return len(self.equal) + len(self.parted)

    @property
    def k(self) -> int:
        return len(self.parted)

    @property
    def compared_tokens(self) -> int:
        return sum(self.equal.values()) + sum(self.parted.values())


@dataclass
class Plan:
    """From which token on each run diverges, and what follows from that."""

    seed: int
    kinds: list[Expected] = field(init=False, repr=False)
    collisions: set[int] = field(init=False, repr=False)
    _made: dict[str, dict[int, int]] = field(init=False, repr=False)
    """By kind of comparison and item: from which token on its second run diverges."""
    _seedless: set[int] = field(init=False, repr=False)
    """Sequences whose runs ignore their seed."""

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)

        def some(band: Iterable[int], *at: int) -> dict[int, int]:
            items = sorted(band)
            return {item: rng.choice(at) for item in rng.sample(items, rng.randint(1, len(items) - 1))}

        every = range(1, UNSEEDED.stop)
        made = self._made = {
            "TWIN": some(TWINS, 3, 9),
            "RECOVERY": some(RECOVERED, 2),
            "VERIFY": some(REPEATED, 7),
            "REPLAY": some(REPEATED, 5, 12),
            "AUDIT": some(every, 2, 3, 8),
            "CANARY": some(range(N), SHORT + 1),
        }
        primary = made["TWIN"] | made["RECOVERY"]
        repeated, all_items = dict.fromkeys(REPEATED, TOKENS), dict.fromkeys(every, TOKENS)
        all_items |= dict.fromkeys(UNSEEDED, FREE_TOKENS)
        self.kinds = [
            Expected.of("twin", {}, made["TWIN"], dict.fromkeys(TWINS, TOKENS)),
            Expected.of("recovery", {}, made["RECOVERY"], dict.fromkeys(RECOVERED, SENT)),
            Expected.of("verify", {}, made["VERIFY"], repeated),
            Expected.of("replay", {}, made["REPLAY"], repeated),
            Expected.of("audit", primary, made["AUDIT"], all_items),
            Expected.of("canary", {}, made["CANARY"], {item: self._canary_tokens(item) for item in range(N)}),
        ]
        self._seedless = set(some(UNSEEDED, 0)) | {rng.choice(UNSEEDED)}
        self.collisions = self._seedless - {min(self._seedless)}

    def kind(self, name: str) -> Expected:
        return next(expected for expected in self.kinds if expected.kind == name)

    def script(self, *, canaries_diverge: bool = False) -> str:
        """For the service, and for the one after the loss, with diverging canaries."""
        first, retried = {"purposes": ["PRIMARY"], "attempts": [1]}, {"purposes": ["PRIMARY"], "attempts": [2]}
        runs: dict[str, dict[str, Any]] = {"TWIN": first, "RECOVERY": retried}
        runs |= {purpose: {"purposes": [purpose]} for purpose in ("VERIFY", "REPLAY", "AUDIT")}
        rules: list[dict[str, Any]] = [
            {"do": "diverge", "at": at, "sequences": [item], **which}
            for name, which in runs.items()
            for item, at in self._made[name].items()
        ]
        rules += [
            {"do": "hang", "at": SENT, "sequences": list(RECOVERED), **first},
            {"do": "forget_seed", "sequences": sorted(self._seedless)},
        ]
        if canaries_diverge:
            rules.append({"do": "diverge", "at": SHORT + 1, "purposes": ["CANARY"]})
        return json.dumps({"rules": rules})

    def canaries(self) -> str:
        """The canaries' file; their names are their numbers."""
        return "".join(
            f'[[canary]]\nname = "{item}"\ntext = "canary {item}"\n[canary.parameters]\n'
            f"seed = 1\nmax_new_tokens = {self._canary_tokens(item)}\nignore_eos = true\n"
            for item in range(N)
        )

    def _canary_tokens(self, item: int) -> int:
        """A script can tell canaries apart only by their length: they have the same purpose and no sequence."""
        return TOKENS if item in self._made["CANARY"] else SHORT


SEEDED = Sampling(seed=7, temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
FREE = Sampling(temperature=1.0, max_new_tokens=FREE_TOKENS, ignore_eos=True)
SECOND_RUNS = ("--audit-rate", "1", "--audit-patience-seconds", "0", "--canary-seconds", "1000")


@pytest.fixture(name="plan")
def _plan() -> Plan:
    plan = Plan(random.randrange(2**32))
    print(plan)
    return plan


@pytest.fixture(name="pair")
def _pair(plan: Plan, tmp_path: Path) -> Iterator[Pair]:
    """A pair with canaries."""
    file, state = tmp_path / "canaries.toml", tmp_path / "state"
    file.write_text(plan.canaries())
    sidecar = [*SECOND_RUNS, "--canaries", str(file)]
    with Pair(service=["--script", plan.script()], sidecar=sidecar, state=state) as pair:
        pair.start()
        yield pair


async def test_k_of_n_everywhere(pair: Pair, plan: Plan) -> None:
    """For every kind of comparison each counter, interval, verdict, answer and entry has k of n, also after a kill -9 and after
    a SIGTERM of the sidecar."""
    async with opened(pair) as door:
        await eventually(lambda: len(pair.sidecar.said("canary learned")) == N, "the canaries are learned")
        prompts = [f"prompt {number}" for number in range(N)]
        verified = await door.client.generate(prompts, verify=True, **SEEDED)
        await door.client.generate(prompts, **SEEDED)
        await settled(door, audits=2 * N)
        await lost_and_recovered(door, plan)
        await door.client.generate(["another"] * N, **FREE)
        replayed = [each.comparison async for each in door.client.replay(REPEATED[0], REPEATED[-1])]
        await settled(door, audits=4 * N)
        await agree(door, plan)
    check_comparisons(replayed, plan.kind("replay"))
    check_comparisons([result.comparison for result in verified.results], plan.kind("verify"))

    for stop in (Program.kill, Program.stop):
        stop(pair.sidecar)
        pair.start_sidecar("--canary-seconds", "0").wait_for("engine connected")
        async with opened(pair) as door:
            await agree(door, plan)
            records = [record for sequence in REPEATED for record in await door.client.get(sequence)]
            check_comparisons([record.result.comparison for record in records], plan.kind("verify"))


async def settled(door: Door, audits: int) -> None:
    """Wait until this many items are audited; nothing is left to compare then."""
    await eventually(lambda: counted(door.pair, "audit").total() == audits, f"{audits} have a verdict")
    await door.freed()


async def lost_and_recovered(door: Door, plan: Plan) -> None:
    """Items that are streamed up to a token, and whose engine is killed: the next one runs them again. A stream goes on where
    the second run repeats what was sent, and is told once to start again where it does not."""
    received, restarted = Counter[int](), Counter[int]()

    async def listen() -> None:
        stream = door.client.stream([f"lost {number}" for number in range(N)], **SEEDED)
        async with aclosing(stream):
            async for event in stream:
                restarted.update([event.restarted.sequence] if event.HasField("restarted") else [])
                for run in event.tokens.runs:
                    received[run.sequence] += len(run.token_ids)

    listening = asyncio.create_task(listen())
    await eventually(
        lambda: len(received) == N and set(received.values()) == {SENT}, "every item is received up to where it hangs"
    )
    assert set(received) == set(RECOVERED)
    door.pair.service.kill()
    door.pair.start_service("--script", plan.script(canaries_diverge=True))
    await listening
    parted = plan.kind("recovery").parted
    assert restarted == Counter(parted.keys())
    assert received == {item: TOKENS + SENT * (item in parted) for item in RECOVERED}
    assert door.pair.metrics()["ostinato_attempts_total"] == N
    await eventually(lambda: counted(door.pair, "canary").total() == N, "the canaries are compared")


async def agree(door: Door, plan: Plan) -> None:
    """Check every count against the plan."""
    journal, colliding = await journalled(door.client)
    report = await door.client.report()
    metrics = door.pair.metrics()
    for expected in plan.kinds:
        compared = {item: comparison for item, comparison in journal if kind_of(comparison) == expected.kind}
        check_comparisons(list(compared.values()), expected, items=list(compared))
        assert counted(door.pair, expected.kind) == Counter(match=expected.n - expected.k, diverged=expected.k)
        [stratum] = [each for each in report.strata if kind_of(each) == expected.kind]
        check_stratum(stratum, expected)
        check_metrics(metrics, expected, stratum)
        alarm = metrics[f'ostinato_divergence_alarm{{grade="exact",kind="{expected.kind}"}}']
        assert (stratum.alarm, alarm) == (expected.k >= 3, stratum.alarm), expected
    assert len(journal) == sum(expected.n for expected in plan.kinds)
    assert len(report.strata) == len(plan.kinds)
    assert not report.not_compared

    k, checks = len(plan.collisions), len(UNSEEDED) - 1
    assert {item for item, collides in colliding.items() if collides} == plan.collisions
    assert len(colliding) == report.collision_checks == metrics["ostinato_collision_checks_total"] == checks
    assert report.collisions == metrics["ostinato_collisions_total"] == k


async def journalled(client: Client) -> tuple[list[tuple[int, types_pb2.Comparison]], dict[int, bool]]:
    """Every comparison in the journal, and by item the results of collision checks."""
    found, collisions = [], {}
    async for entry in client.tail(payloads=True):
        if entry.header.kind == types_pb2.ENTRY_KIND_COMPLETED:
            completed = sequencer_pb2.CompletedPayload.FromString(entry.payload)
            found += [(entry.header.sequence, completed.twin)] if completed.HasField("twin") else []
            if completed.collision:
                collisions[entry.header.sequence] = completed.collision == sequencer_pb2.COLLISION_FOUND
        elif entry.header.kind == types_pb2.ENTRY_KIND_AUDITED:
            audited = sequencer_pb2.AuditedPayload.FromString(entry.payload)
            assert audited.comparison.sequence == entry.header.sequence
            found.append((int(audited.canary or entry.header.sequence), audited.comparison))
    return found, collisions


def check_comparisons(comparisons: list[types_pb2.Comparison], expected: Expected, items: list[int] | None = None) -> None:
    """Check verdict, first difference and length of each item. `items`: of the comparisons, if they are not sequences."""
    items = items or [each.sequence for each in comparisons]
    said = dict(zip(items, comparisons, strict=True))
    assert len(comparisons) == len(said) == expected.n, expected
    assert {kind_of(each) for each in comparisons} == {expected.kind}
    diverged = {item: each for item, each in said.items() if each.verdict == types_pb2.VERDICT_DIVERGED}
    assert {item: each.first_difference for item, each in diverged.items()} == expected.parted, expected
    matched = {item: each for item, each in said.items() if each.verdict == types_pb2.VERDICT_MATCH}
    assert {item: each.compared_tokens for item, each in matched.items()} == expected.equal, expected


def kind_of(given: types_pb2.Comparison | sequencer_pb2.Stratum) -> str:
    return types_pb2.ComparisonKind.Name(given.kind).removeprefix("COMPARISON_KIND_").lower()


def check_metrics(metrics: dict[str, float], expected: Expected, stratum: sequencer_pb2.Stratum) -> None:
    k, n = expected.k, expected.n
    labels = f'{{grade="exact",kind="{expected.kind}"}}'
    assert metrics[f"ostinato_compared_tokens_total{labels}"] == expected.compared_tokens
    assert metrics[f"ostinato_first_difference_token_count{labels}"] == k
    assert metrics[f"ostinato_first_difference_token_sum{labels}"] == sum(expected.parted.values())
    assert metrics[f"ostinato_divergence_rate{labels}"] == k / n
    assert metrics[f"ostinato_divergence_rate_lower{labels}"] == pytest.approx(stratum.recent.lower)
    assert metrics[f"ostinato_divergence_rate_upper{labels}"] == pytest.approx(stratum.recent.upper)
    assert metrics[f"ostinato_divergence_evidence_log10{labels}"] == stratum.evidence_log10


def check_stratum(stratum: sequencer_pb2.Stratum, expected: Expected) -> None:
    k, n = expected.k, expected.n
    assert (stratum.matched, stratum.diverged, stratum.incomparable) == (n - k, k, 0)
    assert stratum.compared_tokens == expected.compared_tokens
    for rate in (stratum.per_comparison, stratum.recent):
        assert (rate.events, rate.trials) == (k, n)
    assert (stratum.per_token.events, stratum.per_token.trials) == (k, expected.compared_tokens + k)
    for span in stratum.token_spans:
        assert span.diverged == sum(span.first <= at <= span.last for at in expected.parted.values())
    assert sum(span.diverged for span in stratum.token_spans) == k
