"""Audits, canaries and replays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tomllib
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostinato import errors, requests
from ostinato.digest import input_digest, is_sampled, model_digest
from ostinato.replay import bounded_gather
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.answers import no_verdict, pages, record_of
from sidecar.config import Settings
from sidecar.journal.model import ItemEntries, Note, Sealed
from sidecar.pipeline import Pipeline
from sidecar.rerun import Record

GROUP = 4
"""So many audits of items that ran alone are company to each other; fewer, where fewer may run at once."""
BURST_SECONDS = 10.0
"""What the budget allows at once, in seconds of itself."""


class TokenBucket:
    """A budget of tokens. Whoever comes while something is left may take more than that; the debt is paid off first."""

    def __init__(self, tokens_per_second: float, now: float) -> None:
        """0: no bound."""
        self.tokens_per_second = tokens_per_second
        self._left = self._most = tokens_per_second * BURST_SECONDS
        self._at = now

    def open(self, now: float) -> bool:
        """Whether something is left."""
        self._left = min(self._most, self._left + (now - self._at) * self.tokens_per_second)
        self._at = now
        return not self.tokens_per_second or self._left > 0

    def take(self, tokens: int) -> None:
        self._left -= tokens


@dataclass(frozen=True, slots=True)
class DueAudit:
    """An item that was chosen."""

    sequence: int
    alone: bool
    """Whether its first run had no company, as far as is known."""
    since: float


class AuditBacklog:
    """What waits to be audited, oldest first."""

    def __init__(self, most: int, patience_seconds: float) -> None:
        self.most, self.patience_seconds = most, patience_seconds
        self.waiting: deque[DueAudit] = deque()

    def add(self, due: DueAudit) -> bool:
        """False: there is no room for it."""
        if len(self.waiting) >= self.most:
            return False
        self.waiting.append(due)
        return True

    def take(self, now: float, *, company: int, room: int) -> list[DueAudit]:
        """Those that are to run now. `company`: runs that the engine holds; `room`: audits that may begin, at least 1."""
        lonely = [due for due in self.waiting if due.alone]
        together = bool(company) or len(lonely) >= min(GROUP, room)
        if lonely and now - lonely[0].since >= self.patience_seconds:
            together = True
        chosen = [due for due in self.waiting if together or not due.alone][:room]
        for due in chosen:
            self.waiting.remove(due)
        return chosen


AUDIT = types_pb2.COMPARISON_KIND_AUDIT
BUDGET = "BUDGET"
"""Why a chosen item was not run again, where no error of the table says it: the backlog is full because the budget is spent."""
READ_BACK_ENTRIES = 4096
"""How far back a start looks for chosen items that no verdict names."""


class Auditor:
    """One beside each Pipeline, whose outcomes it witnesses."""

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._backlog = AuditBacklog(settings.audit_backlog_max, settings.audit_patience_seconds)
        self._bucket = TokenBucket(settings.audit_tokens_per_second, pipeline.clock())
        self._running = 0
        pipeline.outcomes.witnesses.append(self.completed)

    def completed(self, record: Record, company: int) -> None:
        """See outcomes.Witness."""
        self._consider(record.completed, alone=company <= 1)
        self.tick()

    async def read_back(self) -> None:
        """Take up what an earlier epoch of this writer chose and did not come to; how it ran is not known any more."""
        journal = self._pipeline.journal
        head = await journal.head()
        first = max(1, head.index - READ_BACK_ENTRIES)
        self._take_up(await journal.entries(first, READ_BACK_ENTRIES + 1, payloads=False), head.writer)

    def _take_up(self, entries: Sequence[Sealed], writer: str) -> None:
        headers = [entry.header for entry in entries]
        judged = {(h.sequence, h.fingerprint_digest) for h in headers if h.kind == types_pb2.ENTRY_KIND_AUDITED}
        own = [h for h in headers if h.kind == types_pb2.ENTRY_KIND_COMPLETED and h.writer == writer]
        for header in own:
            if (header.sequence, header.fingerprint_digest) not in judged:
                self._consider(header, alone=True)

    def _consider(self, completed: types_pb2.EntryHeader, *, alone: bool) -> None:
        if not is_sampled("audit", completed.log_id, completed.sequence, self._settings.audit_rate):
            return
        now = self._pipeline.clock()
        if not self._backlog.add(DueAudit(completed.sequence, alone, now)):
            self._skip(errors.QueueFull.reason if self._bucket.open(now) else BUDGET)

    def _skip(self, reason: str) -> None:
        self._pipeline.observer.not_compared(AUDIT, reason)

    def tick(self) -> None:
        """Begin what may begin. Told whenever an item or an audit ends, and by the clock."""
        window, now = self._pipeline.core.window, self._pipeline.clock()
        if self._pipeline.core.draining:
            for _ in self._backlog.waiting:
                self._skip(errors.Draining.reason)
            self._backlog.waiting.clear()
        self._pipeline.observer.audits_waiting(len(self._backlog.waiting))
        if window is None or not self._backlog.waiting or not self._bucket.open(now):
            return
        room = max(1, int(self._settings.reruns_share * window.engine.runs)) - self._running
        if room <= 0:
            return
        if group := self._backlog.take(now, company=window.runs, room=room):
            self._running += len(group)
            self._pipeline.spawn(self._audit(group))

    async def _audit(self, group: Sequence[DueAudit]) -> None:
        """All are read before the first is run, so that they run beside each other."""
        records = [await self._read(due) for due in group]
        await asyncio.gather(*(self._check(record) for record in records))

    async def _read(self, due: DueAudit) -> Record | None:
        """None: it cannot be run again here, and was counted."""
        try:
            (entries,) = await self._pipeline.journal.items(due.sequence, due.sequence, 1)
            record, engine = Record.of(entries), self._pipeline.engine
            if engine is not None and engine.model.fingerprint.digest != record.completed.fingerprint_digest:
                raise errors.FingerprintChanged("another engine runs now, and would only show drift")
        except errors.OstinatoError as error:
            self._skip(error.reason)
            return None
        return record

    async def _check(self, record: Record | None) -> None:
        if record is not None:
            self._bucket.take(len(record.input.token_ids) + len(record.output.token_ids))
            with contextlib.suppress(errors.OstinatoError):  # counted
                await self._pipeline.rerunner.check(record, AUDIT)
        self._running -= 1
        self.tick()


DEFAULT_CANARIES = Path(__file__).with_name("canaries.toml")
CANARIES_MAX = 256
NAME_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt, all that determines its answer, and a name for people."""

    name: str
    item: types_pb2.Item


def read_canaries(path: Path | None) -> tuple[Canary, ...]:
    """Those in this file, or those that come with the sidecar. Raises ValueError: the file, and what is wrong in it."""
    path = path or DEFAULT_CANARIES
    try:
        canaries = tuple(_canaries(tomllib.loads(path.read_text())))
        names = [canary.name for canary in canaries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)!r} is the name of two canaries")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return canaries


def _canaries(document: dict[str, object]) -> Iterator[Canary]:
    listed = document.get("canary", [])
    if set(document) - {"canary"} or not isinstance(listed, list):
        raise ValueError("holds something else than [[canary]] tables")
    if len(listed) > CANARIES_MAX:
        raise ValueError(f"canary: {len(listed)} tables, at most {CANARIES_MAX} are allowed")
    for position, given in enumerate(listed):
        try:
            yield _canary(given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"canary[{position}].{error}") from error


def _canary(given: dict[str, object]) -> Canary:
    for field in given:
        if field not in ("name", "text", "parameters"):
            raise ValueError(f"{field}: no such field; a canary has name, text and parameters")
    name, text = (requests.text(field, given.get(field, "")) for field in ("name", "text"))
    for field, value in (("name", name), ("text", text)):
        if not value:
            raise ValueError(f"{field}: is missing")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"name: at most {NAME_BYTES_MAX} bytes are allowed")
    sampling = given.get("parameters", {})
    if not isinstance(sampling, dict):
        raise TypeError("parameters: is no table")
    try:
        parameters = requests.parameters(sampling)
    except (ValueError, TypeError) as error:
        raise ValueError(f"parameters.{error}") from error
    if parameters is None or not parameters.HasField("seed"):
        raise ValueError("parameters.seed: is missing; an answer is known by its seed")
    return Canary(name, types_pb2.Item(text=text, parameters=parameters))


log = logging.getLogger(__name__)

CANARY = types_pb2.COMPARISON_KIND_CANARY
LOSSES_MAX = 2
"""Engines that may be lost under a canary, with no answer between; then it rests until the sidecar starts again."""


class CanaryRunner:
    """Looks after canaries. One beside each Pipeline."""

    def __init__(self, pipeline: Pipeline, canaries: Sequence[Canary], seconds: float) -> None:
        """`seconds` between rounds; 0: there are none."""
        self._pipeline, self._canaries, self._seconds = pipeline, canaries, seconds
        self._prepared: dict[str, sequencer_pb2.AdmittedPayload | None] = {}
        """By name, for the model that runs; None: it was refused, and that was said."""
        self._losses: Counter[str] = Counter()
        """By name: engines that were lost under it, one after the other."""
        self._model = b""
        self._incarnation = ""
        self._due_at = 0.0
        self._busy = False

    def tick(self) -> None:
        """Begin a round if it is time: another engine has connected, or the last round was long ago. Told by the clock."""
        engine, now = self._pipeline.engine, self._pipeline.clock()
        if engine is None:
            self._incarnation = ""
            return
        if engine.incarnation != self._incarnation:
            self._incarnation, self._due_at = engine.incarnation, now
        if self._seconds and now >= self._due_at and not self._busy and not self._pipeline.core.draining:
            self._busy, self._due_at = True, now + self._seconds
            self._pipeline.spawn(self._round(engine))

    async def _round(self, engine: engine_pb2.DescribeResponse) -> None:
        try:
            model = model_digest(engine.model.fingerprint.fields)
            if model != self._model:
                self._model, self._prepared = model, {}
            for canary in self._canaries:
                with contextlib.suppress(errors.OstinatoError):  # counted
                    await self._prepare(canary)
            known = [(canary, given) for canary in self._canaries if (given := self._prepared.get(canary.name))]
            known = [(canary, given) for canary, given in known if self._trusted(canary)]
            await asyncio.gather(*(self._run(canary, given, engine.model.fingerprint.digest) for canary, given in known))
        finally:
            self._busy = False

    async def _prepare(self, canary: Canary) -> None:
        """Tokenise it, once for each model. One that the engine refuses is never run."""
        if canary.name in self._prepared:
            if self._prepared[canary.name] is None:
                self._pipeline.observer.not_compared(CANARY, errors.InvalidRequest.reason)
            return
        try:
            prepared = await self._pipeline.link.prepare(engine_pb2.PrepareRequest(items=[canary.item]), self._seconds)
        except errors.OstinatoError as error:
            self._pipeline.observer.not_compared(CANARY, error.reason)
            if isinstance(error, errors.InvalidRequest):
                self._prepared[canary.name] = None
                log.warning("canary refused", extra={"canary": canary.name, "why": error.message})
            raise
        (item,) = prepared.items
        self._prepared[canary.name] = sequencer_pb2.AdmittedPayload(
            token_ids=item.token_ids,
            parameters=item.parameters,
            seed=item.seed,
            model_digest=prepared.model_digest,
        )

    async def _run(self, canary: Canary, given: sequencer_pb2.AdmittedPayload, fingerprint: bytes) -> None:
        digest = input_digest(given.token_ids, given.parameters, given.seed)
        try:
            known = await self._known(_name(fingerprint, digest))
            if known is None:
                await self._learn(canary, given, digest)
            else:
                output = types_pb2.Output.FromString(known)
                header = types_pb2.EntryHeader(
                    seed=given.seed, input_digest=digest, fingerprint_digest=fingerprint, grade=output.grade
                )
                checked = await self._pipeline.rerunner.check(Record(header, header, given, output, canary=canary.name), CANARY)
                if checked.comparison.verdict == types_pb2.VERDICT_DIVERGED:
                    log.error("canary diverged", extra={"canary": canary.name})
        except errors.EngineUnavailable:
            self._losses[canary.name] += 1
        except errors.OstinatoError:
            pass  # counted
        else:
            del self._losses[canary.name]

    async def _known(self, name: str) -> bytes | None:
        try:
            return (await self._pipeline.journal.notes(name)).get(name)
        except errors.JournalUnavailable as error:
            self._pipeline.observer.not_compared(CANARY, error.reason)
            raise

    def _trusted(self, canary: Canary) -> bool:
        """Whether it is not what kills the engine, again and again, as soon as it has connected."""
        if self._losses[canary.name] == LOSSES_MAX:
            log.error("canary given up: the engine was lost under it", extra={"canary": canary.name})
            self._losses[canary.name] += 1
        if self._losses[canary.name] > LOSSES_MAX:
            self._pipeline.observer.not_compared(CANARY, errors.AttemptsExhausted.reason)
        return self._losses[canary.name] < LOSSES_MAX

    async def _learn(self, canary: Canary, given: sequencer_pb2.AdmittedPayload, digest: bytes) -> None:
        try:
            made = await self._pipeline.rerunner.start(given, 0, CANARY)
            note = Note(_name(made.fingerprint_digest, digest), made.output.SerializeToString(deterministic=True))
            await self._pipeline.journal.append(note)
        except errors.OstinatoError as error:
            self._pipeline.observer.not_compared(CANARY, error.reason)
            raise
        log.info("canary learned", extra={"canary": canary.name, "fingerprint": made.fingerprint_digest.hex()[:16]})


def _name(fingerprint: bytes, digest: bytes) -> str:
    return f"canary/{fingerprint.hex()}/{digest.hex()}"


REPLAY = types_pb2.COMPARISON_KIND_REPLAY
ROOM_SECONDS = 0.05
"""Between looks whether another second run may wait."""


async def replay(
    pipeline: Pipeline, first: int, last: int, concurrency: int, *, alone: bool
) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
    """A verdict for each completed item of the range, as it falls, `concurrency` runs at once; each is journalled.

    Raises EngineUnavailable or Draining where the rest cannot be run: without a verdict, an item may be asked for again.
    """
    counted = sequencer_pb2.ReplayResponse(total=last - first + 1)
    async with aclosing(bounded_gather(_answers(pipeline, first, last, alone=alone), concurrency)) as responses:
        async for response in responses:
            counted.seen += len(response.passed_over) or 1
            response.MergeFrom(counted)
            yield response


async def _answers(
    pipeline: Pipeline, first: int, last: int, *, alone: bool
) -> AsyncIterator[Coroutine[Any, Any, sequencer_pb2.ReplayResponse]]:
    async for page in pages(pipeline.journal, first, last):
        if others := [entries.admitted.header.sequence for entries in page if not _completed(entries)]:
            yield _passed_over(others)
        for entries in filter(_completed, page):
            while not pipeline.core.reruns.room:
                await asyncio.sleep(ROOM_SECONDS)
            yield _answer(pipeline, entries, alone=alone)


async def _passed_over(sequences: list[int]) -> sequencer_pb2.ReplayResponse:
    return sequencer_pb2.ReplayResponse(passed_over=sequences)


def _completed(entries: ItemEntries) -> bool:
    return entries.outcome is not None and entries.outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED


async def _answer(pipeline: Pipeline, entries: ItemEntries, *, alone: bool) -> sequencer_pb2.ReplayResponse:
    """With all that is needed to look at both runs, where they differ."""
    comparison = await _one(pipeline, entries, alone=alone)
    record = record_of(entries, pipeline.fingerprints.known) if comparison.HasField("first_difference") else None
    return sequencer_pb2.ReplayResponse(comparison=comparison, record=record)


async def _one(pipeline: Pipeline, entries: ItemEntries, *, alone: bool) -> types_pb2.Comparison:
    assert entries.outcome is not None
    sequence, rerunner = entries.outcome.header.sequence, pipeline.rerunner
    try:
        record = Record.of(entries)
    except errors.PayloadPruned as error:
        pipeline.observer.not_compared(REPLAY, error.reason)
        return no_verdict(sequence, REPLAY, error)
    try:
        checked = await rerunner.check(record, REPLAY, rerunner.start(record.input, sequence, REPLAY, exclusive=alone))
    except (errors.EngineUnavailable, errors.Draining):
        raise
    except errors.OstinatoError as error:  # counted
        return no_verdict(sequence, REPLAY, error)
    if checked.comparison.HasField("first_difference"):
        checked.comparison.actual.CopyFrom(checked.output)
    return checked.comparison
