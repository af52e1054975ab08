"""What fingerprints are of, remembered."""

from __future__ import annotations

from collections.abc import Mapping

from ostinato import errors
from ostinato.digest import fingerprint_digest
from ostinato.v1 import types_pb2

from sidecar.fingerprints import Fingerprints
from sidecar.journal.model import Appended, Draft, Note


class Notes:
    """As much of a Journal as is asked."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.full = False

    async def append(self, draft: Draft) -> Appended:
        assert isinstance(draft, Note)
        if self.full:
            raise errors.JournalFull("no room")
        assert draft.name not in self.kept, "written twice"
        self.kept[draft.name] = draft.value
        return Appended(())

    async def notes(self, prefix: str) -> Mapping[str, bytes]:
        return {name: value for name, value in self.kept.items() if name.startswith(prefix)}


def of(**fields: str) -> types_pb2.Fingerprint:
    return types_pb2.Fingerprint(digest=fingerprint_digest(fields), fields=fields)


def opened(journal: Notes) -> Fingerprints:
    return Fingerprints(journal)  # type: ignore[arg-type]


async def test_what_was_met_is_known_in_the_next_epoch() -> None:
    """Each fingerprint is written once, and the fields of two that were met in other epochs can be compared."""
    journal, one, other = Notes(), of(device="a", threads="1"), of(device="b", driver="2", threads="1")
    first = opened(journal)
    for each in (one, one, other):
        await first.meet(each)

    second = opened(journal)
    await second.load()
    await second.meet(one)

    assert second.known == {one.digest: one, other.digest: other}
    assert second.drift(one.digest, other.digest) == ["fingerprint.device", "fingerprint.driver"]
    assert second.drift(one.digest, one.digest) == []
    assert second.drift(one.digest, bytes(32)) == ["fingerprint"]


async def test_a_full_journal_is_asked_again() -> None:
    """What found no room is known until the process ends, and written when it comes again."""
    journal, one = Notes(), of(device="a")
    fingerprints = opened(journal)
    journal.full = True
    await fingerprints.meet(one)

    assert (one.digest in fingerprints.known, journal.kept) == (True, {})
    journal.full = False
    await fingerprints.meet(one)
    assert len(journal.kept) == 1


async def test_a_false_digest_is_not_believed() -> None:
    """An engine's fingerprint that does not fit its digest is not kept. A note that does not, or cannot be read, does not keep
    a sidecar from starting, and is not believed."""
    journal, sound, other = Notes(), of(device="a"), of(device="b")
    for each in (sound, types_pb2.Fingerprint(digest=bytes(32), fields={"device": "a"})):
        await opened(journal).meet(each)
    assert len(journal.kept) == 1
    journal.kept["fingerprint/00"] = b"\xff"
    journal.kept["fingerprint/01"] = types_pb2.Fingerprint(digest=other.digest, fields={"device": "c"}).SerializeToString()

    fingerprints = opened(journal)
    await fingerprints.load()

    assert set(fingerprints.known) == {sound.digest}
