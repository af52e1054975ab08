"""What the programs get in place of a server, a channel, a thread and a clock. All between these edges is the product."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import random
import threading
import types
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import grpc
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.v1 import generation_pb2

from sidecar.__main__ import Sidecar
from sidecar.config import Settings
from sidecar.journal.store import Store
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink
from tests.simulation.loop import Died, Node
from tests.simulation.network import Handler, Incoming, Network, Outgoing, rpc_error

EPOCH_MILLIS = 1_700_000_000_000
"""Unix time when the world begins."""
THREAD_SECONDS = 10.0
"""Of real time: a thread that works longer than this hangs."""


class Hooks:
    """Called between the parts of a sidecar. These do nothing."""

    def before_open(self) -> None: ...

    def opened(self, backend: Store) -> Store:
        return backend

    def journal(self, journal: Journal) -> Any:
        return journal

    def link(self, link: EngineLink) -> Any:
        return link

    async def write(self, message: Any, write: Callable[[Any], Awaitable[None]]) -> None:
        await write(message)


class SimulatedServer:
    """In place of serving.server.Server: handlers by path, for `Outgoing` to find."""

    def __init__(self, node: Node, hooks: Hooks | None = None) -> None:
        self.node = node
        self.hooks = hooks or Hooks()
        self.addresses = ["simulated"]
        self.health_address = ""
        self.health: dict[str, bool] = {}
        self._methods: dict[str, tuple[Any, Any]] = {}
        self._open = False
        self._calls: list[Incoming] = []

    def add(self, register: Callable[[Any, Any], None], servicer: object, name: str) -> None:
        register(servicer, self)

    def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for method, handler in handlers.items():
            self._methods[f"/{service}/{method}"] = handler

    async def start(self) -> None:
        self._open = True

    def set_health(self, *names: str, serving: bool) -> None:
        self.health |= dict.fromkeys(names, serving)

    async def stop(self, grace: float) -> None:
        self._open = False
        calls = [call for call in self._calls if not call.over]
        if calls and grace:
            await asyncio.wait([asyncio.ensure_future(call.done()) for call in calls], timeout=grace)
        for call in calls:
            call.cancel()

    def find(self, path: str) -> tuple[Node, Handler] | None:
        """The process and handler for calls of this path, if it is open."""
        if not self._open or self.node.dead:
            return None
        rpc = self._methods[path]
        return self.node, lambda incoming: self._handle(rpc, incoming)

    async def _handle(self, rpc: Any, incoming: Incoming) -> None:
        self._calls = [call for call in self._calls if not call.over]
        self._calls.append(incoming)
        write, hooks = incoming.write, self.hooks

        def seen(message: Any) -> Any:
            """GenerateStream writes its events serialised."""
            streamed = rpc.response_streaming and isinstance(message, bytes)
            return hooks.write(generation_pb2.GenerateEvent.FromString(message) if streamed else message, write)

        incoming.write = seen  # type: ignore[method-assign]
        parse, handler = rpc.request_deserializer, rpc.stream_stream or rpc.unary_stream or rpc.unary_unary
        request = incoming.requests(parse) if rpc.request_streaming else parse(await incoming.inbox.next() or b"")
        answers = handler(request, incoming)
        if hasattr(answers, "__aiter__"):
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    await incoming.write(answer)
        elif rpc.response_streaming:
            await answers  # it writes by itself
        else:
            await incoming.write(await answers)


class Channel:
    """In place of a grpc.aio.Channel to the service."""

    def __init__(self, network: Network, node: Node, service: Callable[[], SimulatedServer | None]) -> None:
        self._network, self._node, self._service = network, node, service

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: object) -> Any:
        async def ask(request: Any, timeout: float | None = None, metadata: object = None) -> Any:
            deadline = None if timeout is None else self._network.loop.time() + timeout
            call = self._open(path, deadline=deadline)
            call.write(request_serializer(request))
            try:
                answer = await call.read()
                return None if answer is None else response_deserializer(answer)
            except errors.OstinatoError as error:
                raise rpc_error(error) from None
            finally:
                call.cancel()

        return ask

    unary_stream = unary_unary

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: object) -> Any:
        return lambda wait_for_ready, metadata: _Execute(
            self._open(path, patient=True), request_serializer, response_deserializer
        )

    def _open(self, path: str, **how: Any) -> Outgoing:
        def server() -> tuple[Node, Handler] | None:
            service = self._service()
            return None if service is None else service.find(path)

        return Outgoing(self._network, "engine", self._node, server, **how)

    async def close(self) -> None: ...


class _Execute:
    """In place of a grpc.aio.StreamStreamCall."""

    def __init__(self, call: Outgoing, serialise: Callable[[Any], bytes], parse: Callable[[bytes], Any]) -> None:
        self._call, self._serialise, self._parse = call, serialise, parse

    async def write(self, message: Any) -> None:
        if self._call.ended:
            raise asyncio.InvalidStateError
        self._call.write(self._serialise(message))
        await asyncio.sleep(0)

    async def read(self) -> Any:
        try:
            message = await self._call.read()
        except errors.OstinatoError as error:
            raise rpc_error(error) from None
        return grpc.aio.EOF if message is None else self._parse(message)

    async def done_writing(self) -> None:
        self._call.write(None)

    def cancel(self) -> None:
        self._call.cancel()


class _SimulatedThread:
    """A real thread that runs only while the loop waits for it: from one wait for work to the next, in one moment."""

    def __init__(self, node: Node, pause: Callable[[], float], target: Callable[[], None]) -> None:
        self._node, self._loop, self._pause = node, node.loop, pause
        self._go, self._rest = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._rest.acquire()
        self._target = target
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._timer: asyncio.TimerHandle | None = None
        self.resting = self.over = self.dismissed = False

    def start(self) -> None:
        self._thread.start()
        assert self._rest.acquire(timeout=THREAD_SECONDS), "the thread does not come to rest"

    def join(self) -> None: ...

    def _run(self) -> None:
        # A context variable tells the process of a callback. Threads do not inherit it.
        context: contextvars.Context = self._node.context()
        with contextlib.suppress(SystemExit, Died):
            context.run(self._target)
        self.over = True
        self._rest.release()

    def wait(self, timeout: float | None) -> None:
        """In the thread: rest until there is work, or so long."""
        if timeout is not None:
            self._loop.call_later(timeout, self.resume, context=self._node.context())
        self.resting = True
        self._rest.release()
        self._go.acquire()
        if self.dismissed:
            raise SystemExit

    def wake(self) -> None:
        """In the loop: there is work, and it is begun in a while."""
        if self.resting and self._timer is None:
            self._timer = self._loop.call_later(self._pause(), self.resume, context=self._node.context())

    def resume(self) -> None:
        self._timer = None
        if self.resting and not self.over:
            self.resting = False
            self._go.release()
            assert self._rest.acquire(timeout=THREAD_SECONDS), "the thread does not come to rest"

    def dismiss(self) -> None:
        """The process is over; the thread must not outlive the test."""
        self.dismissed = True
        if not self.over:
            self._go.release()
        self._thread.join(THREAD_SECONDS)


class _SimulatedQueue:
    """In place of the queue.SimpleQueue between the loop and the journal's thread."""

    def __init__(self, thread: Callable[[], _SimulatedThread | None]) -> None:
        self._jobs: deque[Any] = deque()
        self._thread = thread

    def put(self, job: object) -> None:
        self._jobs.append(job)
        thread = self._thread()
        if thread is not None:
            thread.wake()

    def get(self, timeout: float | None = None) -> Any:
        thread = self._thread()
        assert thread is not None
        if not self._jobs:
            thread.wait(timeout)
        return self.get_nowait()

    def get_nowait(self) -> Any:
        if not self._jobs:
            raise queue.Empty
        return self._jobs.popleft()

    def empty(self) -> bool:
        return not self._jobs


class Process:
    """A sidecar: the program as `sidecar.__main__` wires it, at these edges."""

    def __init__(
        self,
        node: Node,
        network: Network,
        settings: Settings,
        service: Callable[[], SimulatedServer | None],
        open_backend: Callable[[], Store],
        rng: random.Random,
        commit_seconds: tuple[float, float],
        hooks: Hooks | None = None,
    ) -> None:
        """Raises what opening the journal raises."""
        self.node = node
        self.stop = asyncio.Event()
        self._thread: _SimulatedThread | None = None
        loop = node.loop

        def thread(*, target: Callable[[], None], **_: object) -> _SimulatedThread:
            self._thread = _SimulatedThread(node, lambda: rng.uniform(*commit_seconds), target)
            return self._thread

        hooks = hooks or Hooks()
        server = self.server = SimulatedServer(node, hooks)
        clock = types.SimpleNamespace(monotonic=loop.time, time_ns=lambda: EPOCH_MILLIS * 10**6 + round(loop.time() * 1e9))
        simulated = {
            "sidecar.__main__.Server": lambda *_, **__: server,
            "sidecar.__main__.open_journal": lambda *_: open_backend(),
            "sidecar.__main__.MarkFile": lambda path: types.SimpleNamespace(path=path, write=lambda _: None),
            "sidecar.__main__.shares_disk": lambda *_: False,
            "sidecar.__main__.Journal": lambda *given, **how: hooks.journal(Journal(*given, **how)),
            "sidecar.__main__.EngineLink": lambda *given: hooks.link(EngineLink(*given)),
            "sidecar.__main__._engine_credentials": lambda _: (None, None),
            "sidecar.__main__.time": clock,
            "sidecar.__main__.os": types.SimpleNamespace(urandom=random.Random(f"{node}/nonces").randbytes),
            "sidecar.__main__.wall_millis": lambda: EPOCH_MILLIS + round(loop.time() * 1e3),
            "sidecar.journal.writer.time": clock,
            "sidecar.journal.writer.threading": types.SimpleNamespace(Thread=thread),
            "sidecar.journal.writer.queue": types.SimpleNamespace(
                SimpleQueue=lambda: _SimulatedQueue(lambda: self._thread), Empty=queue.Empty
            ),
            "grpc.aio.insecure_channel": lambda *_, **__: Channel(network, node, service),
        }
        with contextlib.ExitStack() as stack:
            for name, stand_in in simulated.items():
                stack.enter_context(mock.patch(name, stand_in))
            self.program = node.context().run(Sidecar, settings, CollectorRegistry())
        self.epoch = self.program.store.head.epoch

    async def run(self) -> int:
        """The exit code."""
        return await self.program.run(self.stop)

    def dismiss(self) -> None:
        if self._thread is not None:
            self._thread.dismiss()
