"""Canaries: prompts with known answers, run again when an engine connects and from time to time.

An answer is learned the first time that a fingerprint makes it, and kept as a note `canary/FINGERPRINT/INPUT` (two digests in
hexadecimal) for as long as the journal is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence

from ostinato import errors
from ostinato.digest import input_digest, model_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.canaries import Canary
from sidecar.dispatcher import Dispatcher
from sidecar.journal import Note
from sidecar.recheck import Record

log = logging.getLogger(__name__)

CANARY = types_pb2.COMPARISON_KIND_CANARY
LOSSES_MAX = 2
"""Engines that may be lost under a canary, with no answer between; then it rests until the sidecar starts again."""


class Watch:
    """Looks after canaries. One beside each Dispatcher."""

    def __init__(self, dispatcher: Dispatcher, canaries: Sequence[Canary], seconds: float) -> None:
        """`seconds` between rounds; 0: there are none."""
        self._dispatcher, self._canaries, self._seconds = dispatcher, canaries, seconds
        self._prepared: dict[str, sequencer_pb2.AdmittedPayload | None] = {}
        """By name, for the model that runs; None: it was refused, and that was said."""
        self._losses: Counter[str] = Counter()
        """By name: engines that were lost under it, one after the other."""
        self._model = b""
        self._incarnation = ""
        self._due_at = 0.0
        self._busy = False

    def look(self) -> None:
        """Begin a round if it is time: another engine has connected, or the last round was long ago. Told by the clock."""
        engine, now = self._dispatcher.engine, self._dispatcher.clock()
        if engine is None:
            self._incarnation = ""
            return
        if engine.incarnation != self._incarnation:
            self._incarnation, self._due_at = engine.incarnation, now
        if self._seconds and now >= self._due_at and not self._busy and not self._dispatcher.core.draining:
            self._busy, self._due_at = True, now + self._seconds
            self._dispatcher.spawn(self._round(engine))

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
                self._dispatcher.observer.not_compared(CANARY, errors.InvalidRequest.reason)
            return
        try:
            prepared = await self._dispatcher.link.prepare(engine_pb2.PrepareRequest(items=[canary.item]), self._seconds)
        except errors.OstinatoError as error:
            self._dispatcher.observer.not_compared(CANARY, error.reason)
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
                checked = await self._dispatcher.rechecker.check(
                    Record(header, header, given, output, canary=canary.name), CANARY
                )
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
            return (await self._dispatcher.journal.notes(name)).get(name)
        except errors.JournalUnavailable as error:
            self._dispatcher.observer.not_compared(CANARY, error.reason)
            raise

    def _trusted(self, canary: Canary) -> bool:
        """Whether it is not what kills the engine, again and again, as soon as it has connected."""
        if self._losses[canary.name] == LOSSES_MAX:
            log.error("canary given up: the engine was lost under it", extra={"canary": canary.name})
            self._losses[canary.name] += 1
        if self._losses[canary.name] > LOSSES_MAX:
            self._dispatcher.observer.not_compared(CANARY, errors.AttemptsExhausted.reason)
        return self._losses[canary.name] < LOSSES_MAX

    async def _learn(self, canary: Canary, given: sequencer_pb2.AdmittedPayload, digest: bytes) -> None:
        try:
            made = await self._dispatcher.rechecker.begin(given, 0, CANARY)
            note = Note(_name(made.fingerprint_digest, digest), made.output.SerializeToString(deterministic=True))
            await self._dispatcher.journal.append(note)
        except errors.OstinatoError as error:
            self._dispatcher.observer.not_compared(CANARY, error.reason)
            raise
        log.info("canary learned", extra={"canary": canary.name, "fingerprint": made.fingerprint_digest.hex()[:16]})


def _name(fingerprint: bytes, digest: bytes) -> str:
    return f"canary/{fingerprint.hex()}/{digest.hex()}"
