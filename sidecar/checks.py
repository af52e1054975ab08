"""What asks for second runs in the background, and on demand: audits, canaries and replays.

An audit runs a sampled completed item again. A canary is a prompt whose answer is known from its first run. A replay runs a
range of the journal again, for a caller. All compare with the record, see sidecar/rerun.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tomllib
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ostinato import errors, requests
from ostinato.chain import FORM, NONCE_BYTES, sealed_input
from ostinato.digest import input_digest, is_sampled, model_digest
from ostinato.replay import bounded_gather
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2
from serving.hop import is_short

from sidecar.answers import no_verdict, pages, record_of
from sidecar.config import Settings
from sidecar.journal.model import ItemEntries, Note
from sidecar.pipeline import Pipeline
from sidecar.rerun import Record

log = logging.getLogger(__name__)

AUDIT = types_pb2.COMPARISON_KIND_AUDIT
BUDGET = "BUDGET"
"""Why a sampled item was not audited: the backlog is full because the token budget is spent. No error has this reason."""
READ_BACK_ENTRIES = 4096
"""Entries before the head in which a start looks for sampled items without a verdict."""
GROUP = 4
"""Audits of items that ran alone start together from this number on, or from as many as may run at once."""
BURST_SECONDS = 10.0
"""The most that the token budget accumulates, in seconds of its rate."""

CANARY = types_pb2.COMPARISON_KIND_CANARY
DEFAULT_CANARIES = Path(__file__).with_name("canaries.toml")
CANARIES_MAX = 256
NAME_LENGTH_MAX = 64
LOSSES_MAX = 2
"""Engines that may be lost in succession while a canary runs. Then it is not run until the sidecar restarts."""

REPLAY = types_pb2.COMPARISON_KIND_REPLAY
ROOM_SECONDS = 0.05
"""Polling interval while too many replayed runs wait."""


# ---- audits


class TokenBucket:
    """A token budget. While it is positive, any amount may be taken; a debt is paid off before it is positive again."""

    def __init__(self, tokens_per_second: float, now: float) -> None:
        """A rate of 0 is no limit."""
        self.tokens_per_second = tokens_per_second
        self._left = self._most = tokens_per_second * BURST_SECONDS
        self._at = now

    def open(self, now: float) -> bool:
        """Whether the budget is positive."""
        self._left = min(self._most, self._left + (now - self._at) * self.tokens_per_second)
        self._at = now
        return not self.tokens_per_second or self._left > 0

    def take(self, tokens: int) -> None:
        self._left -= tokens


@dataclass(frozen=True, slots=True)
class DueAudit:
    """A sampled item."""

    sequence: int
    alone: bool
    """Whether no other run was seen in the engine beside its first run."""
    since: float


class AuditBacklog:
    """Audits that wait, the oldest first.

    An audit should run at another batch occupancy than the first run. An item that ran beside others is audited as soon as
    there is room. One that ran alone waits until the engine has other runs, until GROUP of them can run together, or until
    `patience_seconds` have passed.
    """

    def __init__(self, most: int, patience_seconds: float) -> None:
        self.most, self.patience_seconds = most, patience_seconds
        self.waiting: deque[DueAudit] = deque()

    def add(self, due: DueAudit) -> bool:
        """False if the backlog is full."""
        if len(self.waiting) >= self.most:
            return False
        self.waiting.append(due)
        return True

    def take(self, now: float, *, occupancy: int, room: int) -> list[DueAudit]:
        """Removes and returns the audits that start now, at most `room`. `occupancy`: runs in the engine."""
        alone = [due for due in self.waiting if due.alone]
        together = bool(occupancy) or len(alone) >= min(GROUP, room)
        if alone and now - alone[0].since >= self.patience_seconds:
            together = True
        chosen = [due for due in self.waiting if together or not due.alone][:room]
        for due in chosen:
            self.waiting.remove(due)
        return chosen


class Auditor:
    """Audits a sampled share of the pipeline's completed items, within a token budget."""

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._backlog = AuditBacklog(settings.audit_backlog_max, settings.audit_patience_seconds)
        self._bucket = TokenBucket(settings.audit_tokens_per_second, pipeline.clock())
        self._running = 0
        pipeline.completion_listeners.append(self.completed)

    def completed(self, header: types_pb2.EntryHeader, occupancy: int) -> None:
        """An item has completed. `occupancy`: the most runs that were seen in the engine with it, itself included."""
        if self._settings.audit_rate:
            self._consider(header, alone=occupancy <= 1)
        if self._backlog.waiting:
            self.tick()

    async def read_back(self) -> None:
        """Queue the audits that an earlier epoch of this writer left. The occupancy of their first runs is unknown."""
        head = await self._pipeline.journal.head()
        first = max(1, head.index - READ_BACK_ENTRIES)
        entries = await self._pipeline.journal.entries(first, READ_BACK_ENTRIES + 1, payloads=False)
        headers = [entry.header for entry in entries]
        audited = {(h.sequence, h.fingerprint_digest) for h in headers if h.kind == types_pb2.ENTRY_KIND_AUDITED}
        for header in headers:
            own = header.kind == types_pb2.ENTRY_KIND_COMPLETED and header.writer == head.writer
            if own and (header.sequence, header.fingerprint_digest) not in audited:
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
        """Start the audits that may start now. Called when an item or an audit ends, and periodically."""
        window, now = self._pipeline.core.window, self._pipeline.clock()
        if self._pipeline.core.draining:
            for _ in self._backlog.waiting:
                self._skip(errors.Draining.reason)
            self._backlog.waiting.clear()
        self._pipeline.observer.metrics.audit_backlog.set(len(self._backlog.waiting))
        if window is None or not self._backlog.waiting or not self._bucket.open(now):
            return
        room = max(1, int(self._settings.reruns_share * window.engine.runs)) - self._running
        if room > 0 and (group := self._backlog.take(now, occupancy=window.runs, room=room)):
            self._running += len(group)
            self._pipeline.spawn(self._audit(group))

    async def _audit(self, group: Sequence[DueAudit]) -> None:
        records = [await self._read(due) for due in group]  # all of them before the first runs, so that they run together
        await asyncio.gather(*(self._check(record) for record in records))

    async def _read(self, due: DueAudit) -> Record | None:
        """None if the item cannot be run again here; that is counted."""
        try:
            (entries,) = await self._pipeline.journal.items(due.sequence, due.sequence, 1)
            record, engine = Record.of(entries), self._pipeline.engine
            if engine is not None and engine.model.fingerprint.digest != record.completed.fingerprint_digest:
                raise errors.FingerprintChanged("the engine has another fingerprint now")
        except errors.OstinatoError as error:
            self._skip(error.reason)
            return None
        return record

    async def _check(self, record: Record | None) -> None:
        if record is not None:
            self._bucket.take(len(record.input.token_ids) + len(record.output.token_ids))
            with contextlib.suppress(errors.OstinatoError):  # check has counted it
                await self._pipeline.rerunner.check(record, AUDIT)
        self._running -= 1
        self.tick()


# ---- canaries


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    parameters: dict[str, object]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    canary: Annotated[list[_Table], msgspec.Meta(max_length=CANARIES_MAX)] = []


def read_canaries(path: Path | None) -> dict[str, types_pb2.Item]:
    """The canaries in this TOML file, or the default ones: by name, a prompt with everything that determines its answer. Raises
    ValueError that names the file and the fault."""
    path, canaries = path or DEFAULT_CANARIES, dict[str, types_pb2.Item]()
    try:
        for position, table in enumerate(msgspec.convert(tomllib.loads(path.read_text()), _File).canary):
            item = _item(position, table)
            if canaries.setdefault(table.name, item) is not item:
                raise ValueError(f"{table.name!r} is the name of two canaries")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}") from error
    return canaries


def _item(position: int, table: _Table) -> types_pb2.Item:
    try:
        parameters = requests.parameters(table.parameters)
        if parameters is None or not parameters.HasField("seed"):
            raise ValueError("seed: is missing; the answer depends on it")
    except (ValueError, TypeError) as error:
        raise ValueError(f"canary[{position}].parameters.{error}") from error
    return types_pb2.Item(text=table.text, parameters=parameters)


class CanaryRunner:
    """Runs the canaries when an engine connects, and then every `seconds`. 0 disables them.

    The first answer of a canary under a fingerprint is the known one. It is kept as the journal's note
    `canary/FINGERPRINT/INPUT`, two digests in hexadecimal, and later answers are compared with it.
    """

    def __init__(self, pipeline: Pipeline, canaries: Mapping[str, types_pb2.Item], seconds: float) -> None:
        self._pipeline, self._canaries, self._seconds = pipeline, canaries, seconds
        self._prepared: dict[str, sequencer_pb2.AdmittedPayload | None] = {}
        """By name, for the model that runs. None if the service has refused the canary."""
        self._losses: Counter[str] = Counter()
        """By name: engines that were lost in succession while the canary ran."""
        self._model = b""
        self._incarnation = ""
        self._due_at = 0.0
        self._busy = False

    def tick(self) -> None:
        """Start a round if another engine has connected, or if the last round was long enough ago. Called periodically."""
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
            prepared = [(name, await self._prepare(name, item)) for name, item in self._canaries.items()]
            runs = [(name, given) for name, given in prepared if given is not None and self._may_run(name)]
            await asyncio.gather(*(self._run(name, given, engine.model.fingerprint.digest) for name, given in runs))
        finally:
            self._busy = False

    async def _prepare(self, name: str, item: types_pb2.Item) -> sequencer_pb2.AdmittedPayload | None:
        """The tokenised canary, once for each model. None if it was refused, or cannot be prepared now; that is counted."""
        if name in self._prepared:
            if (known := self._prepared[name]) is None:
                self._pipeline.observer.not_compared(CANARY, errors.InvalidRequest.reason)
            return known
        try:
            request = engine_pb2.PrepareRequest(items=[item])
            link = self._pipeline.link
            response = await (link.prepare if is_short(request) else link.prepare_long)(request, self._seconds)
        except errors.OstinatoError as error:
            self._pipeline.observer.not_compared(CANARY, error.reason)
            if isinstance(error, errors.InvalidRequest):
                self._prepared[name] = None
                log.warning("canary refused", extra={"canary": name, "why": error.message})
            return None
        (prepared,) = response.items
        given = self._prepared[name] = sequencer_pb2.AdmittedPayload(
            token_ids=prepared.token_ids,
            parameters=prepared.parameters,
            seed=prepared.seed,
            model_digest=response.model_digest,
            nonce=self._pipeline.random_bytes(NONCE_BYTES),
        )
        return given

    def _may_run(self, name: str) -> bool:
        """False if the canary may be what kills the engine."""
        if self._losses[name] == LOSSES_MAX:
            log.error("canary given up: the engine was lost under it", extra={"canary": name})
            self._losses[name] += 1
        if self._losses[name] > LOSSES_MAX:
            self._pipeline.observer.not_compared(CANARY, errors.AttemptsExhausted.reason)
        return self._losses[name] < LOSSES_MAX

    async def _run(self, name: str, given: sequencer_pb2.AdmittedPayload, fingerprint: bytes) -> None:
        digest = input_digest(given.token_ids, given.parameters, given.seed)
        note, known = _note_name(fingerprint, digest), None
        try:
            known = (await self._pipeline.journal.notes(note)).get(note)
            if known is None:
                await self._learn(name, given, digest)
            else:
                await self._compare(name, given, fingerprint, types_pb2.Output.FromString(known))
        except errors.OstinatoError as error:
            if known is None:  # otherwise check has counted it
                self._pipeline.observer.not_compared(CANARY, error.reason)
            if isinstance(error, errors.EngineUnavailable):
                self._losses[name] += 1
        else:
            del self._losses[name]

    async def _learn(self, name: str, given: sequencer_pb2.AdmittedPayload, digest: bytes) -> None:
        result = await self._pipeline.rerunner.start(given, 0, CANARY)
        note = _note_name(result.fingerprint_digest, digest)
        await self._pipeline.journal.append(Note(note, result.output.SerializeToString(deterministic=True)))
        log.info("canary learned", extra={"canary": name, "fingerprint": result.fingerprint_digest.hex()[:16]})

    async def _compare(
        self, name: str, given: sequencer_pb2.AdmittedPayload, fingerprint: bytes, output: types_pb2.Output
    ) -> None:
        header = types_pb2.EntryHeader(
            form=FORM,
            seed=given.seed,
            input_digest=sealed_input(FORM, given),
            fingerprint_digest=fingerprint,
            grade=output.grade,
        )
        record = Record(header, header, given, output, canary=name)
        recheck = await self._pipeline.rerunner.check(record, CANARY)
        if recheck.comparison.verdict == types_pb2.VERDICT_DIVERGED:
            log.error("canary diverged", extra={"canary": name})


def _note_name(fingerprint: bytes, digest: bytes) -> str:
    return f"canary/{fingerprint.hex()}/{digest.hex()}"


# ---- replays


async def replay(
    pipeline: Pipeline, first: int, last: int, concurrency: int, *, exclusive: bool, tenant: str
) -> AsyncIterator[sequencer_pb2.ReplayResponse]:
    """A verdict for each completed item of the range, in the order in which they are found; each is appended to the journal.
    `tenant`: who asks.

    Raises EngineUnavailable or Draining if the rest cannot be run, and JournalFull if the tenant has no room for verdicts. An
    item without a verdict can be replayed again.
    """
    counts = sequencer_pb2.ReplayResponse(total=last - first + 1)
    runs = _replays(pipeline, first, last, tenant, exclusive=exclusive)
    async with aclosing(bounded_gather(runs, concurrency)) as responses:
        async for response in responses:
            counts.seen += len(response.passed_over) or 1
            response.MergeFrom(counts)
            yield response


async def _replays(
    pipeline: Pipeline, first: int, last: int, tenant: str, *, exclusive: bool
) -> AsyncIterator[Coroutine[Any, Any, sequencer_pb2.ReplayResponse]]:
    async for page in pages(pipeline.journal, first, last):
        if others := [entries.admitted.header.sequence for entries in page if not _completed(entries)]:
            yield _passed_over(others)
        for entries in filter(_completed, page):
            pipeline.quota.check(tenant)
            while not pipeline.core.reruns.room(tenant):
                await asyncio.sleep(ROOM_SECONDS)
            yield _replay(pipeline, entries, tenant, exclusive=exclusive)


def _completed(entries: ItemEntries) -> bool:
    return entries.outcome is not None and entries.outcome.header.kind == types_pb2.ENTRY_KIND_COMPLETED


async def _passed_over(sequences: list[int]) -> sequencer_pb2.ReplayResponse:
    return sequencer_pb2.ReplayResponse(passed_over=sequences)


async def _replay(pipeline: Pipeline, entries: ItemEntries, tenant: str, *, exclusive: bool) -> sequencer_pb2.ReplayResponse:
    """If the runs differ, the response has both outputs."""
    sequence, rerunner = entries.admitted.header.sequence, pipeline.rerunner
    try:
        record = Record.of(entries)
        second = rerunner.start(record.input, sequence, REPLAY, tenant, exclusive=exclusive)
        recheck = await rerunner.check(record, REPLAY, second, tenant)
    except (errors.EngineUnavailable, errors.Draining):
        raise
    except errors.OstinatoError as error:
        if isinstance(error, errors.PayloadPruned):  # check counts all others
            pipeline.observer.not_compared(REPLAY, error.reason)
        return sequencer_pb2.ReplayResponse(comparison=no_verdict(sequence, REPLAY, error))
    response = sequencer_pb2.ReplayResponse(comparison=recheck.comparison)
    if response.comparison.HasField("first_difference"):
        response.comparison.actual.CopyFrom(recheck.output)
        response.record.CopyFrom(record_of(entries, pipeline.fingerprints.known))
    return response
