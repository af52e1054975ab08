"""Proofs: what a self-test found, kept for the next start of the same thing on the same machine.

One small JSON file per fingerprint, written at once or not at all. A proof of another fingerprint, test or code proves nothing
and is passed over, and so is one that cannot be read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ostinato.v1 import types_pb2
from serving.program import replace_file

from service.selftest import VERSION, Finding

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proof:
    """The file's content."""

    fingerprint: str
    """Digest, hexadecimal."""
    test: str
    code: str
    """Digest of the service's own source."""
    grade: str
    reason: str
    seconds: float
    compared_tokens: int
    made_at: str
    """ISO 8601, for people."""


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one directory, made under this code."""

    directory: Path
    code: str

    def find(self, fingerprint: bytes) -> tuple[Finding, str] | None:
        """What was found under this fingerprint, and when."""
        path = self._path(fingerprint)
        try:
            proof = Proof(**json.loads(path.read_text()))
            grade = types_pb2.Grade.Value(proof.grade)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            _log.warning("proof unreadable", extra={"path": path, "why": str(error)})
            return None
        if (proof.fingerprint, proof.test, proof.code) != (fingerprint.hex(), VERSION, self.code):
            return None
        return Finding(grade, proof.reason, proof.seconds, proof.compared_tokens), proof.made_at

    def keep(self, fingerprint: bytes, finding: Finding, made_at: str) -> None:
        """Write it down. That it cannot be is only worth a warning: the next start tests again."""
        proof = Proof(
            fingerprint=fingerprint.hex(),
            test=VERSION,
            code=self.code,
            grade=types_pb2.Grade.Name(finding.grade),
            reason=finding.reason,
            seconds=finding.seconds,
            compared_tokens=finding.compared_tokens,
            made_at=made_at,
        )
        path = self._path(fingerprint)
        try:
            replace_file(path, json.dumps(dataclasses.asdict(proof), indent=1) + "\n")
        except OSError as error:
            _log.warning("proof not kept", extra={"path": path, "why": str(error)})

    def _path(self, fingerprint: bytes) -> Path:
        return self.directory / f"{fingerprint.hex()}.json"


def code_digest(package: Path) -> str:
    """Of all Python source under a package: what has changed since may have broken what was proved."""
    whole = sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
