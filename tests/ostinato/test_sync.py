"""The synchronous client: the same results as the asyncio client, and no call left running."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import ostinato
from ostinato import Client, SyncClient, errors
from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import types_pb2

from tests.ostinato.fake import Fake, serving
from tests.waiting import apart, until

Talk = tuple[Fake, SyncClient]


@pytest.fixture(name="talk")
def _talk(elsewhere: tuple[Fake, str]) -> Iterator[Talk]:
    fake, target = elsewhere
    with SyncClient(target) as client:
        yield fake, client


CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda client: client.generate(["a", [1, 2]], seed=2**64 - 1, logprobs=0),
    "stream": lambda client: client.stream("b", key="k"),
    "get": lambda client: client.get(1),
    "tail": lambda client: client.tail(payloads=True),
    "head": lambda client: client.head(),
    "witness": lambda client: client.witness(types_pb2.SignedHead(last_index=3)),
    "replay": lambda client: client.replay(1, 3),
    "cancel": lambda client: client.cancel(1),
    "model": lambda client: client.model(),
    "tokenize": lambda client: client.tokenize("abc"),
    "report": lambda client: client.report(),
}


async def _answers(client: Any) -> list[object]:
    """Of a client of either kind to all calls."""
    answers = []
    for call in CALLS.values():
        try:
            answer = call(client)
            if inspect.isasyncgen(answer):
                answer = [each async for each in answer]
            elif inspect.iscoroutine(answer):
                answer = await answer
            answers.append(list(answer) if inspect.isgenerator(answer) else answer)
        except errors.OstinatoError as error:
            answers.append(repr(error))
    return answers


def test_both_clients_give_the_same_answers() -> None:
    """Every public method, called alike on two equal sidecars, returns equal messages or raises equal errors."""
    for kind in (Client, SyncClient):
        assert {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"} == {*CALLS, "close"}

    async def in_a_loop() -> list[object]:
        async with Client(one) as client:
            return await _answers(client)

    with apart(serving(Fake())) as one, apart(serving(Fake())) as other, SyncClient(other) as blocking:
        assert asyncio.run(in_a_loop()) == asyncio.run(_answers(blocking))


def test_both_clients_have_the_same_signatures() -> None:
    """Parameters and documentation are those of the asyncio client."""
    for name in CALLS:
        plain, waiting = getattr(Client, name), getattr(SyncClient, name)
        assert inspect.signature(plain) == inspect.signature(waiting)
        assert plain.__doc__ == waiting.__doc__


def test_options_are_those_of_the_asyncio_client(elsewhere: tuple[Fake, str]) -> None:
    """Each call has the token and the bound of a response. Beyond loopback a token needs TLS, or the caller's word."""
    fake, target = elsewhere
    with SyncClient(target, token="secret", max_response_bytes=1 << 20) as client:
        client.head()

    sent = fake.calls[-1].metadata
    assert (sent["authorization"], sent[RESPONSE_BYTES_METADATA]) == ("Bearer secret", str(1 << 20))
    SyncClient("192.0.2.1:7001", token="secret", allow_plaintext_token=True).close()
    SyncClient("192.0.2.1:7001", token="secret", credentials=ostinato.tls()).close()


def test_bad_arguments_are_refused_at_the_call(talk: Talk) -> None:
    """A stream with a wrong argument raises when it is made, not at its first step."""
    _, client = talk
    with pytest.raises(ValueError, match=r"^timeout: "):
        client.stream("a", timeout=0)
    with pytest.raises(TypeError, match=r"^sed: no such parameter"):
        client.stream("a", sed=1)  # type: ignore[call-arg]


def test_an_interrupt_ends_the_call(talk: Talk) -> None:
    """Ctrl-C in a waiting program cancels the call, and the client stays usable."""
    fake, client = talk
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have made us ignore

    def interrupt() -> None:
        while not fake.calls:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.generate("a")
    thread.join()
    signal.signal(signal.SIGINT, before)

    until(lambda: fake.calls[0].cancelled)
    assert client.head().writer == "fake"


def test_leaving_a_stream_ends_the_call(talk: Talk) -> None:
    """Closing a follow cancels its call."""
    fake, client = talk
    client.generate("a")
    entries = client.tail(follow=True)
    assert next(entries).header.index == 1

    entries.close()

    until(lambda: fake.calls[-1].cancelled)


def test_many_threads_share_a_client(talk: Talk) -> None:
    """Calls of several threads do not wait for each other, and their sequences are all different."""
    _, client = talk
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda number: client.generate("a", seed=number), range(50)))
    assert sorted(response.results[0].sequence for response in responses) == list(range(1, 51))
    assert [response.results[0].output.seed for response in responses] == list(range(50))


def test_closing_ends_what_other_threads_wait_for(talk: Talk) -> None:
    """close() makes waiting calls and follows raise Cancelled; later calls raise RuntimeError, but not the end of a stream."""
    fake, client = talk
    client.generate("b")
    unfinished = client.tail(follow=True)
    next(unfinished)
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))
    with ThreadPoolExecutor(2) as pool:
        waiting: list[Future[Any]] = [
            pool.submit(client.generate, "a"),
            pool.submit(lambda: list(client.tail(follow=True))),
        ]
        until(lambda: fake.count("Generate") == fake.count("Tail") == 2)

        client.close()

        assert all(isinstance(each.exception(30), errors.Cancelled) for each in waiting)
    with pytest.raises(RuntimeError, match="closed"):
        client.head()
    client.close()
    unfinished.close()


def test_the_public_names() -> None:
    """The package exports these names, and each can be imported."""
    assert ostinato.__all__ == ["Client", "OstinatoError", "SyncClient", "__version__", "tls"]
    assert all(hasattr(ostinato, name) for name in ostinato.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = ostinato.Server


def test_the_package_is_light() -> None:
    """Importing the package loads neither gRPC nor the command's libraries; a client loads only gRPC."""
    script = """
import sys, ostinato
assert not {"grpc", "typer", "rich"} & set(sys.modules), "package"
ostinato.SyncClient
assert not {"typer", "rich", "ostinato.cli"} & set(sys.modules), "client"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
