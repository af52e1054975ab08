"""Which sidecar may drive the engine. Pure; kept in memory for the life of the process.

1. An epoch lower than the highest admitted of its writer on its log is refused: that sidecar has been replaced.
2. While one writer of one log is connected, every other writer and log is refused.
3. The same writer with the same epoch or a higher one takes over from its own earlier stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato.errors import EpochStale, ProtocolViolation, WriterBusy
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
    _highest: dict[Writer, int] = field(default_factory=dict)

    def admit(self, hello: engine_pb2.Hello) -> None:
        """Let this writer in; whoever was connected before is to go. Raises ProtocolViolation, EpochStale or WriterBusy, and
        then remembers nothing of it."""
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
        self.connected = writer
        self._highest[writer] = hello.epoch

    def leave(self) -> None:
        """The writer's stream has ended."""
        self.connected = None
