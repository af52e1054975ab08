"""What a reader of the journal is told of a sequence without an item, and how many calls of one kind run."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from ostinato import errors
from ostinato.v1 import sequencer_pb2
from serving.auth import CALLER, Identity, Role

from sidecar.api import ConcurrencyLimit, SequencerServicer
from sidecar.config import Settings
from sidecar.held import Held
from sidecar.journal.model import Head


class Empty:
    """A journal whose newest sequence is 5, and that has no items."""

    async def items(self, first: int, last: int, limit: int) -> list[Any]:
        return []

    async def head(self) -> Head:
        return Head("0" * 32, "writer", 1, 9, bytes(32), 5)


@pytest.mark.parametrize(
    ("role", "sequence", "message"),
    [
        (Role.ADMIN, 5, "sequence 5 is lost: it was given out, and the journal's end with its item was lost"),
        (Role.ADMIN, 6, "no sequence 6"),
        (Role.TENANT, 5, "no sequence 5"),
    ],
)
async def test_a_sequence_without_an_item(role: Role, sequence: int, message: str) -> None:
    """An admin is told that a sequence is lost; to a tenant it does not exist, as another tenant's."""
    settings = Settings()
    pipeline: Any = SimpleNamespace(journal=Empty(), held=Held(settings.held, lambda *_: None))
    tracker: Any = None
    servicer = SequencerServicer(pipeline, tracker, settings)
    CALLER.set(Identity("tenant", role))
    context: Any = None

    with pytest.raises(errors.NotFound) as told:
        await servicer.Get(sequencer_pb2.GetRequest(sequence=sequence), context)

    assert told.value.message == message


def test_a_tenants_calls_are_bounded() -> None:
    """A tenant at its own bound is refused and another is not; at the bound of all every tenant is."""
    limit = ConcurrencyLimit("replays", 3, tenant_most=2)

    def taken(tenant: str) -> str:
        CALLER.set(Identity(tenant, Role.TENANT))
        try:
            stack.enter_context(limit.acquired())
        except errors.QueueFull as full:
            return full.message
        return ""

    with ExitStack() as stack:
        told = [taken(tenant) for tenant in ("flood", "flood", "flood", "other", "third")]

    assert told == ["", "", "2 replays of this tenant run already", "", "3 replays run already"]
    assert not limit._taken
