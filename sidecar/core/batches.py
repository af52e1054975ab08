"""Calls and their numbers, for as long as one of their items has not ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ostinato.errors import OstinatoError

from sidecar.core.events import Admit
from sidecar.core.item import Item


@dataclass(slots=True, eq=False)
class Batch:
    """An admitted call."""

    admit: Admit
    open_items: int
    first_sequence: int = 0
    """0 until the numbers are durable."""
    left: OstinatoError | None = None
    """Why the caller went, if it did."""

    def items(self) -> Iterator[Item]:
        """A keyed batch outlives its caller's deadline."""
        deadline = None if self.admit.keyed else self.admit.deadline
        for sequence, need in enumerate(self.admit.needs, self.first_sequence):
            yield Item(sequence, self.admit.ticket, need, self.admit.keyed, deadline)


class Batches:
    """By ticket."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self.numbering = 0
        """Items whose numbers are not durable yet."""

    def open(self, admit: Admit) -> None:
        assert admit.ticket not in self._batches
        self._batches[admit.ticket] = Batch(admit, len(admit.needs))
        self.numbering += len(admit.needs)

    def numbered(self, ticket: int, first_sequence: int) -> Batch:
        batch = self._batches[ticket]
        batch.first_sequence = first_sequence
        self.numbering -= len(batch.admit.needs)
        return batch

    def not_numbered(self, ticket: int) -> None:
        self.numbering -= len(self._batches.pop(ticket).admit.needs)

    def item_ended(self, item: Item) -> None:
        batch = self._batches.get(item.ticket)
        if batch is not None:
            batch.open_items -= 1
            if not batch.open_items:
                del self._batches[item.ticket]

    def left(self, ticket: int, error: OstinatoError) -> range:
        """The caller went; the sequences that end with it: none of a keyed batch, none before there are numbers."""
        batch = self._batches.get(ticket)
        if batch is None or batch.admit.keyed:
            return range(0)
        batch.left = error
        return range(batch.first_sequence, batch.first_sequence + len(batch.admit.needs)) if batch.first_sequence else range(0)
