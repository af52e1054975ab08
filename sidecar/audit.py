"""Audits: a share of what completed, chosen by lot, run again in the background within a budget and compared."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from ostinato import errors
from ostinato.digest import drawn
from ostinato.v1 import types_pb2

from sidecar.config import Settings
from sidecar.core.backlog import Backlog, Bucket, Due
from sidecar.dispatcher import Dispatcher
from sidecar.journal import Sealed
from sidecar.recheck import Record

AUDIT = types_pb2.COMPARISON_KIND_AUDIT
BUDGET = "BUDGET"
"""Why a chosen item was not run again, where no error of the table says it: the backlog is full because the budget is spent."""
READ_BACK_ENTRIES = 4096
"""How far back a start looks for chosen items that no verdict names."""


class Auditor:
    """One beside each Dispatcher, whose outcomes it witnesses."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings) -> None:
        self._dispatcher, self._settings = dispatcher, settings
        self._backlog = Backlog(settings.audit_backlog_max, settings.audit_patience_seconds)
        self._bucket = Bucket(settings.audit_tokens_per_second, dispatcher.clock())
        self._running = 0
        dispatcher.outcomes.witnesses.append(self.completed)

    def completed(self, record: Record, company: int) -> None:
        """See outcomes.Witness."""
        self._consider(record.completed, alone=company <= 1)
        self.look()

    async def read_back(self) -> None:
        """Take up what an earlier epoch of this writer chose and did not come to; how it ran is not known any more."""
        journal = self._dispatcher.journal
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
        if not drawn("audit", completed.log_id, completed.sequence, self._settings.audit_rate):
            return
        now = self._dispatcher.clock()
        if not self._backlog.add(Due(completed.sequence, alone, now)):
            self._skip(errors.QueueFull.reason if self._bucket.open(now) else BUDGET)

    def _skip(self, reason: str) -> None:
        self._dispatcher.observer.not_compared(AUDIT, reason)

    def look(self) -> None:
        """Begin what may begin. Told whenever an item or an audit ends, and by the clock."""
        window, now = self._dispatcher.core.window, self._dispatcher.clock()
        if self._dispatcher.core.draining:
            for _ in self._backlog.waiting:
                self._skip(errors.Draining.reason)
            self._backlog.waiting.clear()
        self._dispatcher.observer.audits_waiting(len(self._backlog.waiting))
        if window is None or not self._backlog.waiting or not self._bucket.open(now):
            return
        room = max(1, int(self._settings.reruns_share * window.engine.runs)) - self._running
        if room <= 0:
            return
        if group := self._backlog.take(now, company=window.runs, room=room):
            self._running += len(group)
            self._dispatcher.spawn(self._audit(group))

    async def _audit(self, group: Sequence[Due]) -> None:
        """All are read before the first is run, so that they run beside each other."""
        records = [await self._read(due) for due in group]
        await asyncio.gather(*(self._check(record) for record in records))

    async def _read(self, due: Due) -> Record | None:
        """None: it cannot be run again here, and was counted."""
        try:
            (entries,) = await self._dispatcher.journal.items(due.sequence, due.sequence, 1)
            record, engine = Record.of(entries), self._dispatcher.engine
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
                await self._dispatcher.rechecker.check(record, AUDIT)
        self._running -= 1
        self.look()
