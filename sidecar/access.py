"""Items of a range, and which of them the caller may see. What it may not see does not exist for it: NOT_FOUND, never
PERMISSION_DENIED."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from ostinato import errors
from ostinato.v1 import sequencer_pb2
from serving.auth import caller

from sidecar.journal.model import ItemEntries
from sidecar.journal.writer import Journal

PAGE_ITEMS = 64
"""Read at once."""


def visible(item: ItemEntries) -> bool:
    """Whether the caller may see it. Without its payload nobody knows whose it is, and only an admin may."""
    if not item.admitted.payload:
        return caller().admin
    return caller().may_see(sequencer_pb2.AdmittedPayload.FromString(item.admitted.payload).tenant)


async def pages(journal: Journal, first: int, last: int) -> AsyncIterator[Sequence[ItemEntries]]:
    """The items of a range, some at once."""
    while first <= last and (page := await journal.items(first, last, PAGE_ITEMS)):
        yield page
        first = page[-1].admitted.header.sequence + 1


async def need_sight(journal: Journal, first: int, last: int) -> None:
    """Raises NotFound for a range with an item in it that the caller may not see. Reads nothing for an admin."""
    if not caller().admin:
        async for page in pages(journal, first, last):
            for item in page:
                if not visible(item):
                    raise errors.NotFound(f"no sequence {item.admitted.header.sequence}")
