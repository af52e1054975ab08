"""Continuous batching: what the engine's own thread does.

1. Runs enter in order of submission, as slots become free, and no run's prompt is begun before an earlier one's.
2. A prompt is cut into the same pieces whatever else is in the batch, and a step takes few of them, so that those who are
   already answering do not stall.
3. Of a run that has ended or was cancelled, whole pieces of its prompt are left in its slot's memory (`prefixes`), or nothing
   where prefixes are not reused; never anything of its answer.
4. What goes wrong with one run ends that run; what goes wrong with a step ends all that have slots, and the rest goes on.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ostinato.v1 import types_pb2

from service.engines.base import Events, Run
from service.engines.llama.grammar import Grammar, GrammarLost, source_of
from service.engines.llama.library import Batch, Library
from service.engines.llama.prefixes import PIECE, Prefixes
from service.engines.llama.sampling import NoTokenAllowed, Sampler, fold_seed, token_logprobs
from service.engines.llama.vocabulary import LlamaVocabulary

PREFILL_STEP = PIECE
"""Prompt tokens of all runs in one step."""

Command = Run | int | None
"""A run to take, the id of one to cancel, or None: the end."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    """A run in a slot."""

    run: Run
    slot: int
    sampler: Sampler
    started: bool = False
    fed: int = 0
    """Tokens that the model has seen."""
    cached: int = 0
    """Of them, those that were computed for an earlier run."""
    made: int = 0
    last: int = 0
    """The newest token, if any was made."""

    @property
    def prefilling(self) -> bool:
        return self.fed < len(self.run.token_ids)


class Batching:
    """Belongs to the thread that calls `work`; `commands` is its only way in, `post` its only way out."""

    def __init__(
        self,
        library: Library,
        context: int,
        vocabulary: LlamaVocabulary,
        *,
        runs: int,
        context_tokens: int,
        prefix_cache: bool,
        commands: SimpleQueue[Command],
        post: Callable[[Events], None],
    ) -> None:
        self._library, self._context, self._vocabulary = library, context, vocabulary
        self._context_tokens = context_tokens
        self._commands, self._post = commands, post
        self._batch = Batch(rows_max(runs), runs)
        self._waiting: dict[int, Run] = {}
        self._active: dict[int, _Active] = {}
        self._free = list(range(runs))
        self._prefixes = Prefixes(runs) if prefix_cache else None

    def work(self) -> None:
        """Until a command says that it is the end."""
        while self._listen():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001  # whose fault it is cannot be told
                _log.exception("a step failed")
                self._give_up(str(error) or type(error).__name__)
        for active in tuple(self._active.values()):
            self._leave(active)

    def _listen(self) -> bool:
        """Take all commands there are, and wait for one if there is nothing to do. False: the end."""
        while True:
            try:
                command = self._commands.get(block=not (self._active or self._waiting))
            except Empty:
                return True
            if command is None:
                return False
            if isinstance(command, Run):
                self._waiting[command.run_id] = command
            elif (active := self._active.get(command)) is not None:
                self._leave(active)
            else:
                self._waiting.pop(command, None)

    def _step(self) -> None:
        """One decode: a token for each run that has its prompt behind it, and some of the others' prompts."""
        events: Events = []
        self._enter(events)
        chosen = self._choose()
        if starting := [active for active in chosen if not active.started]:
            # Now, not at the end of the step: if the process dies of it, the sidecar shall know who was there.
            self._post([active.run.started() for active in starting])
        for active in starting:
            active.started = True
        try:
            if chosen:
                self._decode(chosen, events)
        finally:
            if events:
                self._post(events)

    def _enter(self, events: Events) -> None:
        """Give free slots to those who wait: the lowest first, for only neighbouring slots are computed together."""
        while self._waiting and self._free:
            run = self._waiting.pop(next(iter(self._waiting)))
            try:
                sampler = self._sampler(run)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this run's alone
                events.append(run.failed(str(error) or type(error).__name__))
            else:
                self._active[run.run_id] = _Active(run, heapq.heappop(self._free), sampler)

    def _sampler(self, run: Run) -> Sampler:
        """Raises ValueError for a run that llama.cpp must not see."""
        size, parameters = self._vocabulary.size, run.parameters
        if not run.token_ids or max(run.token_ids) >= size:
            raise ValueError(f"a prompt has at least one token, all below {size}")
        if len(run.token_ids) + parameters.max_new_tokens > self._context_tokens:
            raise ValueError(f"prompt and answer are more than the context's {self._context_tokens} tokens")
        if any(token_id >= size for token_id in (*parameters.bad_token_ids, *parameters.stop_token_ids)):
            raise ValueError(f"a forbidden or stop token is not below {size}")
        grammar = None
        if parameters.HasField("response_format"):
            kind, source = source_of(parameters.response_format)
            grammar = Grammar(self._library, self._vocabulary.handle, size, kind, source)
        return Sampler(
            self._library,
            size=size,
            end_ids=self._vocabulary.end_ids,
            parameters=parameters,
            prompt=run.token_ids,
            seed=fold_seed(run.seed),
            grammar=grammar,
        )

    def _choose(self) -> list[_Active]:
        """Who is in the next batch, in order of entry. Pieces of prompts are taken whole: neighbours have no say."""
        chosen, room = [], PREFILL_STEP
        for active in self._active.values():
            if active.prefilling:
                if room > 0 and not active.started:
                    self._resume(active)  # as late as can be: a run before it may have computed what both begin with
                room -= min(PIECE, len(active.run.token_ids) - active.fed)
                if room < 0:
                    continue
            chosen.append(active)
        return chosen

    def _resume(self, active: _Active) -> None:
        """Give a run's slot the longest beginning of its prompt that some slot holds; empty its memory otherwise."""
        if self._prefixes is None:
            return
        library, context, prompt, slot = self._library, self._context, active.run.token_ids, active.slot
        source, tokens = self._prefixes.longest(prompt, slot)
        spare = self._prefixes.spare(slot, source, tokens if source == slot else 0, self._free)
        if spare is not None:
            library.copy(context, slot, spare)
            self._prefixes.copied(slot, spare)
        if source != slot:
            library.copy(context, source, slot)
        if not library.truncate(context, slot, tokens):
            library.forget(context, slot)
            tokens = 0
        self._prefixes.resumed(slot, source, prompt, tokens)
        active.fed = active.cached = tokens

    def _decode(self, chosen: list[_Active], events: Events) -> None:
        self._batch.clear()
        rows = [(active, self._add(active)) for active in sorted(chosen, key=lambda active: active.slot)]
        if problem := self._library.decode(self._context, self._batch):
            raise RuntimeError(f"llama.cpp failed with code {problem}")
        for active, row in rows:
            if self._prefixes is not None and active.fed <= len(active.run.token_ids):
                self._prefixes.computed(active.slot, active.run.token_ids, active.fed)
            if not active.prefilling:
                self._advance(active, row, events)

    def _add(self, active: _Active) -> int:
        """Put a run's next tokens into the batch; the row of the last."""
        prompt, fed = active.run.token_ids, active.fed
        ids = prompt[fed : fed + PIECE] if active.prefilling else (active.last,)
        active.fed += len(ids)
        return self._batch.add(active.slot, fed, ids, wanted=not active.prefilling)

    def _advance(self, active: _Active, row: int, events: Events) -> None:
        """One token more."""
        run = active.run
        try:
            complete = self._accept(active, row)
        except (GrammarLost, NoTokenAllowed, ValueError) as error:
            self._leave(active)
            events.append(run.failed(str(error)))
            return
        events += run.news()
        if complete:
            self._leave(active)
            events.append(run.finished(fold_seed(run.seed), types_pb2.LOGPROB_KIND_RAW, active.cached))

    def _accept(self, active: _Active, row: int) -> bool:
        logits = self._library.logits(self._context, row, self._vocabulary.size)
        parameters = active.run.parameters
        active.last = token_id = active.sampler.draw(logits, active.made)
        active.made += 1
        logprobs = token_logprobs(logits, token_id, parameters.logprobs) if parameters.HasField("logprobs") else None
        return active.run.answer.accept(token_id, logprobs)

    def _give_up(self, why: str) -> None:
        """Fail all that have slots."""
        actives = tuple(self._active.values())
        for active in actives:
            self._leave(active)
        for slot in self._free:  # all of them: what a step that failed has written or copied is not known
            self._forget(slot)
        self._post([active.run.failed(why) for active in actives])

    def _leave(self, active: _Active) -> None:
        del self._active[active.run.run_id]
        active.sampler.close()
        held = len(self._prefixes.held[active.slot]) if self._prefixes is not None else 0
        if not self._library.truncate(self._context, active.slot, held):
            self._forget(active.slot)
        heapq.heappush(self._free, active.slot)

    def _forget(self, slot: int) -> None:
        self._library.forget(self._context, slot)
        if self._prefixes is not None:
            self._prefixes.forget(slot)


def rows_max(runs: int) -> int:
    """In one batch."""
    return PREFILL_STEP + runs
