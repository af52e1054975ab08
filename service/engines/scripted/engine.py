"""The runs of the scripted engine: one task on the event loop, one token of every run a step."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from prometheus_client import Metric

from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Events, Run
from service.engines.scripted.script import Rule, Script
from service.engines.scripted.tokens import Tokens
from service.engines.scripted.vocabulary import ByteVocabulary

VERSION = "1"
"""Of the rule that makes tokens; another one makes others."""
CRASHED = 70
"""Exit code of a scripted crash."""
CRASH_SECONDS = 0.05
"""From the last token to the crash. What was reported is on its way by then, as it is with engines that need time to fail."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    run: Run
    tokens: Tokens
    rules: list[Rule]
    blocks: int
    made: int = 0
    wake_at: float = -math.inf
    diverged: bool = False
    done: set[int] = field(default_factory=set)
    """Indexes of rules that have happened and do so only once."""


class ScriptedEngine:
    """A `service.engines.base.Engine`. Runs enter in order of submission, as long as there is room for the next one."""

    name = "scripted"
    logprob_kind = types_pb2.LOGPROB_KIND_RAW
    proof_seconds = 0.0
    prefix_cache = False

    def __init__(self, script: Script, *, end_process: Callable[[int], object] = os._exit) -> None:
        self.script = script
        self.vocabulary = ByteVocabulary()
        self.submitted: deque[int] = deque(maxlen=script.record)
        """The last sequences, in order of submission, as many as the script's `record` says."""
        self.model_name, self.chat = script.model, script.chat
        self.context_tokens, self.top_k_max = script.context_tokens, script.top_k_max
        self.capacity = engine_pb2.Capacity(runs=script.runs, kv_blocks=script.kv_blocks, block_tokens=script.block_tokens)
        self.ceiling = script.grade, "the script says so"
        self._end_process = end_process
        self._waiting: OrderedDict[int, Run] = OrderedDict()
        self._active: dict[int, _Active] = {}
        self._free_blocks = script.kv_blocks
        self._bell = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_events: Callable[[Events], None] = lambda events: None
        self._on_grade: Callable[[types_pb2.Grade.ValueType, str], None] = lambda grade, reason: None

    @property
    def fields(self) -> Mapping[str, str]:
        own = {"engine": self.name, "engine_version": VERSION, "model": self.model_name}
        return own | {"tokenizer": "bytes", "template": "turns"} | dict(self.script.fields)

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        raise ValueError("the scripted engine obeys no grammar")

    def collect(self) -> Iterable[Metric]:
        return ()

    def start(self, on_events: Callable[[Events], None], on_grade: Callable[[types_pb2.Grade.ValueType, str], None]) -> None:
        self._on_events, self._on_grade = on_events, on_grade
        self._task = asyncio.get_running_loop().create_task(self._work())

    def submit(self, run: Run) -> None:
        if self.submitted.maxlen:
            self.submitted.append(run.sequence)
        self._waiting[run.run_id] = run
        self._bell.set()

    def cancel(self, run_id: int) -> None:
        self._waiting.pop(run_id, None)
        self._leave(run_id)
        self._bell.set()

    async def close(self) -> None:
        self._waiting.clear()
        self._active.clear()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _work(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await self._step(clock())
            except Exception:  # noqa: BLE001  # a mistake of its own must not be a silent halt
                _log.exception("a step failed")
                self._give_up()

    def _give_up(self) -> None:
        """Fail all there are: the step's mistake may be any one's."""
        runs = [*(active.run for active in self._active.values()), *self._waiting.values()]
        for run in runs:
            self.cancel(run.run_id)
        self._on_events([run.failed("the engine made a mistake; its log has more") for run in runs])

    async def _step(self, now: float) -> None:
        """One token of every run that is awake, then the step's delay; or rest, where there is nothing to do."""
        self._bell.clear()
        events: Events = []
        self._enter(events)
        due = [active for active in self._active.values() if active.wake_at <= now]
        for active in due:
            self._advance(active, events, now)
        if events:
            self._on_events(events)
        if due:
            await asyncio.sleep(self.script.delay_seconds)
        else:
            await self._rest(min((active.wake_at for active in self._active.values()), default=math.inf) - now)

    async def _rest(self, seconds: float) -> None:
        """Until somebody rings, or the first sleeping run wakes."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._bell.wait(), None if math.isinf(seconds) else seconds)

    def _enter(self, events: Events) -> None:
        """Let in from the head of the queue; nothing overtakes it."""
        while self._waiting and len(self._active) < self.script.runs:
            run = next(iter(self._waiting.values()))
            blocks = math.ceil((len(run.token_ids) + run.parameters.max_new_tokens) / self.script.block_tokens)
            if blocks > self.script.kv_blocks:
                events.append(run.failed("the run can never fit the KV cache"))
            elif blocks > self._free_blocks:
                return
            else:
                self._free_blocks -= blocks
                rules = [rule for rule in self.script.rules if rule.matches(run)]
                self._active[run.run_id] = _Active(run, Tokens(self.script.model, run), rules, blocks)
                events.append(run.started())
            del self._waiting[run.run_id]

    def _leave(self, run_id: int) -> None:
        if (active := self._active.pop(run_id, None)) is not None:
            self._free_blocks += active.blocks

    def _advance(self, active: _Active, events: Events, now: float) -> None:
        """One token of one run, or what its rules do instead."""
        for index, rule in enumerate(active.rules):
            if index not in active.done and self._applies(rule, active):
                active.done.add(index)
                if not self._do(rule, active, events, now):
                    return
        run = active.run
        token_id, logprobs = active.tokens.token(active.made, other=active.diverged)
        active.made += 1
        complete = run.answer.accept(token_id, logprobs)
        events += run.news()
        if complete:
            self._leave(run.run_id)
            events.append(run.finished(run.seed, self.logprob_kind, min(self.script.cached_tokens, len(run.token_ids))))

    def _applies(self, rule: Rule, active: _Active) -> bool:
        return active.made >= rule.at and (not rule.company or len(self._active) > 1)

    def _do(self, rule: Rule, active: _Active, events: Events, now: float) -> bool:
        """Do what the rule says. False: the run makes no token now."""
        match rule.do:
            case "diverge":
                active.diverged = True
            case "forget_seed":
                active.tokens = Tokens(self.script.model, replace(active.run, seed=0))
            case "lose_grade":
                self._on_grade(rule.to, f"the script took it at token {active.made} of sequence {active.run.sequence}")
            case "fail":
                self._leave(active.run.run_id)
                events.append(active.run.failed(f"the script fails it at token {active.made}"))
                return False
            case "delay":
                active.wake_at = now + rule.seconds
                return False
            case "hang":
                active.wake_at = math.inf
                return False
            case "crash":
                _log.error("crashing, as the script says", extra={"sequence": active.run.sequence})
                active.wake_at = math.inf
                asyncio.get_running_loop().call_later(CRASH_SECONDS, self._end_process, CRASHED)
                return False
        return True
