"""The newest sequence that was run of each log, kept over restarts: a sidecar whose journal knows less has lost its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from serving.program import StartupError, replace_file

LOGS_MAX = 256
"""Those that were run last."""


_log = logging.getLogger(__name__)


class Memory:
    """One file, replaced whole, in a thread of its own: a disk may take its time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "memory")

    def read(self) -> dict[str, int]:
        """By log id. Raises StartupError for a file that cannot be read, or that is something else."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StartupError(
                f"--state-dir: {self._path} cannot be read: {error.strerror or error}: let this user read it, or name another"
            ) from error
        try:
            return {log_id: int(sequence) for log_id, sequence in json.loads(content).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StartupError(
                f"--state-dir: {self._path} is not a list of sequences ({error!r}): put a copy back, or, if every journal is "
                "known to have its end, remove it"
            ) from error

    def write(self, sequences: Mapping[str, int]) -> None:
        """Soon. The last ones of the mapping are kept; what cannot be written is logged."""
        kept = {log_id: str(sequence) for log_id, sequence in list(sequences.items())[-LOGS_MAX:]}
        self._thread.submit(replace_file, self._path, json.dumps(kept, indent=1)).add_done_callback(_say_what_failed)

    def close(self) -> None:
        """When everything is written."""
        self._thread.shutdown()


def _say_what_failed(written: Future[None]) -> None:
    if written.exception() is not None:
        _log.error("what was run is not remembered", extra={"why": str(written.exception())})
