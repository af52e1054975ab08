"""What a seed means: who asks for what, and what goes wrong when. Made before anything runs, so that parts can be left out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ostinato.v1 import generation_pb2, types_pb2

SECONDS = 20.0
"""In which jobs begin and faults happen. Afterwards all is mended, and what is unfinished has time to end."""
SEEDS = (0, 1, 42, 2**63, 2**64 - 1)

FAULTS = {
    # name: how often, beside the others
    "kill the sidecar": 6,
    "cut the power": 4,
    "cut the power in a commit": 4,
    "kill the service": 6,
    "vanish the service": 2,
    "bring another model": 2,
    "cut off the engine": 4,
    "cut off the clients": 3,
    "reset the engine stream": 3,
    "reset the clients": 3,
    "pause the sidecar": 3,
    "replace the sidecar": 6,
    "pause the service": 2,
    "slow the engine": 2,
    "drain the sidecar": 3,
    "fill the disk": 3,
    "replay": 3,
    "read": 2,
}

TAKEOVER = "leave another writer's items"


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    name: str
    seconds: float
    """How long, where it lasts."""
    operations: int
    """After how many writes of the disk, where it is in a commit; how many items, where another writer leaves some."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A client's batch, and how long it waits for it."""

    number: int
    at: float
    request: generation_pb2.GenerateRequest
    streamed: bool
    deadline_seconds: float | None = None
    """Of one call; a keyed job is then sent again."""
    hangs_up_after: float | None = None
    """Hangs up, and does not come back."""
    cancels_after: float | None = None
    """Asks for the end of it: by key, or by the numbers where they are known."""
    again_after: float | None = None
    """A second client sends the same, whether or not the first call was answered."""

    @property
    def key(self) -> str:
        return self.request.idempotency_key


@dataclass(frozen=True, slots=True)
class Plan:
    seed: str
    shared: bool
    """Which store: a log that many share, or one file."""
    jobs: tuple[Job, ...]
    faults: tuple[Fault, ...]
    delay_seconds: tuple[float, float] = (0.001, 0.02)
    """Of a message."""
    commit_seconds: tuple[float, float] = (0.001, 0.02)
    """From the first draft that waits to the commit, and from the commit to the answers."""
    step_seconds: float = 0.1
    """Of the engine, for one token of every run."""
    engine_runs: int = 3
    kv_blocks: int = 12
    rules: tuple[dict[str, object], ...] = field(default=())
    settle_seconds: float = 240.0
    """In which everything that is unfinished has to end, once all is mended."""

    def without(self, *, faults: frozenset[int] = frozenset(), jobs: frozenset[int] = frozenset()) -> Plan:
        """The same but for these, by their places."""
        return replace(
            self,
            faults=tuple(fault for number, fault in enumerate(self.faults) if number not in faults),
            jobs=tuple(job for number, job in enumerate(self.jobs) if number not in jobs),
        )


def plan_of(seed: int) -> Plan:
    """Every fourth seed is one of a file, for the sake of its cost."""
    rng = random.Random(f"{seed}/plan")
    shared = seed % 4 != 0
    jobs = tuple(_jobs(rng))
    faults = tuple(sorted([*_faults(rng, shared), *_takeovers(seed, jobs, shared)], key=lambda fault: fault.at))
    slow = rng.choice([0.01, 0.02, 0.2, 1.0])
    rules: list[dict[str, object]] = [{"do": "fail", "at": 2, "share": 0.04}, {"do": "hang", "at": 3, "share": 0.03}]
    if rng.random() < 0.3:
        rules.append({"do": "crash", "at": 1, "share": 0.05})
    if rng.random() < 0.2:
        rules.append({"do": "crash", "at": 1, "sequences": [rng.randint(1, 12)]})  # a poison item
    return Plan(
        seed=str(seed),
        shared=shared,
        jobs=jobs,
        faults=faults,
        delay_seconds=(0.001, slow),
        commit_seconds=(0.001, rng.choice([0.005, 0.05, 0.3])),
        step_seconds=rng.choice([0.02, 0.1, 0.2]),
        engine_runs=rng.choice([1, 2, 4]),
        kv_blocks=rng.choice([6, 9, 16]),
        rules=tuple(rules),
    )


def _jobs(rng: random.Random) -> Iterator[Job]:
    keys: list[str] = []
    for number in range(rng.randint(8, 20)):
        request = generation_pb2.GenerateRequest(items=[_item(rng) for _ in range(rng.choice([1, 1, 2, 3]))])
        request.parameters.max_new_tokens = rng.randint(1, 14)
        if rng.random() < 0.5:
            request.parameters.seed = rng.choice(SEEDS)
        if rng.random() < 0.05:
            request.required_grade = types_pb2.GRADE_EXACT  # more than this engine has earned
        if rng.random() < 0.6:
            # Now and then a client uses a key that is bound to another request.
            request.idempotency_key = rng.choice(keys) if keys and rng.random() < 0.1 else f"key-{number}"
            keys.append(request.idempotency_key)
        keyed = bool(request.idempotency_key)
        yield Job(
            number,
            rng.uniform(0.5, SECONDS),
            request,
            streamed=rng.random() < 0.5,
            deadline_seconds=rng.choice([None, None, rng.uniform(0.2, 8.0)]),
            hangs_up_after=rng.uniform(0.0, 4.0) if rng.random() < 0.12 else None,
            cancels_after=rng.uniform(0.0, 4.0) if rng.random() < 0.12 else None,
            again_after=rng.uniform(0.0, 3.0) if keyed and rng.random() < 0.3 else None,
        )


def _item(rng: random.Random) -> types_pb2.Item:
    item = types_pb2.Item(text=rng.choice("abcdefgh") * rng.choice([1, 4, 20]))
    item.parameters.temperature = rng.choice((0.0, 1.0))
    if rng.random() < 0.03:
        item.parameters.max_new_tokens = 400  # can never fit
    if rng.random() < 0.2:
        item.parameters.max_new_tokens = rng.randint(1, 40)
    return item


def _faults(rng: random.Random, shared: bool) -> Iterator[Fault]:
    names, weights = list(FAULTS), list(FAULTS.values())
    for _ in range(rng.randint(0, 9)):
        name = rng.choices(names, weights)[0]
        if name == "replace the sidecar" and not shared:
            name = "cut the power in a commit"  # a file has one sidecar at a time: its lock sees to that
        yield Fault(rng.uniform(0.0, SECONDS), name, rng.choice([0.3, 2.0, 6.0, 20.0]), rng.randrange(1, 12))


def _takeovers(seed: int, jobs: Sequence[Job], shared: bool) -> Iterator[Fault]:
    """By a chance of their own, so that the rest of a seed is what it was without them. Each just ahead of a job, which is then
    at work with larger numbers when the items are taken over."""
    rng = random.Random(f"{seed}/takeovers")
    for _ in range(rng.choice([0, 1, 2, 3]) if shared else 0):
        job = rng.choice(jobs)
        yield Fault(max(0.0, job.at - 0.01), TAKEOVER, rng.choice([0.3, 1.0]), rng.randint(1, 3))
