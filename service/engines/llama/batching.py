"""Continuous batching: the work of the engine's thread, and the reuse of prompt prefixes.

1. Runs get slots in order of submission, and no run's prompt is started before an earlier one's.
2. A prompt is cut into pieces of PIECE tokens from its first token on, whatever else is in the batch. A step computes at most
   PREFILL_STEP prompt tokens, so that prompts do not stall the runs that are generating.
3. A grammar is compiled in a thread of its own, which may take half a second. Runs that have slots go on meanwhile; runs behind
   it wait.
4. A slot that its run has left holds whole pieces of that run's prompt, as `Prefixes.held` says, and nothing of its answer.
5. An error of one run ends that run. An error of a step ends all runs that have slots; the engine goes on.

Reuse changes no bit of an answer: only whole pieces are reused, and the keys and values of a whole piece depend only on the
tokens up to its end. (This is what the grade EXACT claims.) So a copy equals the result of computing the piece.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ostinato.v1 import types_pb2

from service.engines.base import Events, Run
from service.engines.llama import LlamaOptions
from service.engines.llama.library import Row, library
from service.engines.llama.model import LlamaVocabulary
from service.engines.llama.sampling import Grammar, Sampler, fold_seed, source_of, token_logprobs

PIECE = 64
"""Prompt tokens of a run that are computed in one step; the last piece may be shorter."""
PREFILL_STEP = PIECE
"""Prompt tokens of all runs in one step."""

Command = Run | int | None
"""A run to submit, the id of a run to cancel, or None: stop."""
Tokens = tuple[int, ...]

_log = logging.getLogger(__name__)


class Prefixes:
    """Which pieces of prompts the memory of each slot holds. Bookkeeping only; `Batching` copies the memory.

    1. `held[slot]` is a whole number of pieces, and the slot's memory holds these tokens at these positions.
    2. A run reuses less than its whole prompt: one token must be computed, or there are no logits.
    """

    def __init__(self, slots: int, *, enabled: bool = True) -> None:
        """Not `enabled`: nothing is ever held, so nothing is reused."""
        self.held: list[Tokens] = [()] * slots
        self._enabled = enabled
        self._used = [0] * slots
        self._uses = 0

    def assign(self, slot: int, prompt: Tokens, free: Iterable[int]) -> tuple[int | None, int, int]:
        """Begin a run with this prompt in `slot`: reuse the longest prefix that a slot holds. Slots in `free` have no run.

        Returns what to copy before the prompt is computed: the slot to which `slot` is copied first, if its content would be
        lost; the slot to copy from, `slot` itself if it holds the prefix; and how many of the copied tokens to keep.
        """
        found = [(_shared(held, prompt), place == slot, place) for place, held in enumerate(self.held)]
        tokens, _, source = max(found)  # of equals `slot` itself
        spare = self._spare(slot, source, tokens if source == slot else 0, free)
        if spare is not None:
            self.held[spare], self._used[spare] = self.held[slot], self._used[slot]
        self._uses += 1
        self._used[source] = self._used[slot] = self._uses
        self.held[slot] = prompt[:tokens]
        return spare, source, tokens

    def computed(self, slot: int, prompt: Tokens, tokens: int) -> None:
        """The model has processed this many tokens of the prompt and the answer, in order."""
        if self._enabled and tokens <= len(prompt) and tokens % PIECE == 0:
            assert len(self.held[slot]) == tokens - PIECE, "a prompt is computed piece by piece"
            self.held[slot] = prompt[:tokens]

    def clear(self, slot: int) -> None:
        self.held[slot], self._used[slot] = (), 0

    def _spare(self, slot: int, source: int, keep: int, free: Iterable[int]) -> int | None:
        """The least recently used free slot, to save what `slot` loses beyond its first `keep` tokens.

        None if nothing is lost, another slot holds it too, or every free slot was used more recently. Never `source`, which is
        about to be read.
        """
        lost = self.held[slot]
        others = (held for place, held in enumerate(self.held) if place != slot)
        if len(lost) <= keep or any(held[: len(lost)] == lost for held in others):
            return None
        spare = min((place for place in free if place not in (slot, source)), key=self._age, default=None)
        return spare if spare is not None and self._age(spare) < self._age(slot) else None

    def _age(self, slot: int) -> tuple[int, int]:
        return self._used[slot], slot


def _shared(held: Tokens, prompt: Tokens) -> int:
    """The length of the common prefix in whole pieces, less than the prompt."""
    most = min(len(held), (len(prompt) - 1) // PIECE * PIECE)
    starts = range(0, most, PIECE)
    return next((start for start in starts if held[start : start + PIECE] != prompt[start : start + PIECE]), most)


@dataclass(slots=True)
class _Active:
    """A run in a slot."""

    run: Run
    slot: int
    sampler: Sampler
    started: bool = False
    fed: int = 0
    """Tokens that the model has processed."""
    cached: int = 0
    """Of these, the tokens reused from an earlier run."""
    generated: int = 0
    last: int = 0
    """The newest generated token."""

    @property
    def prefilling(self) -> bool:
        return self.fed < len(self.run.token_ids)


class Batching:
    """Belongs to the thread that calls `work`. `commands` is its only input, `post` its only output."""

    def __init__(
        self,
        context: int,
        vocabulary: LlamaVocabulary,
        options: LlamaOptions,
        *,
        prefix_cache: bool,
        commands: SimpleQueue[Command],
        post: Callable[[Events], None],
    ) -> None:
        self._library, self._context, self._vocabulary, self._options = library(), context, vocabulary, options
        self._commands, self._post = commands, post
        self._waiting: dict[int, tuple[Run, Future[Sampler] | None]] = {}
        """By run id. The sampler of a run with a grammar is made in the compiler's thread."""
        self._compiler = ThreadPoolExecutor(1, "grammar")
        self._compiled: tuple[tuple[str, bytes], Grammar] | None = None
        """The newest grammar, before its first token."""
        self._active: dict[int, _Active] = {}
        self._free = list(range(options.runs))
        self._prefixes = Prefixes(options.runs, enabled=prefix_cache)

    def work(self) -> None:
        """Returns after the command to stop."""
        while self._read_commands():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001  # the error cannot be attributed to one run
                _log.exception("a step failed")
                self._fail_all(error)
        for active in tuple(self._active.values()):
            self._release(active)
        for run_id in tuple(self._waiting):
            self._forget(run_id)
        self._compiler.shutdown()
        if self._compiled is not None:
            self._compiled[1].close()

    def _read_commands(self) -> bool:
        """Take all commands; wait for one if there are no runs. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not (self._active or self._waiting))
            except Empty:
                return True
            if command is None:
                return False
            if isinstance(command, Run):
                constrained = command.parameters.HasField("response_format")
                made = self._compiler.submit(self._sampler, command) if constrained else None
                self._waiting[command.run_id] = command, made
            elif (active := self._active.get(command)) is not None:
                self._release(active)
            else:
                self._forget(command)

    def _forget(self, run_id: int) -> None:
        """A waiting run was cancelled."""
        _, compiling = self._waiting.pop(run_id, (None, None))
        if compiling is not None and not compiling.cancel():
            compiling.add_done_callback(lambda made: None if made.exception() else made.result().close())

    def _step(self) -> None:
        """One decode: a token of each run whose prompt is computed, and pieces of the other runs' prompts."""
        events: Events = []
        self._admit(events)
        chosen = self._choose()
        if starting := [active for active in chosen if not active.started]:
            # Before the decode: if the process dies in it, the sidecar must know which runs were in the batch.
            self._post([active.run.started() for active in starting])
        for active in starting:
            active.started = True
        try:
            if chosen:
                self._decode(chosen, events)
        finally:
            if events:
                self._post(events)

    def _admit(self, events: Events) -> None:
        """Give free slots to waiting runs. The lowest slot first: only neighbouring slots are computed together."""
        while self._waiting and self._free:
            run, compiling = next(iter(self._waiting.values()))
            if compiling is not None and self._active and not compiling.done():
                return
            del self._waiting[run.run_id]
            try:
                sampler = self._sampler(run) if compiling is None else compiling.result()
            except Exception as error:  # noqa: BLE001  # any error here concerns this run only
                events.append(run.failed(error))
            else:
                self._active[run.run_id] = _Active(run, heapq.heappop(self._free), sampler)

    def _grammar(self, kind: str, source: bytes) -> Grammar:
        """In the compiler's thread. The items of a batch have one grammar, which is compiled once."""
        if self._compiled is None or self._compiled[0] != (kind, source):
            if self._compiled is not None:
                self._compiled[1].close()
                self._compiled = None
            self._compiled = (kind, source), Grammar(self._vocabulary, kind, source)
        return self._compiled[1].copy()

    def _sampler(self, run: Run) -> Sampler:
        """`Preparer.check_submit` has judged the run; llama.cpp would end the process at one that does not fit."""
        size, parameters = self._vocabulary.size, run.parameters
        assert run.token_ids and max(run.token_ids) < size, f"a prompt has at least one token, all below {size}"
        most = self._options.context_tokens
        assert len(run.token_ids) + parameters.max_new_tokens <= most, "prompt and answer fit the context"
        grammar = None
        if parameters.HasField("response_format"):
            grammar = self._grammar(*source_of(parameters.response_format))
        return Sampler(self._vocabulary, parameters, run.token_ids, fold_seed(run.seed), grammar)

    def _choose(self) -> list[_Active]:
        """The runs of the next batch, in order of entry. A piece is taken whole or not at all: other runs do not change it."""
        chosen, room = [], PREFILL_STEP
        for active in self._active.values():
            if active.prefilling:
                if room > 0 and not active.started:
                    self._reuse_prefix(active)  # as late as possible: an earlier run may have computed a shared prefix
                room -= min(PIECE, len(active.run.token_ids) - active.fed)
                if room < 0:
                    continue
            chosen.append(active)
        return chosen

    def _reuse_prefix(self, active: _Active) -> None:
        """Leave in the run's slot the longest prefix of its prompt that some slot holds, and nothing else."""
        library, context, slot = self._library, self._context, active.slot
        spare, source, tokens = self._prefixes.assign(slot, active.run.token_ids, self._free)
        if spare is not None:
            library.copy(context, slot, spare)
        if source != slot:
            library.copy(context, source, slot)
        if library.truncate(context, slot, tokens):
            active.fed = active.cached = tokens
        else:
            self._clear(slot)

    def _decode(self, chosen: list[_Active], events: Events) -> None:
        rows: list[Row] = []
        last_rows: list[tuple[_Active, int]] = []
        for active in sorted(chosen, key=lambda active: active.slot):
            ids = active.run.token_ids[active.fed : active.fed + PIECE] or (active.last,)
            rows += (Row(token_id, active.fed + place, active.slot, False) for place, token_id in enumerate(ids))
            active.fed += len(ids)
            rows[-1] = rows[-1]._replace(wanted=not active.prefilling)
            last_rows.append((active, len(rows) - 1))
        if code := self._library.decode(self._context, rows):
            raise RuntimeError(f"llama.cpp failed with code {code}")
        for active, row in last_rows:
            self._prefixes.computed(active.slot, active.run.token_ids, active.fed)
            if not active.prefilling:
                self._advance(active, row, events)

    def _advance(self, active: _Active, row: int, events: Events) -> None:
        """Draw the run's next token and report it."""
        run, parameters = active.run, active.run.parameters
        try:
            logits = self._library.logits(self._context, row, self._vocabulary.size)
            active.last = token_id = active.sampler.draw(logits, active.generated)
            active.generated += 1
            logprobs = token_logprobs(logits, token_id, parameters.logprobs) if parameters.HasField("logprobs") else None
            complete = run.answer.accept(token_id, logprobs)
        except ValueError as error:
            self._release(active)
            events.append(run.failed(error))
            return
        events += run.new_tokens()
        if complete:
            self._release(active)
            events.append(run.finished(fold_seed(run.seed), types_pb2.LOGPROB_KIND_RAW, active.cached))

    def _fail_all(self, error: Exception) -> None:
        """Fail all runs that have slots, and clear the memory: it is unknown what the failed step has written."""
        actives = tuple(self._active.values())
        for active in actives:
            self._release(active)
        for slot in self._free:
            self._clear(slot)
        self._post([active.run.failed(error) for active in actives])

    def _release(self, active: _Active) -> None:
        """Free the run's slot, keeping the pieces that `Prefixes` holds."""
        del self._active[active.run.run_id]
        active.sampler.close()
        if not self._library.truncate(self._context, active.slot, len(self._prefixes.held[active.slot])):
            self._clear(active.slot)
        heapq.heappush(self._free, active.slot)

    def _clear(self, slot: int) -> None:
        self._library.clear(self._context, slot)
        self._prefixes.clear(slot)
