"""Which sidecar may drive the engine. Pure; but for the sequences, for the life of the process.

1. An epoch lower than the highest admitted of its writer on its log is refused: that sidecar has been replaced.
2. While one writer of one log is connected, every other writer and log is refused.
3. The same writer with the same epoch or a higher one takes over from its own earlier stream.
4. A sidecar whose journal ends before a sequence that was run here is refused: it would give that number out again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato.errors import EpochStale, JournalBehind, ProtocolViolation, WriterBusy
from ostinato.v1 import engine_pb2


@dataclass(frozen=True, slots=True)
class Writer:
    """Who is connected."""

    log_id: str
    name: str

    def __str__(self) -> str:
        return f"writer {self.name} of log {self.log_id}"


@dataclass(slots=True)
class Fence:
    """Epochs seen and the writer connected."""

    connected: Writer | None = None
    sequences: dict[str, int] = field(default_factory=dict)
    """By log id, the newest that was run here; the log that was run last is the last."""
    _highest: dict[Writer, int] = field(default_factory=dict)

    def admit(self, hello: engine_pb2.Hello) -> None:
        """Let this writer in; whoever was connected before is to go. Raises ProtocolViolation, EpochStale, WriterBusy or
        JournalBehind, and then remembers nothing of it."""
        if not hello.log_id or not hello.writer or not hello.epoch:
            raise ProtocolViolation("hello lacks log_id, writer or epoch")
        writer = Writer(hello.log_id, hello.writer)
        highest = self._highest.get(writer, 0)
        if hello.epoch < highest:
            raise EpochStale(
                f"epoch {hello.epoch} of {writer} is over: {highest} has been here",
                details={"epoch": str(hello.epoch), "highest": str(highest)},
            )
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
        self.connected = writer
        self._highest[writer] = hello.epoch

    def ran(self, log_id: str, sequence: int) -> None:
        """This sequence was submitted."""
        self.sequences[log_id] = max(sequence, self.sequences.pop(log_id, 0))

    def leave(self) -> None:
        """The writer's stream has ended."""
        self.connected = None
