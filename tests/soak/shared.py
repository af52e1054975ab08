"""Several sidecars on one log in PostgreSQL, each with a service of its own, under clients that go to whichever they like."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

from ostinato.client import Client

from tests.pair import Pair
from tests.postgres import Postgres
from tests.sidecar.journal_kit import faults as faults_of
from tests.simulation.plan import Job
from tests.soak import checks
from tests.soak.chaos import SCRIPT
from tests.soak.checks import COMPLETED, Record
from tests.soak.load import Load, jobs
from tests.soak.recording import RecordedPair

LEASE_SECONDS = 1.0
CLIENTS = 6
SETTLED_SECONDS = 60.0


class Roaming(Load):
    """Clients that ask another sidecar every time, and one at each sidecar that asks no other."""

    def __init__(self, pairs: Sequence[Pair], source: Iterator[Job], rng: random.Random, name: str) -> None:
        super().__init__(lambda: "", source)
        self._pairs, self._rng = pairs, rng
        self._own = {pair: jobs(rng, f"{name} at {number}", keyed_share=1) for number, pair in enumerate(pairs)}
        self.answered: dict[Pair, list[tuple[float, float]]] = {pair: [] for pair in pairs}
        """When each job of a sidecar's own client was first sent, and when it was answered."""

    async def run(self, clients: int) -> None:
        """As `Load.run`: this many clients that go to all sidecars, and one at each."""
        async with asyncio.TaskGroup() as group:
            group.create_task(super().run(clients))
            for pair in self._pairs:
                group.create_task(self._resident(pair))

    async def _resident(self, pair: Pair) -> None:
        async with Client(pair.target) as client:
            for job in self._own[pair]:
                sent_at = time.monotonic()
                await self._answer(lambda: client, job)
                if self._over:
                    return
                self.answered[pair].append((sent_at, time.monotonic()))

    def answered_since(self, pair: Pair, since: float) -> bool:
        """Whether a job that was sent after this was answered there."""
        return bool(self.answered[pair]) and self.answered[pair][-1][0] >= since

    def longest_wait(self, pair: Pair, since: float) -> float:
        """Seconds without an answer of it, at most, from then on."""
        ends = [since, *(answered_at for _, answered_at in self.answered[pair] if answered_at > since)]
        return max((b - a for a, b in itertools.pairwise(ends)), default=0.0)

    async def _client(self) -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(pair.target)) for pair in self._pairs]
            for job in self._source:
                await self._answer(lambda: self._rng.choice(clients), job)
                if self._over:
                    return


class Sidecars:
    """What runs, and who is killed."""

    def __init__(self, server: Postgres, pairs: Sequence[RecordedPair], url: str, rng: random.Random) -> None:
        self.server, self.pairs, self.url, self._rng = server, pairs, url, rng
        self.fenced = 0
        """Sidecars that ended by themselves, because another had taken over their items."""
        self.load: Roaming | None = None
        self.waits: list[float] = []
        """By pause, the longest time in seconds for which a sidecar that was not stopped gave no answer."""

    async def kill(self) -> None:
        """One of them, as a power cut would; it comes back before its lease has run out, or after."""
        pair = self._rng.choice(self.pairs)
        await asyncio.to_thread(pair.sidecar.kill)
        await asyncio.sleep(self._rng.choice((0.0, 2.5 * LEASE_SECONDS)))
        await self.start(pair)

    async def pause(self) -> None:
        """One of them stands still for longer than its lease, and until each of the others has answered what it was asked
        meanwhile: whatever the stopped one has locked. Then it goes on where it was."""
        load = self.load
        assert load is not None
        await self._answering(self.pairs)
        await asyncio.sleep(self._rng.uniform(0, 0.5))
        pair = self._rng.choice(self.pairs)
        others = [other for other in self.pairs if other is not pair]
        since = time.monotonic()
        os.kill(pair.sidecar.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(2, 4) * LEASE_SECONDS)
            await self._answering(others)
        finally:
            os.kill(pair.sidecar.pid, signal.SIGCONT)
        self.waits.append(max(load.longest_wait(other, since) for other in others))

    async def _answering(self, pairs: Sequence[Pair]) -> None:
        """Until each of these has answered something that it is asked from now on."""
        assert self.load is not None
        since = time.monotonic()
        while not all(self.load.answered_since(pair, since) for pair in pairs):
            assert time.monotonic() < since + SETTLED_SECONDS, "a sidecar gives no answer"
            await asyncio.sleep(0.05)
            await self.watch()

    async def crash_server(self) -> None:
        """The server dies, and recovers."""
        await asyncio.to_thread(self.server.crash)
        await asyncio.sleep(self._rng.uniform(0, 1))
        await asyncio.to_thread(self.server.start)

    async def start(self, pair: Pair) -> None:
        """A sidecar that ended, on the same address; again, if its journal was not there."""
        for attempt in itertools.count(1):
            try:
                await asyncio.to_thread(pair.start_sidecar)
                return
            except AssertionError:
                if attempt == 20:
                    raise
                await asyncio.sleep(0.2)

    async def watch(self) -> None:
        """Start what was fenced again; nothing else may end by itself."""
        for pair in self.pairs:
            if not pair.sidecar.running:
                assert any("fenced" in line for line in pair.sidecar.lines), "\n".join(pair.sidecar.lines[-20:])
                self.fenced += 1
                await self.start(pair)

    async def settled(self, client: Client) -> Record:
        """The whole log, once every item has ended."""
        deadline = time.monotonic() + SETTLED_SECONDS
        record = await Record().read(client)
        while set(record.admitted) != set(record.outcomes):
            assert time.monotonic() < deadline, f"{sorted(set(record.admitted) - set(record.outcomes))} never end"
            await asyncio.sleep(0.1)
            await self.watch()
            with contextlib.suppress(Exception):
                await record.read(client)
        return record


@contextlib.contextmanager
def pairs_on(url: str, *writers: str, script: str, lease_seconds: float) -> Iterator[list[RecordedPair]]:
    """A pair for each writer of this log, connected."""
    with contextlib.ExitStack() as stack:
        sidecar = ["--journal", url, "--lease-seconds", str(lease_seconds)]
        pairs = [RecordedPair(service=["--script", script], sidecar=[*sidecar, "--writer", writer]) for writer in writers]
        for pair in pairs:
            stack.enter_context(pair).start_service()
        for program in [pair.start_sidecar() for pair in pairs]:
            program.wait_for("engine connected")
        yield pairs


@contextlib.contextmanager
def sidecars(server: Postgres, rng: random.Random, count: int = 3) -> Iterator[Sidecars]:
    """On a new log."""
    url, writers = server.url(server.schema()), [f"writer-{number}" for number in range(count)]
    with pairs_on(url, *writers, script=SCRIPT, lease_seconds=LEASE_SECONDS) as pairs:
        yield Sidecars(server, pairs, url, rng)


async def chapter(
    shared: Sidecars, rng: random.Random, kills: int, pauses: int, crashes: int
) -> tuple[Load, Record, list[str]]:
    """A load of keyed batches in which sidecars die or stand still and the server crashes; what was wrong in the end."""
    name = f"shared {rng.random()}"
    load = shared.load = Roaming(shared.pairs, jobs(rng, name, keyed_share=1, repeated_share=0.3), rng, name)
    running = asyncio.create_task(load.run(CLIENTS))
    todo = [shared.kill] * kills + [shared.pause] * pauses + [shared.crash_server] * crashes
    rng.shuffle(todo)
    try:
        for act in todo:
            await asyncio.sleep(rng.uniform(0.2, 0.8))
            await act()
            assert not running.done(), "the load goes on until it is told to stop"
            await shared.watch()
        load.stop()
        deadline = time.monotonic() + SETTLED_SECONDS
        while not running.done() and time.monotonic() < deadline:
            await asyncio.wait({running}, timeout=0.2)
            await shared.watch()
        await asyncio.wait_for(running, 1)
    finally:
        running.cancel()
    async with Client(rng.choice(shared.pairs).target) as client:
        record = await shared.settled(client)
        faults = await checks.kept(load.calls, client, most=200)
    faults += checks.kept_promises(load, record) + submitted(shared.pairs, record)
    faults += faults_of(shared.url)
    return load, record, faults


def submitted(pairs: Sequence[RecordedPair], record: Record) -> list[str]:
    """First attempts reached each engine in order of sequence, no attempt ran twice, and what completed ran at its writer."""
    ran, by_writer = Counter[tuple[int, int]](), dict[str, set[tuple[int, int]]]()
    faults = []
    for number, pair in enumerate(pairs):
        lines = [(line.sequence, line.attempt) for line in pair.submissions()]
        firsts = [sequence for sequence, attempt in lines if attempt == 1]
        if firsts != sorted(firsts):
            faults.append(f"writer-{number}: first attempts reached the engine out of order")
        ran.update(lines)
        by_writer[f"writer-{number}"] = set(lines)
    faults += [f"sequence {sequence}: attempt {attempt} ran twice" for (sequence, attempt), times in ran.items() if times > 1]
    return faults + [
        f"sequence {sequence}: attempt {outcome.attempt} never ran at {outcome.writer}"
        for sequence, outcome in record.outcomes.items()
        if outcome.kind == COMPLETED and (sequence, outcome.attempt) not in by_writer[outcome.writer]
    ]
