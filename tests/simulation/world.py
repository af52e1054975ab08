"""A sidecar, a service, clients, a disk and a network; and what happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from ostinato.digest import input_digest
from ostinato.errors import EpochStale
from ostinato.v1.engine_pb2_grpc import add_EngineServicer_to_server
from serving.program import StartupError

from service.__main__ import start_engine
from service.config import Settings as ServiceSettings
from service.engines.base import Run
from service.engines.scripted import ScriptedEngine, parse
from service.observe import Metrics
from service.prepare import Workers
from service.stream import NAME, EngineServicer
from sidecar.config import Settings
from sidecar.journal.model import JournalBroken, JournalUnusable, Unfinished
from sidecar.journal.store import Store
from sidecar.journal.writer import _Signal
from tests.sidecar.journal_disk import PowerLost
from tests.simulation.clients import Clients
from tests.simulation.edges import EPOCH_MILLIS, Hooks, Process
from tests.simulation.history import History, Stream, Submission
from tests.simulation.loop import Deadlock, Died, Node, VirtualLoop
from tests.simulation.network import Handler, Network, Outgoing
from tests.simulation.plan import SECONDS, Fault, Plan
from tests.simulation.recording import BLOCK_TOKENS, RecordingEngine, RecordingServer
from tests.simulation.stores import Log, SharedLog, SqliteLog, Watched

T = TypeVar("T")

RESTART_SECONDS = (0.1, 2.0)


class InPlace(ThreadPoolExecutor):
    """Work is done where it is submitted: a thread would take real time."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done = Future[T]()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  # the submitter gets it
            done.set_exception(error)
        return done


class World:
    """One run of one plan. `history` is its result."""

    def __init__(self, plan: Plan, store: Log, history: History, hooks: Callable[[World, Node], Hooks] | None = None) -> None:
        """`hooks` is asked for what stands between the parts of each sidecar."""
        self._hooks = hooks or (lambda world, node: Hooks())
        self.plan, self.store, self.history = plan, store, history
        self.loop = VirtualLoop()
        self.rng = random.Random(f"{plan.seed}/world")
        self._takeovers = random.Random(f"{plan.seed}/takeovers in the world")
        answers = random.Random(f"{plan.seed}/answers")
        self.loop.answer_delay = lambda: answers.uniform(*plan.commit_seconds)
        self.network = Network(self.loop, random.Random(f"{plan.seed}/network"), plan.delay_seconds)
        self.clients = Clients(self.loop, self.network, history, self.dial)
        self.sidecar: Process | None = None
        """The one that clients find."""
        self.sidecars: list[Process] = []
        self._backends: dict[Node, Store] = {}
        self.service: RecordingServer | None = None
        self._services = 0
        self._model = "model-0"
        self._step_seconds = plan.step_seconds
        self._engines: list[ScriptedEngine] = []
        self._mended = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._replaced: dict[Node, float] = {}
        """Sidecars that were told of no successor and are not dead, and since when."""

    # ---- the whole

    def run(self) -> History:
        """From the first start to the last look at the disk."""
        asyncio.set_event_loop(self.loop)
        logging.disable(logging.CRITICAL)
        gc.disable()  # what it closes it would close at moments of its own
        try:
            self.loop.run_until_complete(asyncio.wait_for(self._story(), SECONDS + 4 * self.plan.settle_seconds))
        except (TimeoutError, Deadlock) as error:
            self.history.unended = self.history.unended or f"not everything came to its end ({error!r})"
        finally:
            self.history.coverage |= {"a message lost with its connection"} if self.network.lost else set()
            failures = [error for error in self.loop.failures if not isinstance(error, Died)]
            self.history.deaths += [f"a callback raised {error!r}" for error in failures]
            self.network.muted = True
            self.history.out_of_reach += [(since, math.inf) for since in self._replaced.values()]
            self._crash(power=True)
            try:
                self.history.disk = list(self.store.entries())
            except JournalUnusable as error:
                self.history.deaths.append(f"the journal cannot be read any more: {error}")
            self._shut()
            gc.enable()
            logging.disable(logging.NOTSET)
            asyncio.set_event_loop(None)
        return self.history

    async def _story(self) -> None:
        self.start_service()
        self.start_sidecar()
        jobs = [asyncio.ensure_future(self.clients.job(job)) for job in self.plan.jobs]
        faults = [asyncio.ensure_future(self._fault(fault)) for fault in self.plan.faults]
        await asyncio.sleep(SECONDS)
        await asyncio.gather(*faults)
        self._mend()
        await self._within("the clients' jobs", asyncio.gather(*jobs))
        await self._within("the journal", self._settle())
        self.kill_sidecar(power=True)
        keyed = [job for job in self.plan.jobs if job.key]
        await self._within("the afterwards", asyncio.gather(*map(self.clients.afterwards, keyed)))
        await self._within("the journal", self._settle())
        open_to_dead = [call for call in self.network.calls if call.callee is not None and call.callee.dead and not call.lost]
        assert not open_to_dead, "the connections of a dead process are broken"
        assert not any(call.over for call in self.network.calls), "what is over is forgotten"

    async def _within(self, what: str, awaitable: asyncio.Future[Any] | Any) -> None:
        try:
            await asyncio.wait_for(awaitable, self.plan.settle_seconds)
        except TimeoutError:
            self.history.unended = f"{what}: not ended after {self.plan.settle_seconds:.0f} s of peace"
            raise

    async def _settle(self) -> None:
        """Until the sidecar knows of nothing unfinished."""
        while self.sidecar is None or self.sidecar.node.dead or self.sidecar.program.pipeline.items:
            await asyncio.sleep(0.5)

    def _mend(self) -> None:
        self._mended = True
        for path in ("engine", "clients"):
            self.network.heal(path)
        self.store.fill(False)
        self.store.fail_in(-1)

    def _shut(self) -> None:
        for process in self.sidecars:
            process.dismiss()
        for engine in self._engines:
            engine._end_process = lambda code: None
        self.loop.shut()

    # ---- processes

    def start_service(self) -> None:
        """A new one; the one before is gone."""
        self._services += 1
        node = Node(self.loop, f"service-{self._services}")
        server = RecordingServer(node)
        server.world, server.number = self, self._services
        self.service = server
        self.history.note(self.loop.time(), "start", node, self._model)
        self._keep(node.spawn(self._serve(server)))

    async def _serve(self, server: RecordingServer) -> None:
        script = {
            "model": self._model,
            "runs": self.plan.engine_runs,
            "kv_blocks": self.plan.kv_blocks,
            "block_tokens": BLOCK_TOKENS,
            "context_tokens": 1000,
            "delay_seconds": self._step_seconds,
            "rules": list(self.plan.rules),
        }
        settings = ServiceSettings(engine="scripted", self_test="off")
        engine = RecordingEngine(parse(json.dumps(script)), end_process=lambda code: self._end_service(server))
        engine.note = self._submitted
        self._engines.append(engine)
        workers = Workers(1, 1)
        workers._pool = InPlace(1)
        servicer = EngineServicer(workers)
        server.add(add_EngineServicer_to_server, servicer, NAME)
        servicer.streams = await start_engine(engine, settings, Metrics(CollectorRegistry()), "0" * 32)
        await server.start()

    def _submitted(self, stream: Stream, run: Run) -> None:
        history, digest = self.history, input_digest(run.token_ids, run.parameters, run.seed)
        step = history.note(self.loop.time(), "submit", stream.number, run.purpose, run.sequence, run.attempt)
        history.submissions.append(
            Submission(step, stream.number, stream.service, stream.hello.epoch, run.purpose, run.sequence, run.attempt, digest)
        )

    def _end_service(self, server: RecordingServer) -> None:
        """An engine crashes. What it reported arrives first: if Started does not arrive, no item is charged (docs/order.md)."""

        def end() -> None:
            if not server.node.dead and server is self.service:
                self.kill_service()

        self.network.later(2 * self.plan.delay_seconds[1], end)

    def kill_service(self, *, silently: bool = False) -> None:
        """As kill -9, or as a machine that is simply not there any more. Another one is started soon."""
        server = self.service
        if server is None:
            return
        self.service = None
        self.history.note(self.loop.time(), "kill", server.node)
        server.node.kill()
        self.network.died(server.node, silently=silently)
        self.network.later(self.rng.uniform(*RESTART_SECONDS), self.start_service)

    def start_sidecar(self) -> None:
        """A new one, which clients find from now on."""
        node = Node(self.loop, f"sidecar-{len(self.sidecars) + 1}")
        settings = Settings(
            queue_items_max=16, item_timeout_seconds=8.0, drain_seconds=3.0, tick_seconds=0.5, max_response_bytes=1 << 20
        )
        rng = random.Random(f"{self.plan.seed}/{node}")
        hooks = self._hooks(self, node)
        try:
            process = Process(
                node,
                self.network,
                settings,
                lambda: self.service,
                lambda: hooks.opened(self._open(node, hooks)),
                rng,
                self.plan.commit_seconds,
                hooks,
            )
        except (StartupError, JournalUnusable, PowerLost, Died) as error:
            self.history.note(self.loop.time(), "no start", node, type(error).__name__)
            node.kill()
            self._crash_store(node, power=isinstance(error, PowerLost | Died))
            self.network.later(self.rng.uniform(*RESTART_SECONDS), self.start_sidecar)
            return
        self.history.note(self.loop.time(), "start", node, process.epoch)
        self.sidecars.append(process)
        self.sidecar = process
        if self.plan.shared:
            self._watch_takeovers(process)
        self._keep(node.spawn(self._run(process)))

    def _open(self, node: Node, hooks: Hooks) -> Store:
        hooks.before_open()
        backend = self.store.open(EPOCH_MILLIS + round(self.loop.time() * 1e3))
        # What a dead sidecar wrote and could not acknowledge counts from now on.
        self.durable(1, backend.head.index)
        self.history.opened += 1
        self._backends[node] = watched = Watched(backend, self.durable, lambda: self._lost_power(node))
        return watched

    def durable(self, first: int, last: int) -> None:
        """These entries are safe now, if not before."""
        step = self.history.note(self.loop.time(), "durable", first, last)
        for index in range(first, last + 1):
            self.history.durable.setdefault(index, step)

    def die(self, node: Node) -> None:
        """Here and now, and the power with it."""
        self.store.power_off()
        self._lost_power(node)

    def _lost_power(self, node: Node) -> None:
        """In the very middle of a write; whatever the sidecar would do next, it does not."""
        node.kill()
        self.network.at(self.loop.time(), lambda: self._after_power(node))

    def _after_power(self, node: Node) -> None:
        if self.sidecar is not None and self.sidecar.node is node:
            self.kill_sidecar(power=True)
        elif any(process.node is node for process in self.sidecars):  # one that was replaced; its successor has the store
            self.history.note(self.loop.time(), "kill", node, True)
            self._end_connections(node)

    def _end_connections(self, node: Node) -> None:
        """Of a sidecar that is dead."""
        self.network.died(node)
        since = self._replaced.pop(node, None)
        if since is not None:
            self.history.out_of_reach.append((since, self.loop.time()))

    async def _run(self, process: Process) -> None:
        try:
            code = await process.run()
        except Exception as error:  # noqa: BLE001  # as a traceback on stderr, and exit code 1
            self._note_death(process, 1, error)
        else:
            self._note_death(process, code)
        process.node.kill()
        self._end_connections(process.node)
        if process is self.sidecar:
            self.sidecar = None
            self.network.later(self.rng.uniform(*RESTART_SECONDS), self.start_sidecar)

    def _note_death(self, process: Process, code: int, *errors: Exception) -> None:
        """A sidecar may end because it was told to, because its journal is lost to it, or because it was replaced."""
        self.history.note(self.loop.time(), "exit", process.node, code)
        broken, link = process.program.pipeline.broken, process.program.journal.broken
        causes: list[object] = [error for error in errors if not isinstance(error, StartupError)]
        causes += [broken.exception()] if broken.done() and not broken.cancelled() else []
        causes += [link.result()] if link.done() and not link.cancelled() else []
        for cause in causes:
            inner = getattr(cause, "__cause__", None)
            if not isinstance(cause, JournalBroken | EpochStale) or (
                inner is not None and not isinstance(inner, JournalBroken)
            ):
                self.history.deaths.append(f"{process.node} ended with {cause!r}")

    def kill_sidecar(self, *, power: bool) -> None:
        """As kill -9, or as a power cut. Another one is started soon."""
        process = self.sidecar
        if process is None:
            return
        self.sidecar = None
        self.history.note(self.loop.time(), "kill", process.node, power)
        process.node.kill()
        self._crash_store(process.node, power=power)
        self._end_connections(process.node)
        self.network.later(self.rng.uniform(*RESTART_SECONDS), self.start_sidecar)

    def _crash(self, *, power: bool) -> None:
        for process in self.sidecars:
            process.node.kill()
            self._crash_store(process.node, power=power)

    def _crash_store(self, node: Node, *, power: bool) -> None:
        backend = self._backends.pop(node, None)
        self.store.crash(backend, self.rng, power=power)

    # ---- faults

    async def _fault(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at)
        self.history.note(self.loop.time(), "fault", fault.name, fault.seconds)
        match fault.name:
            case "kill the sidecar":
                self.kill_sidecar(power=False)
            case "cut the power":
                self.kill_sidecar(power=True)
            case "cut the power in a commit":
                self.store.fail_in(fault.operations)
            case "kill the service":
                self.kill_service()
            case "vanish the service":
                self.kill_service(silently=True)
            case "bring another model":
                self._model = "model-1" if self._model == "model-0" else "model-0"
                self.kill_service()
            case "cut off the engine":
                await self._cut("engine", fault.seconds)
            case "cut off the clients":
                await self._cut("clients", fault.seconds)
            case "reset the engine stream":
                self.network.reset("engine")
            case "reset the clients":
                self.network.reset("clients")
            case "pause the sidecar" if self.sidecar is not None:
                await self._pause(self.sidecar.node, fault.seconds)
            case "pause the service" if self.service is not None:
                await self._pause(self.service.node, fault.seconds)
            case "replace the sidecar" if self.sidecar is not None:
                await self._replace(self.sidecar.node, fault.seconds)
            case "slow the engine":
                self._step_seconds = 0.5 if self._step_seconds < 0.5 else self.plan.step_seconds
                self.kill_service()
            case "drain the sidecar" if self.sidecar is not None:
                self.history.drains.append((self.history.step, self.sidecar.epoch))
                self.sidecar.stop.set()
            case "fill the disk":
                self.store.fill(True)
                await asyncio.sleep(fault.seconds)
                self.store.fill(False)
            case "leave another writer's items":
                self._leave(fault.operations, fault.seconds)
            case "read":
                self._keep(asyncio.ensure_future(self.clients.read()))
            case "replay":
                self._keep(asyncio.ensure_future(self.clients.replay(1, 1000)))

    def _leave(self, count: int, lease_seconds: float) -> None:
        """Another writer of the log dies; the sidecar that is here takes its items over once its lease has run out."""
        assert isinstance(self.store, SharedLog)
        written = self.store.leave(count, EPOCH_MILLIS + round(self.loop.time() * 1e3), round(lease_seconds * 1e3))
        if written is not None:
            self.durable(*written)
            self.network.later(lease_seconds, self._look_at_leases)

    def _look_at_leases(self) -> None:
        """A sidecar looks at them from time to time; this one does it now."""
        if self.sidecar is not None and not self.sidecar.node.dead:
            self.sidecar.program.journal._jobs.put(_Signal.POLL)

    def _watch_takeovers(self, process: Process) -> None:
        """Note when it is told that items are its own from now on. Often the engine is lost then, while they wait behind newer
        items."""
        journal, on_taken = process.program.journal, process.program.journal._on_taken

        def taken(unfinished: Sequence[Unfinished]) -> None:
            step = self.history.note(self.loop.time(), "takeover", process.node, len(unfinished))
            self.history.taken.update((one.admitted.header.sequence, step) for one in unfinished)
            on_taken(unfinished)
            if self._takeovers.random() < 0.7:
                self.network.later(self._takeovers.uniform(0.01, 0.5), lambda: self.network.reset("engine"))

        journal._on_taken = taken

    async def _cut(self, path: str, seconds: float) -> None:
        with self._out_of_reach():
            self.network.cut(path)
            await asyncio.sleep(seconds)
        self.network.heal(path)

    async def _pause(self, node: Node, seconds: float) -> None:
        with self._out_of_reach():
            node.stop()
            await asyncio.sleep(seconds)
        if not node.dead:
            node.resume()

    async def _replace(self, node: Node, seconds: float) -> None:
        """It is stopped, another one takes its place, and then it continues without knowing of that."""
        # This log has no leases: until it appends or meets the service, it does not know, and its callers wait with it.
        self._replaced.setdefault(node, self.loop.time())
        node.stop()
        await asyncio.sleep(min(0.5, seconds))
        if self.sidecar is not None and self.sidecar.node is node:
            self.start_sidecar()
            self.history.coverage.add("a sidecar that was replaced")
        await asyncio.sleep(seconds)
        if not node.dead:
            self.history.coverage.add("a replaced sidecar that came back")
            node.resume()

    @contextlib.contextmanager
    def _out_of_reach(self) -> Iterator[None]:
        since = self.loop.time()
        yield
        self.history.out_of_reach.append((since, self.loop.time()))

    # ---- ways

    def dial(self, method: str, deadline: float | None) -> Outgoing:
        """A client's call to the present sidecar."""

        def server() -> tuple[Node, Handler] | None:
            return None if self.sidecar is None else self.sidecar.server.find(method)

        return Outgoing(self.network, "clients", None, server, deadline=deadline)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def simulate(plan: Plan, *, trace: bool = False) -> History:
    history = History(trace=[] if trace else None)
    with store_of(plan) as store:
        return World(plan, store, history).run()


@contextlib.contextmanager
def store_of(plan: Plan) -> Iterator[Log]:
    if plan.shared:
        yield SharedLog()
        return
    # Only the journal's name is ever on a real disk, and that one is synced.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="ostinato-", dir=memory if memory.is_dir() else None) as folder:
        yield SqliteLog(Path(folder))
