"""The asyncio client against a server over a real socket: retries, deadlines, errors, streams."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

import ostinato
from ostinato import Client, OstinatoError, errors, retry
from ostinato.client import bearer
from ostinato.v1 import generation_pb2, sequencer_pb2

from tests.ostinato.fake import Fake, serving, talking
from tests.waiting import eventually

Talk = tuple[Fake, Client]


@pytest.fixture(name="talk")
async def _talk() -> AsyncIterator[Talk]:
    async with talking() as talk:
        yield talk


ONCE: dict[str, Callable[[Client], Awaitable[object]]] = {
    "Cancel": lambda client: client.cancel(1),
    "Replay": lambda client: anext(client.replay(1)),
}
READS: dict[str, Callable[[Client], Awaitable[object]]] = {
    "Get": lambda client: client.get(1),
    "Head": lambda client: client.head(),
    "Report": lambda client: client.report(),
    "Tokenize": lambda client: client.tokenize("a"),
}


@pytest.mark.parametrize("method", ONCE | READS)
async def test_only_what_is_safe_is_tried_again(talk: Talk, method: str) -> None:
    """Reads are tried again (test_retry.py has others), Cancel and Replay are not."""
    fake, client = talk
    await client.generate("a")
    fake.script[method].append(errors.Draining("later"))

    if method in READS:
        await READS[method](client)
    else:
        with pytest.raises(errors.Draining):
            await ONCE[method](client)
    assert fake.count(method) == 1 + (method in READS)


@pytest.mark.parametrize(("pushback", "count"), [("-1", 1), ("20", 2)])
async def test_the_server_says_when(talk: Talk, pushback: str, count: int) -> None:
    """grpc-retry-pushback-ms decides whether and when a retry is made."""
    fake, client = talk

    async def push(_request: Any, context: Any) -> None:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "later")

    fake.script["Head"].append(push)
    if count == 1:
        with pytest.raises(errors.Disconnected):
            await client.head()
    else:
        await client.head()
    assert fake.count("Head") == count


async def test_the_deadline_travels(talk: Talk) -> None:
    """The timeout is the call's deadline; without one there is none."""
    fake, client = talk

    await client.generate("a", timeout=30)
    await client.generate("a")
    _ = [event async for event in client.stream("a", timeout=20)]

    assert fake.calls[0].seconds_left == pytest.approx(30, abs=3)
    assert fake.calls[1].seconds_left is None
    assert fake.calls[2].seconds_left == pytest.approx(20, abs=3)


async def test_an_expired_deadline_is_an_error_of_ours(talk: Talk) -> None:
    """DeadlineExceeded is raised on time, and the server's side of the call is cancelled."""
    fake, client = talk
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))

    with pytest.raises(errors.DeadlineExceeded):
        await client.generate("a", timeout=0.2)
    await eventually(lambda: all(call.cancelled for call in fake.calls))


async def test_an_impossible_deadline_is_refused_here(talk: Talk) -> None:
    """A timeout that is not above 0 is refused at the call, also of streams, and nothing is sent."""
    fake, client = talk
    with pytest.raises(ValueError, match=r"^timeout: "):
        await client.generate("a", timeout=0)
    for stream in (lambda: client.stream("a", timeout=0), lambda: client.replay(1, timeout=0), lambda: client.tail(timeout=0)):
        with pytest.raises(ValueError, match=r"^timeout: "):
            stream()
    assert fake.calls == []


@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.QueueFull, errors.Disconnected])
async def test_an_error_comes_back_as_it_was_raised(talk: Talk, kind: type[OstinatoError]) -> None:
    """Class, message, details, field paths and retry_after arrive unchanged, from a call and from a stream; test_errors.py has
    all classes. A lost connection also has the client's target."""
    fake, client = talk
    if issubclass(kind, errors.InvalidRequest):
        violations = [errors.Violation("items[3].parameters.top_p", "above 1"), errors.Violation("parameters.seed", "é")]
        sent: OstinatoError = kind("because", violations=violations)
    else:
        sent = kind("because", retry_after=1.5, details={"name": "value"})
    fake.script["Cancel"].append(sent)
    fake.script["GenerateStream"].append([generation_pb2.GenerateEvent(), sent])

    with pytest.raises(OstinatoError) as from_call:
        await client.cancel(1)
    with pytest.raises(OstinatoError) as from_stream:
        _ = [event async for event in client.stream("a")]

    for caught in (from_call.value, from_stream.value):
        assert type(caught) is kind
        assert vars(caught) == vars(sent) | ({"target": client.target} if kind is errors.Disconnected else {})


async def test_errors_of_others_are_errors_of_ours(talk: Talk) -> None:
    """An error with missing, contradicting or malformed details keeps its code and message."""
    fake, client = talk

    def abort(*details: bytes) -> Callable[..., Awaitable[None]]:
        async def act(_request: Any, context: Any) -> None:
            context.set_trailing_metadata(tuple(("grpc-status-details-bin", each) for each in details))
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a proxy")

        return act

    other = errors.to_status(errors.QueueFull("full")).SerializeToString()
    for answer in (abort(), abort(other), abort(b"\xff\xff")):
        fake.script["Cancel"].append(answer)
        with pytest.raises(OstinatoError, match="a proxy") as caught:
            await client.cancel(1)
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_response_beyond_the_limit_is_refused() -> None:
    """max_response_bytes bounds what is received, above gRPC's 4 MiB too, and is sent so that the sidecar can refuse sooner."""
    async with talking(max_response_bytes=6 * 2**20) as (fake, client):
        fake.script["Head"].extend(sequencer_pb2.HeadResponse(writer="w" * size) for size in (5 * 2**20, 7 * 2**20))
        await client.head()

        with pytest.raises(errors.InvalidRequest, match=r"^the response has 73\d+ bytes, the client accepts 6291456: raise m"):
            await client.head()

        assert fake.calls[0].metadata["ostinato-max-response-bytes"] == str(6 * 2**20)
    with pytest.raises(ValueError, match=r"^max_response_bytes: 0 is not from 1"):
        Client(max_response_bytes=0)


async def test_a_request_beyond_the_servers_limit_is_refused(talk: Talk) -> None:
    """A request that is larger than the server accepts is an InvalidRequest that names both sizes."""
    _, client = talk
    with pytest.raises(errors.InvalidRequest, match=r"^the request has \d+ bytes, the server accepts 4194304: split it"):
        await client.generate("a" * 5 * 2**20)


NO_TARGETS = ["", "localhost", "http://a", "https://", "::1", "[::1]", "unix:", "localhost:", "a b:1", "a:0", "a:65536", "a:१"]


@pytest.mark.parametrize("target", NO_TARGETS)
def test_a_target_without_a_port_is_refused(target: str) -> None:
    """A target that is empty or has no port from 1 to 65535 is a ValueError that says what a target is."""
    with pytest.raises(ValueError, match="^target: must be host:port, https://host:port or unix:/path, not "):
        Client(target)


@pytest.mark.parametrize(
    "target",
    ["localhost:7001", "[::1]:7001", "http://a:1/", "https://a", "unix:/s", "dns:///a:1", "ipv4:127.0.0.1:1"],
)
def test_other_targets_are_taken(target: str) -> None:
    """host:port, http:// with a port, https:// with and without, and gRPC's other schemes are targets."""
    assert Client(target).target == target


async def test_nobody_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is not retried fails at once if no sidecar listens, and so does the start of a follow."""
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 1000)
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(errors.Disconnected, match="failed to connect") as raised:
            await client.generate("a")
        with pytest.raises(errors.Disconnected):
            await anext(client.tail(follow=True, timeout=1))
    assert raised.value.target == "127.0.0.1:1"


async def test_a_closed_client_opens_again(talk: Talk) -> None:
    """close() ends the connections, not the client."""
    _, client = talk
    await client.head()
    await client.close()
    assert (await client.head()).writer == "fake"


async def test_a_stream_tells_what_happens(talk: Talk) -> None:
    """Admitted first, then tokens whose texts are the output's, then one end for each item."""
    _, client = talk

    events = [event async for event in client.stream(["a", "b"])]

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["admitted", "tokens", "tokens", "tokens", "tokens", "finished", "finished"]
    for result in (event.finished for event in events[-2:]):
        runs = [run for event in events for run in event.tokens.runs if run.sequence == result.sequence]
        assert "".join(run.text for run in runs) == result.output.text


async def test_leaving_a_stream_ends_the_call(talk: Talk) -> None:
    """Closing a stream cancels its call."""
    fake, client = talk
    fake.script["GenerateStream"].append([generation_pb2.GenerateEvent(), lambda: asyncio.sleep(1000)])

    async with aclosing(client.stream("a")) as events:
        await anext(events)

    await eventually(lambda: fake.calls[0].cancelled)


async def test_cancelling_the_task_ends_the_call(talk: Talk) -> None:
    """A cancelled caller cancels its call, and sees its own cancellation."""
    fake, client = talk
    fake.script["Generate"].append(lambda *_: asyncio.sleep(1000))
    task = asyncio.create_task(client.generate("a"))
    await eventually(lambda: fake.calls)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: fake.calls[0].cancelled)


async def test_one_target_has_to_be_chosen(talk: Talk) -> None:
    """get and cancel take exactly one of sequence and key."""
    _, client = talk
    for ask in (client.get, client.cancel):
        with pytest.raises(TypeError, match="give one of them"):
            await ask()
        with pytest.raises(TypeError, match="give one of them"):
            await ask(1, key="k")
    with pytest.raises(ValueError, match=r"^sequence: 0 is not from 1"):
        await client.get(0)


def test_the_decoder_is_for_finished_calls() -> None:
    """The synchronous decoder of grpc_status reads an AioRpcError, which errors.from_rpc_error relies on."""
    status = errors.to_status(errors.QueueFull("full"))
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, "full")
    assert rpc_status.from_call(error) == status


# ---- tail: every entry once, in order, through lost connections


LOST = [errors.Draining("going", retry_after=0.01), errors.SlowReader("slow", retry_after=0.01)]


async def _indexes(client: Client, count: int, from_index: int = 1) -> list[int]:
    """The indexes of the first `count` entries of a follow."""
    found: list[int] = []
    async with aclosing(client.tail(from_index, follow=True)) as entries:
        async for entry in entries:
            found.append(entry.header.index)
            if len(found) == count:
                break
    return found


async def test_tail_without_follow_does_not_hide_a_loss() -> None:
    """A tail without follow that breaks after its first entries raises the error."""
    async with talking() as (fake, client):
        await client.generate("a")
        fake.script["Tail"].append([sequencer_pb2.TailResponse(entries=fake.journal.entries[:1]), LOST[0]])
        with pytest.raises(errors.Draining):
            _ = [entry async for entry in client.tail()]


@settings(max_examples=10, deadline=None)
@given(breaks=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([*LOST, None])), max_size=3), start=st.integers(1, 3))
async def test_follow_resumes_where_it_was(breaks: list[tuple[int, errors.OstinatoError | None]], start: int) -> None:
    """A follow that is cut anywhere, with or without an error, misses no entry and repeats none."""
    async with talking() as (fake, client):
        await client.generate(["a"] * 10)
        at = start - 1
        for count, error in breaks:
            sent = sequencer_pb2.TailResponse(entries=fake.journal.entries[at : at + count])
            fake.script["Tail"].append([sent, error] if error else [sent])
            at += count

        assert await _indexes(client, 21 - start, start) == list(range(start, 21))


async def test_follow_raises_what_waiting_does_not_cure() -> None:
    """A follow raises errors that are not a lost connection."""
    async with talking() as (fake, client):
        fake.script["Tail"].append([errors.InvalidRequest("no")])
        with pytest.raises(errors.InvalidRequest):
            await _indexes(client, 1)


async def test_follow_outlives_a_restart(tmp_path: Path) -> None:
    """A follow continues over a restart, also if no entry had come before."""
    fake, target = Fake(), f"unix:{tmp_path}/s"
    async with Client(target) as client:
        async with serving(fake, target):
            silent = asyncio.create_task(_indexes(client, 4))
            while fake.count("Tail") < 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        async with serving(fake, target):
            async with Client(target) as other:
                await other.generate(["a", "b"])
            assert await silent == [1, 2, 3, 4]


async def test_follow_keeps_its_deadline() -> None:
    """The timeout of a follow covers all its connections and the waits between them."""
    async with talking() as (fake, client):
        fake.script["Tail"].append([errors.SlowReader("slow", retry_after=1000)])
        with pytest.raises(errors.DeadlineExceeded):
            async with aclosing(client.tail(follow=True, timeout=0.5)) as entries:
                await anext(entries)


# ---- credentials: checked before the client connects


def test_files_that_hold_nothing_are_named(tmp_path: Path) -> None:
    """A missing file, or one that is not PEM, is named with its argument; a certificate needs its key."""
    (tmp_path / "noise").write_bytes(b"\x30\x82")
    with pytest.raises(ValueError, match=r"^ca: \S*nowhere: No such file"):
        ostinato.tls(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^key: \S*noise: is not a PEM file"):
        ostinato.tls(certificate=tmp_path / "noise", key=tmp_path / "noise")
    with pytest.raises(ValueError, match="certificate, key: one needs the other"):
        ostinato.tls(certificate="client.pem")


@pytest.mark.parametrize("token", ["", "two words", "line\n", "tokén"])
def test_a_token_is_one_word(token: str) -> None:
    """A token that cannot be sent as metadata is refused, and the message does not show it."""
    with pytest.raises(ValueError, match="^token: must be printable ASCII without spaces$"):
        ostinato.Client(token=token)
    assert bearer("x") == "Bearer x"


@pytest.mark.parametrize(
    "target", ["sidecar.example:7001", "http://192.0.2.1:7001", "[2001:db8::1]:7001", "127.0.0.1.example:7001", "dns:host:7001"]
)
def test_a_token_does_not_travel_in_clear_text(target: str) -> None:
    """To a target on a network a token needs TLS or the caller's word; the message does not show the token."""
    with pytest.raises(ValueError, match=r"^token: could be read on the way to .*allow_plaintext_token") as raised:
        ostinato.Client(target, token="secret")

    assert "secret" not in str(raised.value)
    ostinato.Client(target)
    ostinato.Client(target, token="secret", allow_plaintext_token=True)
    ostinato.Client(target, token="secret", credentials=ostinato.tls())


@pytest.mark.parametrize("target", ["localhost:7001", "http://127.0.0.9:7001/", "[::1]:7001", "unix:/run/s", "https://host:1"])
def test_a_token_may_stay_on_the_machine(target: str) -> None:
    """Loopback, a unix socket, and TLS need no word."""
    ostinato.Client(target, token="secret")


async def test_loopback_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment does not get the calls to loopback, nor their token."""
    seen = asyncio.Event()

    async def proxy(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set()
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with server, ostinato.Client(f"127.0.0.1:{held.getsockname()[1]}", token="secret") as client:
            with pytest.raises(errors.Disconnected):
                await client.head(timeout=1)

    assert not seen.is_set()
