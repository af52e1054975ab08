"""Retries: until the deadline, for errors that pass, and only of calls that are safe to repeat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ostinato import Client, errors, retry
from ostinato.retry import RetryPolicy
from ostinato.v1 import generation_pb2

from tests.ostinato.fake import Fake, serving, talking

Ask = Callable[[Client, float | None], Awaitable[object]]


async def _streamed(client: Client, timeout: float | None, key: str = "k") -> list[generation_pb2.GenerateEvent]:
    async with aclosing(client.stream("a", key=key, timeout=timeout)) as events:
        return [event async for event in events]


async def _tailed(client: Client, timeout: float | None) -> object:
    return [entry async for entry in client.tail(timeout=timeout)]


SAFE: dict[str, Ask] = {
    "Generate": lambda client, timeout: client.generate("a" * 300_000, key="k", timeout=timeout),  # more than gRPC would retry
    "GenerateStream": _streamed,
    "GetModel": lambda client, timeout: client.model(timeout=timeout),
    "Tail": _tailed,
}


@pytest.fixture(name="quick")
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(retry, "BACKOFF_SECONDS_MAX", 0.01)


def _script(fake: Fake, method: str, answers: list[errors.OstinatoError]) -> None:
    fake.script[method].extend([answer] if method in ("GenerateStream", "Tail") else answer for answer in answers)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", SAFE)
@pytest.mark.parametrize("kind", retry.RETRIED, ids=lambda kind: kind.reason)
async def test_what_passes_is_waited_for(method: str, kind: type[errors.OstinatoError]) -> None:
    """A keyed batch or a read is retried over eight errors in a row, for each error that passes."""
    async with talking() as (fake, client):
        _script(fake, method, [kind("later")] * 8)
        await SAFE[method](client, 60)
        assert fake.count(method) == 9


@pytest.mark.parametrize("method", SAFE)
@pytest.mark.parametrize("kind", sorted(set(errors.TABLE.values()) - set(retry.RETRIED), key=str), ids=lambda k: k.reason)
async def test_what_does_not_pass_is_the_callers(method: str, kind: type[errors.OstinatoError]) -> None:
    """Every other error is raised at once, with or without a key."""
    async with talking() as (fake, client):
        _script(fake, method, [kind("never")])
        with pytest.raises(kind):
            await SAFE[method](client, 60)
        assert fake.count(method) == 1


@pytest.mark.usefixtures("quick")
async def test_a_refusal_behind_a_lost_try_does_not_say_that_nothing_was_done() -> None:
    """After a lost attempt, a refusal raises the loss, with the refusal as its cause: the lost one may have been admitted."""
    async with talking() as (fake, client):
        _script(fake, "Generate", [errors.Disconnected("gone"), errors.GradeNotEarned("never")])
        with pytest.raises(errors.Disconnected) as lost:
            await client.generate("a", key="k", timeout=60)
    assert isinstance(lost.value.__cause__, errors.GradeNotEarned)


@pytest.mark.parametrize("kind", retry.RETRIED, ids=lambda kind: kind.reason)
async def test_without_a_key_there_is_one_try(kind: type[errors.OstinatoError]) -> None:
    """A batch without a key is sent once, and its error is raised."""
    async with talking() as (fake, client):
        _script(fake, "Generate", [kind("later")])
        _script(fake, "GenerateStream", [kind("later")])
        with pytest.raises(kind):
            await client.generate("a", timeout=60)
        with pytest.raises(kind):
            await _streamed(client, 60, key="")
        assert len(fake.calls) == 2


@pytest.mark.parametrize("method", SAFE)
async def test_the_deadline_ends_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the deadline the last error is raised, not DEADLINE_EXCEEDED."""
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 2.0)  # of which the last try has some
    async with talking() as (fake, client):
        _script(fake, method, [errors.EngineUnavailable("starting", retry_after=0.02)] * 1000)
        begun = time.monotonic()
        with pytest.raises(errors.EngineUnavailable):
            await SAFE[method](client, 2.4)
        assert fake.count(method) > 1
        assert time.monotonic() - begun < 30


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", SAFE)
async def test_without_a_deadline_there_is_a_bound(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without a timeout end after a bound."""
    for name in ("READ_SECONDS", "KEYED_SECONDS"):
        for module in ("client", "resume"):
            monkeypatch.setattr(f"ostinato.{module}.{name}", 0.2, raising=False)
    async with talking() as (fake, client):
        _script(fake, method, [errors.Draining("going")] * 1000)
        with pytest.raises(errors.Draining):
            await SAFE[method](client, None)
        assert fake.count(method) > 3


@pytest.mark.parametrize("method", SAFE)
async def test_who_says_when_is_obeyed(method: str) -> None:
    """The client waits for RetryInfo, but not beyond the deadline."""
    async with talking() as (fake, client):
        _script(fake, method, [errors.QueueFull("full", retry_after=0.3)])
        begun = time.monotonic()
        await SAFE[method](client, 60)
        assert time.monotonic() - begun >= 0.3

        _script(fake, method, [errors.QueueFull("full", retry_after=1000)])
        with pytest.raises(errors.QueueFull) as caught:
            await SAFE[method](client, 50)
        assert caught.value.retry_after == 1000


@pytest.mark.usefixtures("quick")
async def test_every_try_knows_what_is_left() -> None:
    """All attempts of a call share one deadline."""
    async with talking() as (fake, client):
        _script(fake, "Generate", [errors.QueueFull("full", retry_after=0.3)] * 2)
        await client.generate("a", key="k", timeout=8)  # gRPC sends so many to a tenth
        first, second, third = (call.seconds_left or 0 for call in fake.calls)
        assert first > second > third


async def test_pauses_grow_and_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is twice the one before, up to a limit, plus jitter; `reset` starts again."""
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    patient = RetryPolicy(None, 1000)
    for _ in range(6):
        await patient.backoff(errors.Draining("going"))
    patient.reset()
    await patient.backoff(errors.Draining("going"))

    for pause, least in zip(pauses, [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 0.2], strict=True):
        assert least <= pause <= 1.25 * least


async def test_a_sidecar_that_comes_back_late(tmp_path: Path) -> None:
    """A keyed batch and a keyed stream that start before the sidecar listens are answered when it does."""
    target, fake = f"unix:{tmp_path}/s", Fake()
    async with Client(target) as client:
        asked: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.generate("a", key="one", timeout=60)),
            asyncio.create_task(_streamed(client, 60, key="two")),
        ]
        done, _ = await asyncio.wait(asked, timeout=0.5)
        assert not done
        async with serving(fake, target):
            response, events = await asyncio.gather(*asked)
        assert {response.results[0].sequence, events[-1].finished.sequence} == {1, 2}
