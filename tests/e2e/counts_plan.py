"""A random plan of an engine's divergences, and what every kind of comparison must find."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

N, TOKENS, SENT = 10, 16, 4
"""Items per range; tokens of an answer; tokens that a lost attempt had sent."""
FREE_TOKENS = 128
"""Tokens of an unseeded answer: enough choice for a collision check."""
REPEATED, TWINS, RECOVERED, UNSEEDED = (range(first, first + N) for first in range(1, 4 * N, N))
"""Ranges of sequences: verified and replayed; their twins; lost and recovered; equal but for their seeds."""
SHORT = 2
"""Tokens of a canary that ends before it could diverge."""


@dataclass(frozen=True)
class Expected:
    """The expected comparisons of one kind. Items are sequences or canary numbers."""

    kind: str
    equal: Mapping[int, int]
    """Compared tokens of the items whose runs are equal."""
    parted: Mapping[int, int]
    """First differing token of the items whose runs are not."""

    @classmethod
    def of(cls, kind: str, first: Mapping[int, int], second: Mapping[int, int], tokens: Mapping[int, int]) -> Expected:
        """`first`, `second`: from which token on a run has other tokens; `tokens`: the length of each item."""
        never = max(tokens.values())
        parted = {
            item: min(first.get(item, never), second.get(item, never)) for item in tokens if first.get(item) != second.get(item)
        }
        return cls(kind, {item: count for item, count in tokens.items() if item not in parted}, parted)

    @property
    def n(self) -> int:
        return len(self.equal) + len(self.parted)

    @property
    def k(self) -> int:
        return len(self.parted)

    @property
    def compared_tokens(self) -> int:
        return sum(self.equal.values()) + sum(self.parted.values())


@dataclass
class Plan:
    """From which token on each run diverges, and what follows from that."""

    seed: int
    kinds: list[Expected] = field(init=False, repr=False)
    collisions: set[int] = field(init=False, repr=False)
    _made: dict[str, dict[int, int]] = field(init=False, repr=False)
    """By kind of comparison and item: from which token on its second run diverges."""
    _seedless: set[int] = field(init=False, repr=False)
    """Sequences whose runs ignore their seed."""

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)

        def some(band: Iterable[int], *at: int) -> dict[int, int]:
            items = sorted(band)
            return {item: rng.choice(at) for item in rng.sample(items, rng.randint(1, len(items) - 1))}

        every = range(1, UNSEEDED.stop)
        made = self._made = {
            "TWIN": some(TWINS, 3, 9),
            "RECOVERY": some(RECOVERED, 2),
            "VERIFY": some(REPEATED, 7),
            "REPLAY": some(REPEATED, 5, 12),
            "AUDIT": some(every, 2, 3, 8),
            "CANARY": some(range(N), SHORT + 1),
        }
        primary = made["TWIN"] | made["RECOVERY"]
        repeated, all_items = dict.fromkeys(REPEATED, TOKENS), dict.fromkeys(every, TOKENS)
        all_items |= dict.fromkeys(UNSEEDED, FREE_TOKENS)
        self.kinds = [
            Expected.of("twin", {}, made["TWIN"], dict.fromkeys(TWINS, TOKENS)),
            Expected.of("recovery", {}, made["RECOVERY"], dict.fromkeys(RECOVERED, SENT)),
            Expected.of("verify", {}, made["VERIFY"], repeated),
            Expected.of("replay", {}, made["REPLAY"], repeated),
            Expected.of("audit", primary, made["AUDIT"], all_items),
            Expected.of("canary", {}, made["CANARY"], {item: self._canary_tokens(item) for item in range(N)}),
        ]
        self._seedless = set(some(UNSEEDED, 0)) | {rng.choice(UNSEEDED)}
        self.collisions = self._seedless - {min(self._seedless)}

    def kind(self, name: str) -> Expected:
        return next(expected for expected in self.kinds if expected.kind == name)

    def script(self, *, canaries_diverge: bool = False) -> str:
        """For the service, and for the one after the loss, with diverging canaries."""
        first, retried = {"purposes": ["PRIMARY"], "attempts": [1]}, {"purposes": ["PRIMARY"], "attempts": [2]}
        runs: dict[str, dict[str, Any]] = {"TWIN": first, "RECOVERY": retried}
        runs |= {purpose: {"purposes": [purpose]} for purpose in ("VERIFY", "REPLAY", "AUDIT")}
        rules: list[dict[str, Any]] = [
            {"do": "diverge", "at": at, "sequences": [item], **which}
            for name, which in runs.items()
            for item, at in self._made[name].items()
        ]
        rules += [
            {"do": "hang", "at": SENT, "sequences": list(RECOVERED), **first},
            {"do": "forget_seed", "sequences": sorted(self._seedless)},
        ]
        if canaries_diverge:
            rules.append({"do": "diverge", "at": SHORT + 1, "purposes": ["CANARY"]})
        return json.dumps({"rules": rules})

    def canaries(self) -> str:
        """The canaries' file; their names are their numbers."""
        return "".join(
            f'[[canary]]\nname = "{item}"\ntext = "canary {item}"\n[canary.parameters]\n'
            f"seed = 1\nmax_new_tokens = {self._canary_tokens(item)}\nignore_eos = true\n"
            for item in range(N)
        )

    def _canary_tokens(self, item: int) -> int:
        """A script can tell canaries apart only by their length: they have the same purpose and no sequence."""
        return TOKENS if item in self._made["CANARY"] else SHORT
