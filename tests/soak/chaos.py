"""Programs that die under a load: who is killed when, and what is asked of the survivors afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ostinato.client import Client

from tests.soak import checks
from tests.soak.checks import Record
from tests.soak.load import Load, jobs
from tests.soak.recording import RecordedPair
from tests.waiting import eventually

SCRIPT = json.dumps({"runs": 32, "rules": [{"do": "delay", "at": at, "seconds": 0.03} for at in (0, 4, 9, 15)]})
"""Slow enough that a kill always finds work in flight, with pauses before its first token and between others."""
CLIENTS = 20
LIFE_SECONDS = (0.2, 0.8)
"""Between the return of one program and the next kill."""
READY_SHARE = 0.75
"""Of the kills after which the pair may come together again before the next one."""
READY_SECONDS = 60.0


def seed() -> int:
    """That of the environment, SOAK_SEED, to repeat a run; else a new one. Printed."""
    chosen = int(os.environ.get("SOAK_SEED") or random.randrange(2**32))
    print(f"SOAK_SEED={chosen}")
    return chosen


def pair() -> RecordedPair:
    """Both programs. Attempts have no end here: what dies too often under kills as dense as these would rightly fail."""
    return RecordedPair(service=["--script", SCRIPT], sidecar=["--attempts-max", "1000"])


@dataclass(slots=True)
class Story:
    """A journal's life, chapter by chapter: each a load with kills in it, and then every check."""

    pair: RecordedPair
    rng: random.Random
    record: Record = field(default_factory=Record)
    epochs: int = 1
    chapters: int = 0
    load: Load = field(init=False)
    """Of the newest chapter."""

    async def chapter(self, kills: Sequence[str], *, keyed_share: float = 0.5) -> list[str]:
        """Kill these, "service", "sidecar" or "both", one after the other under one load. What was wrong in the end."""
        self.chapters += 1
        since = len(self.record.admitted) + 1
        source = jobs(self.rng, f"chapter {self.chapters}", keyed_share=keyed_share, repeated_share=0.2)
        self.load = Load(lambda: self.pair.target, source, f"chapter {self.chapters}")
        running = asyncio.create_task(self.load.run(CLIENTS))
        try:
            for name in kills:
                await asyncio.sleep(self.rng.uniform(*LIFE_SECONDS))
                await self.kill(name)
            await asyncio.sleep(LIFE_SECONDS[0])
            self.load.stop()
            async with asyncio.timeout(READY_SECONDS):
                await running
        finally:
            running.cancel()
        return await self.judge(since)

    async def kill(self, name: str) -> None:
        """As a power cut would, and start it again on the same files and address; now and then the next kill finds it
        before it is connected."""
        service, sidecar = self.pair.service, self.pair.sidecar
        if name in ("service", "both"):
            await asyncio.to_thread(service.kill)
            self.pair.start_service()
        if name in ("sidecar", "both"):
            self.epochs += 1
            await asyncio.to_thread(sidecar.kill)
            await asyncio.to_thread(self.pair.start_sidecar)
        if self.rng.random() < READY_SHARE:
            await eventually(self._connected, "an engine is connected", READY_SECONDS)

    async def _connected(self) -> bool:
        return bool((await asyncio.to_thread(self.pair.metrics)).get("ostinato_engine_connected"))

    async def judge(self, since: int) -> list[str]:
        """Wait for what is unfinished, then check this chapter's load and the whole journal so far."""
        async with Client(self.pair.target) as client:

            async def settled() -> bool:
                return not (await client.head(timeout=READY_SECONDS)).unfinished

            await eventually(settled, "every item has ended", READY_SECONDS)
            await self.record.read(client)
            faults = await checks.kept(self.load.calls, client)
        record = self.record
        faults += checks.kept_promises(self.load, record, since) + checks.submitted(self.pair.submissions(), record)
        if record.opened != self.epochs:
            faults.append(f"{record.opened} epochs were opened by {self.epochs} sidecars")
        return faults
