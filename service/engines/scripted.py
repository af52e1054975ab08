"""An engine without a model: deterministic, immediate, and with the faults that its script asks for.

For tests, simulations and benchmarks, and to run the whole system on a machine without a model. A script is JSON:

    {"runs": 4, "grade": "EXACT", "delay_seconds": 0.001, "rules": [
        {"do": "diverge", "at": 2, "sequences": [7], "purposes": ["REPLAY"], "attempts": [1]},
        {"do": "fail", "at": 3, "share": 0.1}]}

Every key is optional except a rule's `do`; unknown keys and values of a wrong type are errors. All rules that match a run apply
to it. Without `purposes`, a rule applies to all runs except the service's self-test, whose purpose is "SELF_TEST" here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import sys
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import sha256
from itertools import accumulate
from struct import Struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from prometheus_client import Metric

from ostinato.digest import f64, ids, text, u64
from ostinato.v1 import engine_pb2, types_pb2

from service.chat import ChatTemplate, Conversation, RenderBounds
from service.engines import huggingface
from service.engines.base import Events, Run, Span

VERSION = "1"
"""Of the rules that make tokens. Another version makes other tokens."""
CRASHED = 70
"""Exit code of a scripted crash."""
CRASH_SECONDS = 0.05
"""From the last token to the crash. An engine that crashes has reported its earlier events by then, as real ones have."""

_log = logging.getLogger(__name__)

# The script

Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
Grade = Literal["BEST_EFFORT", "SERIAL", "EXACT"]
Purpose = Literal["PRIMARY", "AUDIT", "VERIFY", "CANARY", "REPLAY", "SELF_TEST"]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fault, and the runs that have it."""

    do: Literal["diverge", "forget_seed", "fail", "hang", "crash", "delay", "lose_grade"]
    """diverge: other tokens from `at` on. forget_seed: from `at` on the tokens of seed 0. fail: end with ENGINE_FAILED.
    hang: no more tokens until cancelled. crash: no more tokens, and shortly afterwards the process exits at once.
    delay: wait once for `seconds`. lose_grade: report that the grade is now `to`."""
    at: Natural = 0
    """The index of the token before which it happens, from 0."""
    sequences: frozenset[Natural] | None = None
    purposes: frozenset[Purpose] | None = None
    attempts: frozenset[Positive] | None = None
    company: bool = False
    """Only while other runs are running too."""
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Of the matching runs, chosen by a hash of sequence, purpose and attempt."""
    seconds: Seconds = 0.0
    to: Grade = "BEST_EFFORT"

    def matches(self, run: Run) -> bool:
        """`company` is not considered: it changes while the run runs."""
        purpose = engine_pb2.Purpose.Name(run.purpose).removeprefix("PURPOSE_") if run.purpose else "SELF_TEST"
        return (
            (self.sequences is None or run.sequence in self.sequences)
            and (purpose in self.purposes if self.purposes is not None else purpose != "SELF_TEST")
            and (self.attempts is None or run.attempt in self.attempts)
            and (self.share >= 1 or _fraction(run) < self.share)
        )


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine is, and its faults."""

    model: str = "scripted"
    """Another name is another model, which makes other tokens."""
    grade: Grade = "EXACT"
    """The best that the self-test can find."""
    runs: Positive = 64
    kv_blocks: Positive = 4096
    block_tokens: Positive = 64
    context_tokens: Annotated[int, Meta(ge=2, le=2**63 - 1)] = 4096
    top_k_max: Positive = 1024
    chat: bool = True
    load_seconds: Seconds = 0.0
    delay_seconds: Seconds = 0.0
    """Of each step. A step makes one token of every run."""
    fields: dict[str, str] = msgspec.field(default_factory=dict)
    """Additional or other fields of the fingerprint."""
    cached_tokens: Natural = 0
    """The number of prompt tokens reported as reused, at most the prompt."""
    says: str = ""
    """The text of every output, whatever its prompt; empty: it follows from the prompt."""
    rules: tuple[Rule, ...] = ()


def parse(script: str) -> Script:
    """Raises ValueError with the place and the reason."""
    try:
        return msgspec.json.decode(script, type=Script)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _fraction(run: Run) -> float:
    name = f"{run.sequence}/{run.purpose}/{run.attempt}".encode()
    return int.from_bytes(sha256(name).digest()[:6]) / 2**48


# The vocabulary

END = 256
BEGIN = 257
CONTROLS = {
    "<|end|>": END,
    "<|begin|>": BEGIN,
    "<|system|>": 258,
    "<|user|>": 259,
    "<|assistant|>": 260,
    "<|tool|>": 261,
}
_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no such role') }}{% endif %}
    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('a system message must come first') }}{% endif %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
    {%- for call in message.tool_calls %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{%- if prefix is defined %}{{ prefix }}{% endif %}"""
"""Like many templates, it refuses a system message that is not the first. Of more arguments it prints `prefix`."""
_CONTROL = re.compile("|".join(map(re.escape, CONTROLS)))


@cache
def _template() -> ChatTemplate:
    return ChatTemplate(_TEMPLATE, {"bos_token": "<|begin|>"})


class ByteVocabulary:
    """Token ids 0 to 255 are the bytes. Control tokens have no text; where recognised, they are written `<|name|>`."""

    size = 256 + len(CONTROLS)
    controls: Mapping[str, int] = CONTROLS
    template: str | None = _TEMPLATE
    end_ids = frozenset({END})
    source_bytes_max = max(map(len, CONTROLS))
    pieces: Sequence[bytes] = [bytes([value]) for value in range(256)] + [b""] * len(CONTROLS)
    written: Sequence[bytes] = [*pieces[:256], *(text.encode() for text in CONTROLS)]

    def encode(self, text: str, *, special: bool, most: int = sys.maxsize) -> list[int]:
        return self.encode_at(text, [found.span() for found in _CONTROL.finditer(text)] if special else [])

    def encode_at(self, text: str, places: Sequence[Span], *, most: int = sys.maxsize) -> list[int]:
        ids: list[int] = []
        done = 0
        for first, last in places:
            ids += text[done:first].encode()
            ids.append(CONTROLS[text[first:last]])
            done = last
        ids += text[done:].encode()
        return ids if ids[:1] == [BEGIN] else [BEGIN, *ids]

    def render(self, given: Conversation, bounds: RenderBounds) -> str:
        return _template().render(given, bounds)

    def files(self) -> Mapping[str, bytes]:
        tokens = huggingface.letters() + list(CONTROLS)
        return {
            huggingface.TOKENIZER: huggingface.byte_level_bpe(
                tokens, (), controls=dict.fromkeys(CONTROLS.values(), True), splits=(), begin=BEGIN
            ),
            huggingface.CONFIG: huggingface.config(template=_TEMPLATE, begin=tokens[BEGIN], end=tokens[END]),
        }


# The tokens. At each position all candidates are ranked by a hash of model, prompt and position; rank r has probability
# 1/4 * (3/4)^r. Greedy takes rank 0. Sampling draws a rank by a hash that includes the seed and the sampling parameters.

LETTERS = tuple(b"etaoinshrdlcumwfgypbvkjxqz .,-\n")
"""31, a prime number: with any step from 1 to 30, a walk visits each once. All other printable ASCII ranks below."""
_SPACE = LETTERS.index(ord(" "))
_OTHERS = tuple(byte for byte in range(33, 127) if byte not in LETTERS)
RANKS = len(LETTERS) + len(_OTHERS) + 1
PROBABILITIES = tuple(0.25 * 0.75**rank for rank in range(RANKS))
LOGPROBS = tuple(math.log(0.25) + rank * math.log(0.75) for rank in range(RANKS))
_DRAWS = tuple(round(2**16 * (1 - 0.75 ** (rank + 1))) for rank in range(30))
_END_RANK = 9
ANSWER_TOKENS_MIN = 8
"""No answer ends by itself before, so that a rule for an early token always takes effect."""
_BLOCK = 16
"""Positions per SHA-256, two bytes each."""
_DRAWN = Struct(f">{_BLOCK}H")


class Tokens:
    """The tokens of one run, by index."""

    def __init__(self, model: str, run: Run, says: str = "") -> None:
        given = run.parameters
        self._says = (*says.encode(), END) if says else ()
        self._banned = frozenset(given.bad_token_ids) | (frozenset({END}) if given.ignore_eos else frozenset())
        self._banned_early = self._banned | {END}
        self._banned_at_first = self._banned_early | frozenset(given.stop_token_ids)
        self._stop_free = given.min_new_tokens
        self._end_free = max(given.min_new_tokens, ANSWER_TOKENS_MIN)
        self._top = given.logprobs if given.HasField("logprobs") else None
        self._choices = choices(given)
        self._model_key = sha256(text(model) + ids(run.token_ids) + f64(given.repetition_penalty)).digest()
        draw = b"".join(map(f64, (given.temperature, given.top_p, given.min_p))) + u64(given.top_k) + u64(run.seed)
        self._draw_key = sha256(self._model_key + draw).digest()
        self._block = -1
        self._ranking_bytes, self._drawn = b"", tuple[int, ...]()

    def token(self, index: int, *, other: bool = False) -> tuple[int, types_pb2.TokenLogprobs | None]:
        """Token `index` and its logprobs, if wanted. `other`: take the next rank instead."""
        if index < len(self._says):
            return self._says[index], None if self._top is None else types_pb2.TokenLogprobs()
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            self._block = block
            self._ranking_bytes = sha256(self._model_key + u64(block)).digest()
            self._drawn = _DRAWN.unpack(sha256(self._draw_key + u64(block)).digest())
        first, second = self._ranking_bytes[2 * place], self._ranking_bytes[2 * place + 1]
        rank = bisect_right(_DRAWS, self._drawn[place]) % self._choices + other
        banned = self._banned if index >= self._end_free else self._banned_early
        if index < self._stop_free:
            banned = self._banned_at_first
        # END ranks first for some values of `second`, else at a fixed place.
        start, end_rank = _SPACE if first % 5 == 0 else first % len(LETTERS), 0 if second < 4 else _END_RANK
        ranked = _ranking(start, 1 + second % (len(LETTERS) - 1), end_rank, banned)
        if self._top is None:
            return ranked[rank], None
        top = [types_pb2.TopLogprob(token_id=t, logprob=LOGPROBS[r]) for r, t in enumerate(ranked[: self._top])]
        return ranked[rank], types_pb2.TokenLogprobs(logprob=LOGPROBS[rank], top=top)


def choices(given: types_pb2.ResolvedParameters) -> int:
    """How many ranks the sampling parameters leave, at least 1."""
    if given.temperature == 0:
        return 1
    by_top_k = given.top_k or RANKS
    by_top_p = RANKS if given.top_p >= 1 else bisect_right([*accumulate(PROBABILITIES)], given.top_p) + 1
    by_min_p = RANKS - bisect_left(PROBABILITIES[::-1], given.min_p * PROBABILITIES[0])
    return max(1, min(by_top_k, by_top_p, by_min_p))


@lru_cache(maxsize=4096)
def _ranking(start: int, step: int, end_rank: int, banned: frozenset[int]) -> tuple[int, ...]:
    """All candidates, likeliest first."""
    ranked = [LETTERS[(start + rank * step) % len(LETTERS)] for rank in range(len(LETTERS))]
    ranked.insert(end_rank, END)
    return tuple(token_id for token_id in (*ranked, *_OTHERS) if token_id not in banned)


# The engine


@dataclass(slots=True)
class _Active:
    run: Run
    tokens: Tokens
    rules: list[Rule]
    blocks: int
    generated: int = 0
    wake_at: float = -math.inf
    diverged: bool = False
    applied: set[int] = field(default_factory=set)
    """Indexes of rules that have been applied; each is applied once."""


class ScriptedEngine:
    """A `service.engines.base.Engine`: one task on the event loop. Runs enter in order of submission while there is room."""

    name = "scripted"
    logprob_kind = types_pb2.LOGPROB_KIND_RAW
    proof_seconds = 0.0
    prefix_cache = False
    piece_tokens = 0

    def __init__(self, script: Script, *, end_process: Callable[[int], object] = os._exit) -> None:
        self.script = script
        self.vocabulary = ByteVocabulary()
        self.model_name, self.chat = script.model, script.chat
        self.context_tokens, self.top_k_max = script.context_tokens, script.top_k_max
        self.capacity = engine_pb2.Capacity(runs=script.runs, kv_blocks=script.kv_blocks, block_tokens=script.block_tokens)
        self.ceiling = types_pb2.Grade.Value(f"GRADE_{script.grade}"), "the script says so"
        self._end_process = end_process
        self._waiting: OrderedDict[int, Run] = OrderedDict()
        self._active: dict[int, _Active] = {}
        self._free_blocks = script.kv_blocks
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_events: Callable[[Events], None] = lambda events: None
        self._on_grade: Callable[[types_pb2.Grade.ValueType, str], None] = lambda grade, reason: None

    @property
    def fields(self) -> Mapping[str, str]:
        own = {"engine": self.name, "engine_version": VERSION, "model": self.model_name}
        return own | {"tokenizer": "bytes", "template": "turns"} | self.script.fields

    def check_format(self, response_format: types_pb2.ResponseFormat) -> None:
        raise ValueError("the scripted engine supports no grammars")

    def collect(self) -> Iterable[Metric]:
        return ()

    def start(self, on_events: Callable[[Events], None], on_grade: Callable[[types_pb2.Grade.ValueType, str], None]) -> None:
        self._on_events, self._on_grade = on_events, on_grade
        self._task = asyncio.get_running_loop().create_task(self._work())

    def submit(self, run: Run) -> None:
        self._waiting[run.run_id] = run
        self._changed.set()

    def cancel(self, run_id: int) -> None:
        self._waiting.pop(run_id, None)
        self._release(run_id)
        self._changed.set()

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
            except Exception:  # noqa: BLE001  # the engine must not stop silently
                _log.exception("a step failed")
                self._fail_all()

    def _fail_all(self) -> None:
        """The error cannot be attributed to one run."""
        runs = [*(active.run for active in self._active.values()), *self._waiting.values()]
        for run in runs:
            self.cancel(run.run_id)
        self._on_events([run.failed("the engine failed; see its log") for run in runs])

    async def _step(self, now: float) -> None:
        """One token of every run that is awake, then the step's delay; or wait, if there is nothing to do."""
        self._changed.clear()
        events: Events = []
        self._admit(events)
        due = [active for active in self._active.values() if active.wake_at <= now]
        for active in due:
            self._advance(active, events, now)
        if events:
            self._on_events(events)
        if due:
            await asyncio.sleep(self.script.delay_seconds)
            return
        seconds = min((active.wake_at for active in self._active.values()), default=math.inf) - now
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), None if math.isinf(seconds) else seconds)

    def _admit(self, events: Events) -> None:
        """Admit runs from the head of the queue; none overtakes it."""
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
                self._active[run.run_id] = _Active(run, Tokens(self.script.model, run, self.script.says), rules, blocks)
                events.append(run.started())
            del self._waiting[run.run_id]

    def _release(self, run_id: int) -> None:
        if (active := self._active.pop(run_id, None)) is not None:
            self._free_blocks += active.blocks

    def _advance(self, active: _Active, events: Events, now: float) -> None:
        """Apply the run's rules; unless one prevents it, generate one token."""
        for index, rule in enumerate(active.rules):
            in_scope = active.generated >= rule.at and (not rule.company or len(self._active) > 1)
            if in_scope and index not in active.applied:
                active.applied.add(index)
                if not self._apply(rule, active, events, now):
                    return
        run = active.run
        token_id, logprobs = active.tokens.token(active.generated, other=active.diverged)
        active.generated += 1
        complete = run.answer.accept(token_id, logprobs)
        events += run.new_tokens()
        if complete:
            self._release(run.run_id)
            events.append(run.finished(run.seed, self.logprob_kind, min(self.script.cached_tokens, len(run.token_ids))))

    def _apply(self, rule: Rule, active: _Active, events: Events, now: float) -> bool:
        """False: the run generates no token in this step."""
        match rule.do:
            case "diverge":
                active.diverged = True
            case "forget_seed":
                active.tokens = Tokens(self.script.model, replace(active.run, seed=0))
            case "lose_grade":
                reason = f"the script lowers it at token {active.generated} of sequence {active.run.sequence}"
                self._on_grade(types_pb2.Grade.Value(f"GRADE_{rule.to}"), reason)
            case "fail":
                self._release(active.run.run_id)
                events.append(active.run.failed(f"the script fails it at token {active.generated}"))
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
