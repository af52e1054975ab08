"""Which sidecar may drive the engine, and what it may submit."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ostinato.chain import SEQUENCE_MAX
from ostinato.errors import EpochStale, JournalBehind, OutOfOrder, ProtocolViolation, WriterBusy
from ostinato.v1 import engine_pb2
from serving import files
from serving.program import StartupError

SAVE_SECONDS = 1.0
"""The least time between two writes of the sequence file."""
LOGS_MAX = 256
"""Logs in the sequence file: those that were run last."""
EPOCH_MAX, EPOCH_JUMP_MAX = 1 << 32, 1 << 16
"""Of a writer, and above the highest that this process has admitted of it. An epoch is one start of a sidecar."""
SEQUENCE_JUMP_MAX = 1 << 32
"""Above the newest that the sidecar has named or submitted. Between two items of its own, only other writers' can lie."""
RUN_IDS_MAX = 65_536
"""Run ids that a stream remembers, the newest ones, to detect one that is used twice."""
PURPOSES = frozenset(engine_pb2.Purpose.values()) - {engine_pb2.PURPOSE_UNSPECIFIED}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Writer:
    """A sidecar's name, and the log it writes."""

    log_id: str
    name: str

    def __str__(self) -> str:
        return f"writer {self.name} of log {self.log_id}"


@dataclass(slots=True)
class Fence:
    """Which sidecar may drive the engine. Pure. Lives as long as the process; the sequences live longer (`SequenceFile`).

    1. An epoch lower than the highest admitted of its writer on its log is refused: that sidecar has been replaced.
    2. While one writer of one log is connected, every other writer and log is refused.
    3. The same writer with the same epoch or a higher one takes over from its own earlier stream.
    4. A sidecar whose journal ends before a sequence that was run here is refused: it would assign that number again.
    5. Epochs and sequences beyond bounds that no sidecar reaches are refused: they would shut the right one out.
    6. A refusal changes nothing.
    """

    connected: Writer | None = None
    sequences: dict[str, int] = field(default_factory=dict)
    """The newest that was run here, by log id. The log that was run last is the last."""
    _highest: dict[Writer, int] = field(default_factory=dict)

    def admit(self, hello: engine_pb2.Hello) -> None:
        """Connects this writer. Raises ProtocolViolation, EpochStale, WriterBusy or JournalBehind."""
        if not hello.log_id or not hello.writer or not hello.epoch:
            raise ProtocolViolation("hello lacks log_id, writer or epoch")
        writer = Writer(hello.log_id, hello.writer)
        highest = self._highest.get(writer, 0)
        if hello.epoch < highest:
            raise EpochStale(
                f"epoch {hello.epoch} of {writer} is over: {highest} has been here (if that cannot be, restart the service)",
                details={"epoch": str(hello.epoch), "highest": str(highest)},
            )
        if hello.epoch > EPOCH_MAX or (highest and hello.epoch > highest + EPOCH_JUMP_MAX):
            raise ProtocolViolation(
                f"epoch {hello.epoch} of {writer} is too far above {highest}, the highest that has been here: "
                "if it is right, restart the service, which remembers no epochs"
            )
        if hello.last_sequence > SEQUENCE_MAX:
            raise ProtocolViolation(f"sequence {hello.last_sequence} of {writer}: no log has reached {SEQUENCE_MAX}")
        if self.connected not in (None, writer):
            raise WriterBusy(f"another is connected: {self.connected}", retry_after=1.0)
        newest = self.sequences.get(hello.log_id, 0)
        if hello.last_sequence < newest:
            raise JournalBehind(
                f"sequence {newest} of log {hello.log_id} was run here, and the sidecar's journal ends at "
                f"{hello.last_sequence}: put a newer copy back, or accept the loss: "
                f"python -m sidecar accept-loss --through {newest}",
                details={"last_sequence": str(hello.last_sequence), "newest": str(newest)},
            )
        assert hello.epoch >= highest and self.connected in (None, writer) and hello.last_sequence >= newest
        self.connected = writer
        self._highest[writer] = hello.epoch

    def ran(self, log_id: str, sequence: int) -> None:
        """Records that this sequence was submitted."""
        self.sequences[log_id] = max(sequence, self.sequences.pop(log_id, 0))

    def leave(self) -> None:
        """Records that the writer's stream has ended."""
        self.connected = None


class SequenceFile:
    """The newest sequence that was run of each log, over restarts. One file, replaced whole, in a thread of its own because a
    disk may be slow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "sequences")
        self._soon: asyncio.TimerHandle | None = None
        self._waiting: Mapping[str, int] = {}

    def read(self) -> dict[str, int]:
        """By log id. Raises StartupError for a file that cannot be read or has another content."""
        try:
            content = files.read(self._path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StartupError(
                f"--state-dir: {self._path} cannot be read: {error.strerror or error}: let this user read it, or name another"
            ) from error
        try:
            sequences = {log_id: int(sequence) for log_id, sequence in json.loads(content).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StartupError(
                f"--state-dir: {self._path} is not a list of sequences ({error!r}): put a copy back, or, if every journal is "
                "known to have its end, remove it"
            ) from error
        for log_id, sequence in sequences.items():
            if sequence > SEQUENCE_MAX:
                raise StartupError(
                    f"--state-dir: {self._path}: log {log_id} cannot have reached sequence {sequence}: remove this log from "
                    "the file, if its journal is known to have its end, or put a copy of the file back"
                )
        return sequences

    def write_soon(self, sequences: Mapping[str, int]) -> None:
        """Writes this mapping, as it is then, within SAVE_SECONDS."""
        self._waiting = sequences
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SAVE_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes now what `write_soon` has left to do."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
            self.write(self._waiting)

    def write(self, sequences: Mapping[str, int]) -> None:
        """Keeps the last LOGS_MAX of the mapping. Returns at once; a failure is logged."""
        kept = {log_id: str(sequence) for log_id, sequence in list(sequences.items())[-LOGS_MAX:]}
        written = self._thread.submit(files.replace, self._path, json.dumps(kept, indent=1), parents=True)
        written.add_done_callback(self._log_failure)

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.shutdown()

    @staticmethod
    def _log_failure(written: Future[None]) -> None:
        if written.exception() is not None:
            _log.error("cannot write the newest sequences", extra={"why": str(written.exception())})


class Submissions:
    """What one stream has submitted. A sidecar that breaks one of these rules loses its stream.

    1. Run ids are used once (among the newest RUN_IDS_MAX) and are not 0.
    2. Sequences of primary first attempts rise, except those that go ahead of other tenants' items. Later attempts need not:
       an item may come from another writer. None is more than SEQUENCE_JUMP_MAX above the newest that the sidecar has named:
       the service would remember it for good.
    3. Every run has a known purpose, an attempt from 1, token ids and a length.
    """

    def __init__(self, last_sequence: int) -> None:
        """`last_sequence`: of the sidecar's journal when the stream began."""
        self._last_sequence = 0
        self._known = last_sequence
        """The newest that the sidecar has named or submitted."""
        self._ids: set[int] = set()
        self._order: deque[int] = deque()

    def add(self, submit: engine_pb2.Submit) -> None:
        """Raises ProtocolViolation or OutOfOrder."""
        run_id, primary = submit.run_id, submit.purpose == engine_pb2.PURPOSE_PRIMARY
        if not run_id or run_id in self._ids:
            raise ProtocolViolation(f"run_id {run_id} is used twice" if run_id else "run_id 0 is not allowed")
        if submit.purpose not in PURPOSES:
            raise ProtocolViolation(f"run {run_id}: unknown purpose {submit.purpose}")
        if not submit.attempt:
            raise ProtocolViolation(f"run {run_id}: attempts count from 1")
        if not submit.token_ids or not submit.parameters.max_new_tokens:
            raise ProtocolViolation(f"run {run_id}: lacks token_ids or parameters")
        in_order = primary and submit.attempt == 1 and not submit.ahead
        if primary and (not submit.sequence or (in_order and submit.sequence <= self._last_sequence)):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} comes after {self._last_sequence}")
        if primary and submit.sequence > min(self._known + SEQUENCE_JUMP_MAX, SEQUENCE_MAX):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} is too far above {self._known}, the newest known one")
        if primary:
            self._known = max(self._known, submit.sequence)
        if in_order:
            self._last_sequence = submit.sequence
        self._ids.add(run_id)
        self._order.append(run_id)
        if len(self._order) > RUN_IDS_MAX:
            self._ids.discard(self._order.popleft())
