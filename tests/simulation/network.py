"""Calls between processes. What travels along one connection arrives late and in order, or the connection breaks.

A cut holds everything back; after KEEPALIVE_SECONDS the caller's side gives its connections up, the other side does so only
later, and until then believes in what is half-open.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_status import rpc_status

from ostinato import errors

from tests.simulation.loop import NO_NODE, Node, VirtualLoop

KEEPALIVE_SECONDS = 15.0
HALF_OPEN_SECONDS = 10.0
"""How much later, at most, the called side notices."""
CONNECT_SECONDS = 0.1
"""Between attempts to connect."""

Deliver = Callable[[], None]
Handler = Callable[["Incoming"], Awaitable[None]]


class Network:
    """All connections, by the path that they go along."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, delay_seconds: tuple[float, float]) -> None:
        self.loop = loop
        self._rng, self._delay_seconds = rng, delay_seconds
        self._cuts: dict[str, int] = {}
        self._cut_number = 0
        self.calls: list[Outgoing] = []
        """Those of which something can still arrive or be lost."""
        self.muted = False
        self.lost = 0
        """Messages that were under way when their connection broke."""

    def delay(self) -> float:
        return self._rng.uniform(*self._delay_seconds)

    def at(self, when: float, deliver: Deliver) -> None:
        self.loop.call_at(when, deliver, context=NO_NODE)

    def later(self, seconds: float, deliver: Deliver) -> None:
        self.at(self.loop.time() + seconds, deliver)

    def is_cut(self, path: str) -> bool:
        return path in self._cuts

    def cut(self, path: str) -> None:
        """Nothing arrives any more, on any connection of this path."""
        self._cut_number += 1
        number = self._cuts[path] = self._cut_number
        self.later(KEEPALIVE_SECONDS, lambda: self._give_up(path, number))

    def heal(self, path: str) -> None:
        """What is still believed in on both sides arrives now."""
        self._cuts.pop(path, None)
        for call in list(self.calls):
            if call.path == path:
                call.flush()

    def _give_up(self, path: str, number: int) -> None:
        if self._cuts.get(path) == number:
            for call in list(self.calls):
                if call.path == path:
                    call.lose(0.0, self._rng.uniform(0.0, HALF_OPEN_SECONDS))

    def died(self, node: Node, *, silently: bool = False) -> None:
        """Its connections are gone; the other side is told at once, or finds out."""
        for call in list(self.calls):
            if node in (call.caller, call.callee):
                noticed = KEEPALIVE_SECONDS if silently else self.delay()
                call.lose(noticed, noticed)

    def reset(self, path: str) -> None:
        """Every connection of this path breaks, with what is under way."""
        for call in list(self.calls):
            if call.path == path:
                call.lose(self.delay(), self.delay())


@dataclass(slots=True)
class _Wire:
    """One direction of one connection."""

    network: Network
    path: str
    last: float = 0.0
    broken: bool = False
    held: deque[Deliver] = field(default_factory=deque)

    def send(self, deliver: Deliver, sender: Node | None) -> None:
        if self.network.muted or (sender is not None and sender.dead):
            return  # a process that dies in the middle of a step finishes the step, but sends nothing
        self.last = max(self.last, self.network.loop.time() + self.network.delay())
        self.network.at(self.last, lambda: self._arrive(deliver))

    def _arrive(self, deliver: Deliver) -> None:
        if self.broken or self.network.muted:
            self.network.lost += self.broken
            return
        if self.held or self.network.is_cut(self.path):
            self.held.append(deliver)
        else:
            deliver()

    def flush(self) -> None:
        while self.held and not self.broken:
            self.held.popleft()()


class _Inbox:
    """Messages that arrived, and how they end."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._messages: deque[bytes] = deque()
        self._bell: asyncio.Future[None] | None = None
        self.ended = False

    def put(self, message: bytes) -> None:
        self._messages.append(message)
        self.ring()

    def end(self) -> None:
        self.ended = True
        self.ring()

    def ring(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None and not bell.done():
            bell.set_result(None)

    async def next(self) -> bytes | None:
        """None: that was all."""
        while not self._messages:
            if self.ended:
                return None
            self._bell = self._loop.create_future()
            await self._bell
        return self._messages.popleft()


class Outgoing:
    """The caller's end of a call."""

    def __init__(
        self,
        network: Network,
        path: str,
        caller: Node | None,
        server: Callable[[], tuple[Node, Handler] | None],
        *,
        patient: bool = False,
        deadline: float | None = None,
    ) -> None:
        """`server` finds who answers, when the call arrives; `patient` calls wait for a server."""
        self.network, self.path, self.caller = network, path, caller
        self.callee: Node | None = None
        self.deadline = deadline
        self._server, self._patient = server, patient
        self._up, self._down = _Wire(network, path), _Wire(network, path)
        self._in = _Inbox(network.loop)
        self.error: errors.OstinatoError | None = None
        self.cancelled = self.lost = False
        self.incoming: Incoming | None = None
        network.calls.append(self)
        self._waiting: list[bytes | None] = []
        self._up.send(self._connect, self.caller)
        if deadline is not None:
            network.at(deadline, lambda: self.end(errors.DeadlineExceeded("the call's time is over")))

    def _connect(self) -> None:
        found = self._server()
        if self.cancelled or self._in.ended:
            return
        if found is None or found[0].dead:
            if self._patient:
                self.network.later(CONNECT_SECONDS, lambda: self._up.send(self._connect, self.caller))
            else:
                self.end(errors.Disconnected("no server"))
            return
        self.callee, handler = found
        self.incoming = Incoming(self, handler, found[0])
        for message in self._waiting:
            self._pass_on(message)

    @property
    def ended(self) -> bool:
        return self._in.ended

    def write(self, message: bytes | None) -> None:
        """None: that was all."""
        self._up.send(lambda: self._pass_on(message), self.caller)

    def _pass_on(self, message: bytes | None) -> None:
        if self.incoming is None:
            self._waiting.append(message)
        elif message is None:
            self.incoming.inbox.end()
        else:
            self.incoming.inbox.put(message)

    async def read(self) -> bytes | None:
        """The next answer; None at the good end. Raises what it ended with."""
        message = await self._in.next()
        if message is None and self.cancelled:
            raise asyncio.CancelledError
        if message is None and self.error is not None:
            raise self.error
        return message

    def cancel(self) -> None:
        """This side is not interested any more."""
        if not self._in.ended:
            self.cancelled = True
            self._in.end()
            self.forget()
            self._up.send(self._cancel_far, self.caller)

    def _cancel_far(self) -> None:
        if self.incoming is not None:
            self.incoming.cancel()

    def end(self, error: errors.OstinatoError | None) -> None:
        """The far side ended it, or is gone."""
        if not self._in.ended:
            self.error = error
            self._in.end()
            self.forget()

    def answer(self, message: bytes) -> None:
        self._down.send(lambda: self._in.put(message), self.callee)

    def finish(self, error: errors.OstinatoError | None) -> None:
        self._down.send(lambda: self.end(error), self.callee)

    def flush(self) -> None:
        self._up.flush()
        self._down.flush()

    def lose(self, caller_seconds: float, callee_seconds: float) -> None:
        """The connection breaks; what is under way is lost, and either side is told after so long."""
        if self.lost:
            return
        self.lost = self._up.broken = self._down.broken = True
        self.forget()
        self.network.later(caller_seconds, lambda: self.end(errors.Disconnected("the connection broke")))
        if self.incoming is not None:
            self.network.later(callee_seconds, self.incoming.cancel)

    @property
    def over(self) -> bool:
        """Whether nothing of it can arrive or be lost any more."""
        # The end of the handler is not the end of the call: its answer may be under way, or held by a cut.
        return self._in.ended and (self.lost or self.incoming is None or self.incoming.over)

    def forget(self) -> None:
        """Take it from the network's list, once it is over."""
        if self.over and self in self.network.calls:
            self.network.calls.remove(self)


class Incoming:
    """The called end: a handler that runs in the called process. Also what a servicer is given as its context."""

    def __init__(self, outgoing: Outgoing, handler: Handler, node: Node) -> None:
        self._call = outgoing
        self._loop = outgoing.network.loop
        self.inbox = _Inbox(self._loop)
        self.over = False
        self._task = node.spawn(self._serve(handler))
        if outgoing.deadline is not None:
            self._loop.call_at(outgoing.deadline, self.cancel, context=node.context())

    async def _serve(self, handler: Handler) -> None:
        try:
            await handler(self)
        except errors.OstinatoError as error:
            self._call.finish(errors.from_status(errors.to_status(error)))
        except asyncio.CancelledError:
            self._call.finish(errors.Disconnected("the server cancelled the call"))
        except Exception as error:  # noqa: BLE001  # as the guard does
            self._call.finish(errors.Internal(repr(error)))
        else:
            self._call.finish(None)
        finally:
            self.over = True
            self._call.forget()

    def cancel(self) -> None:
        self._task.cancel()

    async def done(self) -> None:
        await asyncio.wait({self._task})

    async def requests(self, parse: Callable[[bytes], Any]) -> Any:
        while (message := await self.inbox.next()) is not None:
            yield parse(message)

    def time_remaining(self) -> float | None:
        return None if self._call.deadline is None else self._call.deadline - self._loop.time()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, message: Any) -> None:
        self._call.answer(message if isinstance(message, bytes) else message.SerializeToString())
        await asyncio.sleep(0)


def rpc_error(error: errors.OstinatoError) -> grpc.aio.AioRpcError:
    """As gRPC raises it, details and all. A broken connection has none."""
    none = grpc.aio.Metadata()
    if isinstance(error, errors.Disconnected):
        return grpc.aio.AioRpcError(error.code, none, none, details=error.message)
    status = rpc_status.to_status(errors.to_status(error))
    return grpc.aio.AioRpcError(status.code, none, grpc.aio.Metadata(*status.trailing_metadata), details=status.details)
