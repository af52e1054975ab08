"""The fingerprints of all engines so far, by digest. They are kept as notes in the journal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from ostinato import errors
from ostinato.compare import fingerprint_drift
from ostinato.digest import fingerprint_digest
from ostinato.v1 import types_pb2

from sidecar.journal.model import FINGERPRINTS, Note
from sidecar.journal.writer import Journal

log = logging.getLogger(__name__)


class Fingerprints:
    """A digest is over the fields: a fingerprint that does not match its digest is rejected."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.known: dict[bytes, types_pb2.Fingerprint] = {}
        """By digest."""
        self._kept: set[bytes] = set()
        """Digests of those in the journal."""

    async def load(self) -> None:
        """Read those of earlier epochs."""
        for name, value in (await self._journal.notes(FINGERPRINTS)).items():
            try:
                fingerprint = types_pb2.Fingerprint.FromString(value)
            except DecodeError:
                log.error("a note holds no fingerprint that can be read", extra={"note": name})
                continue
            if self._accept(fingerprint):
                self._kept.add(fingerprint.digest)
            else:
                log.error("a note holds a fingerprint that does not fit its digest", extra={"note": name})

    async def meet(self, fingerprint: types_pb2.Fingerprint) -> None:
        """Keep an engine's fingerprint. It is known at once, and durable before any outcome of that engine."""
        if fingerprint.digest in self._kept:
            return
        if not self._accept(fingerprint):
            log.error("the engine's fingerprint does not fit its digest", extra={"fingerprint": fingerprint.digest.hex()[:16]})
            return
        with contextlib.suppress(errors.Refused):  # tried again when an engine connects with it
            await self._journal.append(
                Note(FINGERPRINTS + fingerprint.digest.hex(), fingerprint.SerializeToString(deterministic=True))
            )
            self._kept.add(fingerprint.digest)

    def drift(self, expected: bytes, actual: bytes) -> list[str]:
        """The fields in which two fingerprints differ, by their digests."""
        return [] if expected == actual else fingerprint_drift(self.fields(expected), self.fields(actual))

    def fields(self, digest: bytes) -> Mapping[str, str] | None:
        """None: no engine had it while this journal was kept."""
        known = self.known.get(digest)
        return None if known is None else known.fields

    def _accept(self, fingerprint: types_pb2.Fingerprint) -> bool:
        fits = fingerprint_digest(fingerprint.fields) == fingerprint.digest
        if fits:
            self.known[fingerprint.digest] = fingerprint
        return fits
