"""A pair under load, with Prometheus and Alertmanager: healthy, or with divergences, failures, drift and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ostinato
from ostinato.client import Client
from ostinato.errors import OstinatoError

from tests.certificates import Authority
from tests.monitoring.watch import RULES, Prometheus, Webhook, watching
from tests.pair import Pair, held_port
from tests.waiting import until

Caller: TypeAlias = tuple[Callable[[Client], Awaitable[None]], float]
"""A call, and the pause before it is repeated, in seconds."""
SIDECAR, SERVICE = "ostinato-sidecar", "ostinato-service"
DIVERGES_FROM = 60
"""The first sequence whose answer diverges."""
CANARY = """\
[[canary]]
name = "sampled"
text = "Shanghai is"
parameters = { seed = 1, max_new_tokens = 16 }
"""
HEALTHY = {"runs": 8, "delay_seconds": 0.002}
SCRIPT = {
    **HEALTHY,
    "rules": [
        {"do": "diverge", "at": at, "purposes": ["PRIMARY"], "sequences": list(range(DIVERGES_FROM + at, 50_000, 97))}
        for at in (1, 6, 9, 20)
    ]
    + [{"do": "fail", "at": 3, "purposes": ["PRIMARY"], "sequences": list(range(41, 50_000, 301))}]
    + [{"do": "fail", "at": 2, "purposes": ["AUDIT"], "share": 0.2}],
}


@dataclass(frozen=True)
class Running:
    """A pair under Prometheus and Alertmanager."""

    pair: Pair
    authority: Authority
    prometheus: Prometheus
    webhook: Webhook
    start: float
    """Unix time."""

    def reached(self, query: str, seconds: float = 0.0, late: float = 120.0) -> None:
        """Waits until the query has a result, for at least and at most these times."""
        since = time.time()
        until(lambda: bool(self.prometheus.now(query)) and time.time() >= since + seconds, query, late)

    def client(self) -> Client:
        return Client(f"https://{self.pair.target}", credentials=ostinato.tls(self.authority.file))

    @contextlib.contextmanager
    def calling(self, callers: Sequence[Caller]) -> Iterator[None]:
        """Run these callers in a thread until the context ends."""
        over = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(_callers(self.client, callers, over)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(30)


@contextlib.contextmanager
def watched(
    folder: Path,
    script: dict[str, Any],
    *flags: str,
    days: float = 30,
    library: Path | None = None,
    rules: Path = RULES,
    period: str = "500ms",
) -> Iterator[Running]:
    """A pair with this script and these flags of the sidecar. `days`: for which its certificate is valid; `library`: is loaded
    into both programs first."""
    authority = Authority(folder)
    certificate, key = authority.sign("sidecar", days=days)
    flags = ("--tls-certificate", str(certificate), "--tls-key", str(key), *flags)
    with held_port() as ours, held_port() as theirs:
        # The ports are known before programs start, and stay: Prometheus needs up to 5 s to hear of them.
        targets = {SIDECAR: ours.getsockname()[1], SERVICE: theirs.getsockname()[1]}
        sidecar, service = (["--metrics", f"127.0.0.1:{port}"] for port in targets.values())
        with Pair(service=["--script", json.dumps(script), *service], sidecar=[*flags, *sidecar]) as pair:
            pair.env.update({"LD_PRELOAD": str(library)} if library is not None else {})
            with watching(folder, targets, rules, period) as (prometheus, webhook):
                pair.start()
                yield Running(pair, authority, prometheus, webhook, time.time())


@contextlib.contextmanager
def healthy(folder: Path, seconds: float) -> Iterator[Running]:
    """Load of good callers on a pair without faults, for at least this time."""
    canaries = folder / "canaries.toml"
    canaries.write_text(CANARY)  # the default ones need a response format, which the scripted engine does not support
    flags = ["--audit-rate", "0.2", "--audit-patience-seconds", "1", "--canary-seconds", "2", "--canaries", str(canaries)]
    with watched(folder, HEALTHY, *flags) as running, running.calling(good_callers()):
        running.reached('sum(ostinato_comparisons_total{kind="audit",verdict="match"}) > 3', seconds, seconds + 120)
        yield running


@contextlib.contextmanager
def faulty(folder: Path, seconds: tuple[float, float, float]) -> Iterator[Running]:
    """Load for at least these times: before a restart with a new fingerprint, before one of the sidecar, and after."""
    flags = ["--audit-rate", "0.2", "--audit-patience-seconds", "1", "--canary-seconds", "2"]
    with watched(folder, SCRIPT, *flags) as running:
        pair = running.pair
        running.reached(f'count(up{{job=~"{SIDECAR}|{SERVICE}"}} == 1) == 2')
        with running.calling(all_callers()):
            running.reached('ostinato_comparisons_total{kind="twin",verdict="diverged"} > 3', seconds[0])
            pair.service.kill()  # the next one runs its items again
            pair.start_service("--script", json.dumps({**SCRIPT, "fields": {"driver": "another"}})).wait_for("serving")
            running.reached('ostinato_drift_total{kind="twin"} > 0', seconds[1])
            pair.sidecar.stop()
            pair.start_sidecar().wait_for("engine connected")
            running.reached("changes(ostinato_epoch[1m] offset 2s) > 0", seconds[2])
            yield running


async def _callers(connect: Callable[[], Client], callers: Sequence[Caller], over: threading.Event) -> None:
    async with connect() as client:
        calls = [asyncio.create_task(_again(call, client, rest)) for call, rest in callers]
        await asyncio.to_thread(over.wait)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def _again(call: Callable[[Client], Awaitable[None]], client: Client, rest: float) -> None:
    while True:
        with contextlib.suppress(OstinatoError):
            await call(client)
        await asyncio.sleep(rest)


def good_callers() -> Sequence[Caller]:
    """Callers with good requests, which read their answers to the end."""
    keys = itertools.count()

    async def equal(client: Client) -> None:
        await client.generate(["Shanghai is"] * 4, seed=1, top_k=40, max_new_tokens=24, ignore_eos=True)

    async def unseeded(client: Client) -> None:
        await client.generate(["A phrase that repeats"] * 2, max_new_tokens=32, ignore_eos=True)

    async def keyed(client: Client) -> None:
        key = f"key-{next(keys) // 2}"
        await client.generate("Once, and once more", key=key, max_new_tokens=8)

    async def streamed(client: Client) -> None:
        async with contextlib.aclosing(client.stream("Token by token", max_new_tokens=48, ignore_eos=True)) as events:
            await _read(events, leave=False)

    async def replayed(client: Client) -> None:
        async with contextlib.aclosing(client.replay(1, 8)) as events:
            await _read(events, leave=False)

    return [(call, 0.05) for call in (equal, unseeded, keyed, streamed)] + [(replayed, 0.25)]


def all_callers() -> Sequence[Caller]:
    """The good callers, and callers with short deadlines, bad requests and disconnects."""
    streams = itertools.count()

    async def hasty(client: Client) -> None:
        await client.generate("Too slow", max_new_tokens=400, ignore_eos=True, timeout=0.05)

    async def wrong(client: Client) -> None:
        await client.generate("Too much", max_new_tokens=1_000_000)

    async def leaving(client: Client) -> None:
        async with contextlib.aclosing(client.stream("Token by token", max_new_tokens=48, ignore_eos=True)) as events:
            await _read(events, leave=next(streams) % 5 == 0)

    return [*good_callers(), (leaving, 0.05), (hasty, 0.25), (wrong, 0.25)]


async def _read(events: AsyncIterator[object], *, leave: bool) -> None:
    seen = 0
    async for _ in events:
        seen += 1
        if leave and seen == 3:
            return
