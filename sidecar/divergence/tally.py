"""All strata and what is counted beside them: a fold over events. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sidecar.divergence.stratum import Forgotten, Stratum
from sidecar.divergence.verdicts import Checked, Compared, Event, Key, NotCompared

STRATA_MAX = 256
"""One more, and the one that was counted in longest ago is forgotten but for its sums."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Never changed, only replaced."""

    strata: tuple[Stratum, ...] = ()
    """In the order in which they were last counted in, so that the newest fingerprints are last."""
    forgotten: tuple[Forgotten, ...] = ()
    """The sums of strata that were dropped: counters add them, since they must never go down."""
    collision_checks: int = 0
    collisions: int = 0
    not_compared: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Second runs that brought no verdict, by kind and reason. Not in the journal: what a kill -9 finds unsaved is lost."""

    def after(self, event: Event) -> Tally:
        """With one event more."""
        match event:
            case Compared():
                return self._compared(event)
            case Checked(collides=collides):
                checks, found = self.collision_checks + 1, self.collisions + collides
                return replace(self, collision_checks=checks, collisions=found)
            case NotCompared(kind, reason):
                reasons = self.not_compared.get(kind, {})
                reasons = {**reasons, reason: reasons.get(reason, 0) + 1}
                return replace(self, not_compared={**self.not_compared, kind: reasons})

    def _compared(self, event: Compared) -> Tally:
        others = tuple(each for each in self.strata if each.key != event.key)
        stratum = self.stratum(event.key) or Stratum(event.key, event.at, event.at)
        strata = (*others, stratum.after(event))
        forgotten = self.forgotten
        for dropped in strata[:-STRATA_MAX]:
            forgotten = _forget(forgotten, dropped)
        return replace(self, strata=strata[-STRATA_MAX:], forgotten=forgotten)

    @property
    def counted(self) -> tuple[Stratum | Forgotten, ...]:
        """All that was ever compared."""
        return (*self.strata, *self.forgotten)

    def stratum(self, key: Key) -> Stratum | None:
        """None: nothing was compared that is like this."""
        return next((each for each in self.strata if each.key == key), None)

    def newest(self) -> Mapping[tuple[str, str], Stratum]:
        """Of every kind and grade the stratum to look at: of those of its newest fingerprint, the one with most evidence."""
        fingerprints = {(each.key.kind, each.key.grade): each.key.fingerprint for each in self.strata}
        current = [each for each in self.strata if fingerprints[each.key.kind, each.key.grade] == each.key.fingerprint]
        return {(each.key.kind, each.key.grade): each for each in sorted(current, key=lambda each: each.evidence.log)}


def _forget(forgotten: tuple[Forgotten, ...], stratum: Stratum) -> tuple[Forgotten, ...]:
    key = replace(stratum.key, fingerprint="")
    others = tuple(each for each in forgotten if each.key != key)
    sums = next((each for each in forgotten if each.key == key), Forgotten(key))
    return (*others, sums.after(stratum))
