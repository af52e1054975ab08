"""Results of the self-test that are kept for the next start."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import replace

from ostinato.v1 import types_pb2
from serving import files

VERSION = "5"
"""Of the test and of the form of a proof: it changes with the cases, too. A proof by another version is ignored."""

_log = logging.getLogger(__name__)


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of the self-test."""

    grade: Annotated[types_pb2.Grade.ValueType, msgspec.Meta(ge=types_pb2.GRADE_BEST_EFFORT, le=types_pb2.GRADE_EXACT)]
    reason: str
    seconds: float
    compared_tokens: int


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finding and what it holds for, as JSON in a file."""

    fingerprint: str
    """Digest, hexadecimal."""
    code: str
    """Digest of the service's own source."""
    made_at: str
    """ISO 8601. Informative."""
    finding: Finding


@dataclass(frozen=True, slots=True)
class Proofs:
    """The proofs of one directory, one file per fingerprint and VERSION, replaced whole. A proof of another fingerprint or code
    is ignored, and so is a file that cannot be read."""

    directory: Path
    code: str

    def find(self, fingerprint: bytes) -> Finding | None:
        """The finding under this fingerprint's digest; its reason says when it was made."""
        path = self._path(fingerprint)
        try:
            proof = msgspec.json.decode(files.read(path), type=Proof)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("proof unreadable", extra={"path": path, "why": str(error)})
            return None
        if (proof.fingerprint, proof.code) != (fingerprint.hex(), self.code):
            return None
        return replace(proof.finding, reason=f"{proof.finding.reason}; proved at {proof.made_at}")

    def keep(self, fingerprint: bytes, finding: Finding, made_at: str) -> None:
        """Writes a proof. A failure is only logged: the next start tests again."""
        proof, path = Proof(fingerprint.hex(), self.code, made_at, finding), self._path(fingerprint)
        try:
            files.replace(path, msgspec.json.format(msgspec.json.encode(proof), indent=1).decode() + "\n", parents=True)
        except OSError as error:
            _log.warning("proof not kept", extra={"path": path, "why": str(error)})

    def _path(self, fingerprint: bytes) -> Path:
        return self.directory / f"{fingerprint.hex()}.{VERSION}.json"


def code_digest(package: Path) -> str:
    """Of all Python source under a package. After a change a proof no longer holds."""
    whole = sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
