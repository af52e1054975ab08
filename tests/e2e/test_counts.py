"""An engine that diverges in exactly k of n items, and everything that counts them: journal, metrics, report, answers."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import pytest

from ostinato.client import Client
from ostinato.requests import Sampling
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.conftest import Door, eventually, opened
from tests.pair import Pair

N, TOKENS, SENT = 10, 12, 4
"""Items of each kind; tokens of an answer; tokens that a lost attempt had sent."""
QUIET = Sampling(seed=7, temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)


@dataclass
class Expected:
    """Of one kind of comparison."""

    kind: str
    at: int
    """First differing token, where one differs."""
    tokens: int
    """Compared where none does."""
    compared: set[int]
    diverged: set[int]

    @property
    def compared_tokens(self) -> int:
        return self.tokens * (len(self.compared) - len(self.diverged)) + self.at * len(self.diverged)


@dataclass
class Plan:
    """Which sequences are of which kind, and which of them diverge: drawn by a seed."""

    seed: int
    twin: Expected = field(init=False)
    replay: Expected = field(init=False)
    recovery: Expected = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)

        def some(first: int) -> tuple[set[int], set[int]]:
            sequences = set(range(first, first + N))
            return sequences, set(rng.sample(sorted(sequences), rng.randint(1, N - 1)))

        self.replay = Expected("replay", 5, TOKENS, *some(1))
        self.twin = Expected("twin", 3, TOKENS, *some(N + 1))
        self.recovery = Expected("recovery", 2, SENT, *some(2 * N + 1))

    @property
    def script(self) -> str:
        """A replay's, a twin's and a second attempt's divergences; first attempts that hang; and an item that is poison."""
        hung = sorted(self.recovery.compared)
        rules: list[dict[str, Any]] = [
            {"do": "diverge", "at": self.replay.at, "sequences": sorted(self.replay.diverged), "purposes": ["REPLAY"]},
            {"do": "diverge", "at": self.twin.at, "sequences": sorted(self.twin.diverged), "purposes": ["PRIMARY"]},
            {"do": "hang", "at": SENT, "sequences": hung, "attempts": [1], "purposes": ["PRIMARY"]},
            {"do": "diverge", "at": self.recovery.at, "sequences": sorted(self.recovery.diverged), "attempts": [2]},
            {"do": "crash", "sequences": [hung[-1] + 1], "attempts": [1], "purposes": ["PRIMARY"]},
        ]
        return json.dumps({"rules": rules})


@pytest.fixture(name="plan")
def _plan() -> Plan:
    plan = Plan(random.randrange(2**32))
    print(plan)
    return plan


@pytest.fixture(name="pair")
def _pair(plan: Plan) -> Iterator[Pair]:
    with Pair(service=["--script", plan.script]) as pair:
        yield pair.start()


async def test_k_of_n_everywhere(pair: Pair, plan: Plan) -> None:
    """Twin, recovery and replay: each counter, bound, verdict and entry says k of n, also after a kill -9 of the sidecar."""
    async with opened(pair) as door:
        prompts = [f"prompt {number}" for number in range(N)]
        for _ in range(2):
            await door.client.generate(prompts, **QUIET)
        await lost_and_recovered(door, plan)
        said = [each.comparison async for each in door.client.replay(1, N)]
        await agree(door, plan)
    assert {each.sequence for each in said if each.verdict == types_pb2.VERDICT_DIVERGED} == plan.replay.diverged

    assert pair.sidecar is not None
    pair.sidecar.kill()
    pair.start_sidecar()
    async with opened(pair) as door:
        await agree(door, plan)


async def lost_and_recovered(door: Door, plan: Plan) -> None:
    """Items that were heard up to a token, whose engine dies, and which are run again by the next one."""
    heard: Counter[int] = Counter()

    async def listen() -> None:
        stream = door.client.stream([f"another {number}" for number in range(N)], **QUIET)
        async with aclosing(stream):
            async for event in stream:
                for run in event.tokens.runs:
                    heard[run.sequence] += len(run.token_ids)

    listening = asyncio.create_task(listen())
    await eventually(lambda: len(heard) == N and set(heard.values()) == {SENT}, "every item is heard up to where it hangs")
    poison = asyncio.create_task(door.client.generate("poison", max_new_tokens=1))
    service = door.pair.service
    assert service is not None
    await eventually(lambda: not service.running, "the engine is lost")
    door.pair.start_service()
    await asyncio.gather(listening, poison)


async def agree(door: Door, plan: Plan) -> None:
    """All that is said anywhere is what was planned."""
    journal = await journalled(door.client)
    report = await door.client.report()
    metrics = door.pair.metrics()
    for expected in (plan.twin, plan.recovery, plan.replay):
        compared = [each for each in journal if kind_of(each) == expected.kind]
        diverged = [each for each in compared if each.verdict == types_pb2.VERDICT_DIVERGED]
        assert {each.sequence for each in compared} == expected.compared, expected
        assert {each.sequence for each in diverged} == expected.diverged, expected
        assert len(compared) == N
        assert {each.first_difference for each in diverged} == {expected.at}
        assert sum(each.compared_tokens for each in compared) == expected.compared_tokens
        check_metrics(metrics, expected)
        [stratum] = [each for each in report.strata if kind_of(each) == expected.kind]
        check_stratum(stratum, expected)
        alarm = metrics[f'ostinato_divergence_alarm{{grade="exact",kind="{expected.kind}"}}']
        assert (stratum.alarm, alarm) == (len(expected.diverged) >= 3, stratum.alarm)
    assert len(journal) == 3 * N
    assert report.collisions == 0


async def journalled(client: Client) -> list[types_pb2.Comparison]:
    """Every comparison in the journal."""
    found = []
    async for entry in client.tail(payloads=True):
        if entry.header.kind == types_pb2.ENTRY_KIND_COMPLETED:
            completed = sequencer_pb2.CompletedPayload.FromString(entry.payload)
            found += [completed.twin] if completed.HasField("twin") else []
        elif entry.header.kind == types_pb2.ENTRY_KIND_AUDITED:
            found.append(sequencer_pb2.AuditedPayload.FromString(entry.payload).comparison)
    return found


def kind_of(given: types_pb2.Comparison | sequencer_pb2.Stratum) -> str:
    return types_pb2.ComparisonKind.Name(given.kind).removeprefix("COMPARISON_KIND_").lower()


def check_metrics(metrics: dict[str, float], expected: Expected) -> None:
    counts: Counter[str] = Counter()
    for name, value in metrics.items():
        if name.startswith("ostinato_comparisons_total{") and f'kind="{expected.kind}"' in name:
            counts[re.findall('verdict="([a-z]+)"', name)[0]] += round(value)
    k = len(expected.diverged)
    assert +counts == Counter(match=N - k, diverged=k)
    labels = f'{{grade="exact",kind="{expected.kind}"}}'
    assert metrics[f"ostinato_compared_tokens_total{labels}"] == expected.compared_tokens
    assert metrics[f"ostinato_first_difference_token_count{labels}"] == k
    assert metrics[f"ostinato_first_difference_token_sum{labels}"] == k * expected.at
    lower, upper = wilson(k, N)
    assert metrics[f"ostinato_divergence_rate{labels}"] == k / N
    assert metrics[f"ostinato_divergence_rate_lower{labels}"] == pytest.approx(lower)
    assert metrics[f"ostinato_divergence_rate_upper{labels}"] == pytest.approx(upper)


def check_stratum(stratum: sequencer_pb2.Stratum, expected: Expected) -> None:
    k = len(expected.diverged)
    assert (stratum.matched, stratum.diverged, stratum.incomparable) == (N - k, k, 0)
    assert stratum.compared_tokens == expected.compared_tokens
    rate = stratum.per_comparison
    assert (rate.events, rate.trials, rate.lower, rate.upper) == (k, N, *map(pytest.approx, wilson(k, N)))
    assert sum(span.diverged for span in stratum.token_spans) == k
    assert [span.diverged for span in stratum.token_spans if span.first <= expected.at <= span.last] == [k]


def wilson(k: int, n: int) -> tuple[float, float]:
    """Bounds of a share with 95 % confidence: the roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    z = NormalDist().inv_cdf(0.975)
    a, b, c = 1 + z * z / n, -(2 * k / n + z * z / n), (k / n) ** 2
    spread = math.sqrt(b * b - 4 * a * c)
    return (-b - spread) / (2 * a), (-b + spread) / (2 * a)
