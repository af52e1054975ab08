"""The places where a sidecar can die: before and after every step at an interface between its parts, and a run that dies there.

The hooks are the product's own types, so that a method that is added to one has its points at once: Journal (what becomes
durable), Store (what reaches the disk), EngineLink and its Listener (what passes to and from the service), and the server. With
PostgreSQL there is one more, PostgresTables (what is asked of the server); there the line can break too, or the server die.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import psycopg

from ostinato.chain import OUTCOMES
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from sidecar.journal.ledger import Ledger
from sidecar.journal.model import Admission, Audit, Draft, Note, Outcome
from sidecar.journal.postgres import Connection, PostgresTables
from sidecar.journal.store import Store
from sidecar.journal.writer import Journal
from sidecar.link import EngineLink, Listener
from tests.simulation.edges import Hooks
from tests.simulation.history import History
from tests.simulation.loop import Died, Node
from tests.simulation.plan import Fault, Job, Plan
from tests.simulation.postgres_log import PostgresLog, cut
from tests.simulation.stores import Log
from tests.simulation.world import World

DRAFTS = {"admission": Admission, "outcome": Outcome, "audit": Audit, "note": Note}
EVENTS = ("started", "tokens", "finished", "failed")
MESSAGES = ("admitted", "tokens", "restarted", "finished", "failed", "response")

MADE = {types_pb2.ENTRY_KIND_OPENED: "epoch", types_pb2.ENTRY_KIND_ADMITTED: "admission", types_pb2.ENTRY_KIND_AUDITED: "audit"}
MADE.update(dict.fromkeys(OUTCOMES, "outcome"))

NOT_REACHED = {
    "link.drop": "only a service that breaks the protocol brings it about: tests/e2e/test_misbehaving_service.py",
    "listener.engine_fault": "likewise",
    "link.tokenizer": "a gateway asks for it, and it changes nothing: tests/e2e/test_gateway.py",
    "after link.run": "it is cancelled with the process that it keeps connected",
    "database.fence": "no other writer to fence: tests/sidecar/test_journal_postgres.py",
    "database.end_stopped": "no other session holds the log's lock: tests/sidecar/test_journal_postgres_stopped.py",
    "database.committed": "only where a commit is in doubt: test_points.py has that, too",
    **dict.fromkeys(
        ("database.look_up", "database.write", "database.write_entries", "database.write_record", "database.write_notes"),
        "a part of a transaction",
    ),
    **dict.fromkeys(
        ("database.drop_payloads", "database.import_keys", "database.keys"),
        "an operator's command: tests/sidecar/test_journal_maintenance.py",
    ),
}


def methods(interface: type) -> list[str]:
    """What can be called at an interface."""
    return [name for name, _ in inspect.getmembers(interface, inspect.isfunction) if not name.startswith("_")]


INTERFACES: dict[str, type] = {
    "journal": Journal,
    "backend": Store,
    "database": PostgresTables,
    "link": EngineLink,
    "listener": Listener,
}
KINDS = {
    "journal.append": tuple(DRAFTS),
    "backend.append_many": tuple(DRAFTS),
    "database.commit": ("epoch", *DRAFTS),
    "listener.engine_events": EVENTS,
}


def _steps() -> Iterator[str]:
    yield "backend.open"
    for interface, protocol in INTERFACES.items():
        for method in methods(protocol):
            step = f"{interface}.{method}"
            yield from (f"{step} {kind}" for kind in KINDS[step]) if step in KINDS else (step,)
    yield "link.hello"
    yield from (f"server.write {message}" for message in MESSAGES)


POINTS = tuple(
    point
    for step in _steps()
    for point in (f"before {step}", f"after {step}")
    if step not in NOT_REACHED and point not in NOT_REACHED
)
"""Of every store; those of the interface `database` only where there is one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What happens where."""

    point: str
    occurrence: int
    kind: str = "death"
    """Of the sidecar, with the power; or `cut`: of the line to the database, `crash`: of its server. Those two at the interface
    `database`: before a step it fails, after a step it has taken effect without an answer."""


def _named(step: str, arguments: Sequence[Any]) -> list[str]:
    """The step's name, with what it is about."""
    if step in ("journal.append", "backend.append_many"):
        drafts: Sequence[Draft] = [arguments[0]] if step == "journal.append" else arguments[0]
        kinds = {kind for kind, of in DRAFTS.items() for draft in drafts if isinstance(draft, of)}
        return [f"{step} {kind}" for kind in sorted(kinds)]
    if step == "database.commit":
        ledger: Ledger = arguments[0]
        made = {MADE[entry.header.kind] for entry in ledger.entries} | ({"note"} if ledger.notes else set())
        return [f"{step} {kind}" for kind in sorted(made)]
    if step == "listener.engine_events":
        events: list[engine_pb2.RunEvent] = arguments[0]
        return [f"{step} {kind}" for kind in EVENTS if any(event.WhichOneof("event") == kind for event in events)]
    return [step]


class _Pointed:
    """A part of a sidecar, with a point before and after each of these methods."""

    def __init__(self, part: object, interface: str, points: Points) -> None:
        self._part, self._interface, self._points = part, interface, points
        self._methods = frozenset(methods(INTERFACES[interface]))

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._part, name)
        if name not in self._methods:
            return member
        around = self._points.awaited if inspect.iscoroutinefunction(member) else self._points.called
        return partial(around, f"{self._interface}.{name}", member)


class Points(Hooks):
    """Counts what it comes by, and dies where it is told to."""

    def __init__(self, world: World, node: Node, reached: Counter[str], failures: Sequence[Failure]) -> None:
        self._world, self._node, self._reached = world, node, reached
        self._failures = failures

    def reach(self, when: str, steps: Sequence[str]) -> list[str]:
        """What it has come to here, if it is not death: the kinds of the failures."""
        if self._world.network.muted:
            return []  # what is cancelled at the end is cancelled in any order
        kinds = []
        for step in steps:
            point = f"{when} {step}"
            self._reached[point] += 1
            here = (point, self._reached[point])
            kinds += [failure.kind for failure in self._failures if (failure.point, failure.occurrence) == here]
        if "death" in kinds:
            self._world.die(self._node)
            raise Died(steps)
        return kinds

    def called(self, step: str, member: Callable[..., Any], *given: Any, **how: Any) -> Any:
        names = _named(step, given)
        self._strike(self.reach("before", names), member)
        answer = member(*given, **how)
        if isinstance(answer, asyncio.Future):  # the step is over when it has a result
            answer.add_done_callback(lambda _: answer.cancelled() or answer.exception() or self.reach("after", names))
            return answer
        if step == "database.commit":
            self._world.durable(1, given[0].head.index)
        if self._strike(self.reach("after", names), member):
            raise psycopg.OperationalError("the line broke before the answer came")
        return answer

    def _strike(self, kinds: Sequence[str], member: Any) -> bool:
        """Whether the line is gone."""
        if kinds:
            cut(member.__self__)
        if "crash" in kinds:
            store = self._world.store
            assert isinstance(store, PostgresLog)
            store.crash_server(self._world.loop)
        return bool(kinds)

    async def awaited(self, step: str, member: Callable[..., Awaitable[Any]], *given: Any, **how: Any) -> Any:
        names = _named(step, given)
        self.reach("before", names)
        if step == "link.run":
            listener, hello = given
            given = (_Pointed(listener, "listener", self), partial(self.awaited, "link.hello", hello))
        answer = await member(*given, **how)
        self.reach("after", names)
        return answer

    # ---- Hooks

    def before_open(self) -> None:
        self.reach("before", ["backend.open"])

    def opened(self, backend: Store) -> Any:
        self.reach("after", ["backend.open"])
        return _Pointed(backend, "backend", self)

    def journal(self, journal: Any) -> Any:
        return _Pointed(journal, "journal", self)

    def link(self, link: EngineLink) -> Any:
        return _Pointed(link, "link", self)

    async def write(self, message: Any, write: Callable[[Any], Awaitable[None]]) -> None:
        kind = "response"
        if isinstance(message, generation_pb2.GenerateEvent):
            kind = message.WhichOneof("event") or kind
        self.reach("before", [f"server.write {kind}"])
        await write(message)
        self.reach("after", [f"server.write {kind}"])


def plan() -> Plan:
    """A short life in which everything happens once: streams, keys, a full disk, a lost engine, a replay, a drain."""

    def job(number: int, at: float, texts: str, key: str = "", *, streamed: bool = False, tokens: int = 8, **how: Any) -> Job:
        request = generation_pb2.GenerateRequest(idempotency_key=key)
        for text in texts:
            request.items.add(text=text)
        request.parameters.max_new_tokens = tokens
        request.parameters.ignore_eos = True
        return Job(number, at, request, streamed, **how)

    jobs = (
        job(0, 0.6, "abc", "key-0", streamed=True, tokens=14),
        job(1, 0.7, "ab", streamed=True),
        job(2, 0.8, "cd", "key-2", again_after=2.0),
        job(3, 1.0, "e"),
        job(4, 8.3, "f", "key-4", tokens=40, cancels_after=1.0),
        job(5, 3.0, "other", "key-0"),
        job(6, 5.0, "g", "key-6", streamed=True),
        job(7, 9.5, "hi", "key-7", streamed=True),
        job(8, 9.6, "a"),
    )
    jobs[6].request.parameters.stop.extend(f"{number:->256}" for number in range(16))  # a long request has a call of its own
    faults = (
        Fault(1.35, "kill the service", 0.0, 0),
        Fault(4.2, "fill the disk", 2.5, 0),
        Fault(7.0, "replay", 0.0, 0),
        Fault(7.5, "read", 0.0, 0),
        Fault(10.0, "drain the sidecar", 0.0, 0),
    )
    rules: tuple[dict[str, object], ...] = (
        {"do": "diverge", "at": 2, "attempts": [2]},
        {"do": "fail", "at": 3, "sequences": [4]},
    )
    return Plan(
        "points", False, jobs, faults, (0.001, 0.01), (0.001, 0.01), step_seconds=0.1, engine_runs=2, kv_blocks=12, rules=rules
    )


def run_with_failures(store: Log, *failures: Failure) -> tuple[History, Counter[str]]:
    """What came of a run to which this happened; and how often it came by each point."""
    reached, history, newest = Counter[str](), History(), list[Points]()

    def hooks(world: World, node: Node) -> Points:
        newest.append(Points(world, node, reached, failures))
        return newest[-1]

    def tables(db: Connection) -> Any:
        return _Pointed(PostgresTables(db), "database", newest[-1])

    with ExitStack() as stack:
        stack.enter_context(mock.patch("sidecar.journal.postgres.PostgresTables", tables))
        return World(plan(), store, history, hooks).run(), reached
