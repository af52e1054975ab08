"""The reads of a `Journal`: each takes its place among the appends, in the thread of the backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sidecar.journal import Binding, Head, ItemEntries, Sealed
from sidecar.journal.committer import Backend

T = TypeVar("T")


class Reads(ABC):
    """Over a backend; how a read gets into its thread is the heir's to say."""

    def __init__(self, backend: Backend, now_millis: Callable[[], int]) -> None:
        self._backend, self._now_millis = backend, now_millis

    @abstractmethod
    async def _read(self, read: Callable[[], T]) -> T:
        """Sees everything that was appended before it."""

    async def binding(self, tenant: str, key: str) -> Binding | None:
        return await self._read(lambda: self._backend.binding(tenant, key, self._now_millis()))

    async def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        return await self._read(lambda: self._backend.items(first, last, limit))

    async def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]:
        return await self._read(lambda: self._backend.unfinished(first, last, limit))

    async def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        return await self._read(lambda: self._backend.entries(from_index, limit, payloads=payloads))

    async def notes(self, prefix: str) -> Mapping[str, bytes]:
        return await self._read(lambda: self._backend.notes(prefix))

    async def head(self) -> Head:
        return await self._read(self._backend.newest)
