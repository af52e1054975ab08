"""Which algorithms of cublasLt may serve: those that give a row the same bits whatever stands beside it. Pure.

A product is one weight, m outputs by k inputs, times n tokens; n changes at every step. For a grid of n every algorithm that
cublasLt offers is tried with the same rows, repeated. Algorithms that agree on every row at every n are one class; the class
that can serve the most n is permitted, and no other ever runs. Within it, bits are no reason to choose: the fastest serves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

PERIOD = 4
"""Rows of a trial that differ; the others repeat them."""
ALL_BELOW = 9
PERMITTED_MAX = 16
FASTER = 0.97
"""Of another's time: what is told apart from chance."""
POINTS = 16
"""Of the numbers of tokens beyond 512, about so many are timed."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A kind of product, as TurboMind hands it to cublasGemmEx; the numbers are cuBLAS's own."""

    transa: int
    transb: int
    m: int
    k: int
    a_type: int
    b_type: int
    c_type: int
    lda: int
    ldb: int
    ldc: int
    compute: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm as cublasLt configures it for a product."""

    algorithm: int
    config: tuple[int, ...]
    """Tile, stages, cluster and the like: they change the speed."""
    code: bytes
    """What cublasLt of the same version takes for it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, tried with n tokens."""

    n: int
    rank: int
    """Its place in cublasLt's answer for this n; 0 is the fastest, as cublasLt believes."""
    candidate: Candidate
    alike: bool
    """Whether equal rows came out equal."""
    rows: tuple[str, ...]
    """A digest for each row that differs, the first min(n, PERIOD)."""
    seconds: float | None = None
    """That one product took; None: not measured."""
    offered: bool = True
    """Whether cublasLt offered it for this n; else its rank is behind all that are."""

    @property
    def algorithm(self) -> int:
        return self.candidate.algorithm


@dataclass(frozen=True, slots=True)
class Choice:
    """What may serve a shape."""

    permitted: tuple[int, ...]
    missing: tuple[int, ...]
    """Numbers of tokens, of those tried, that nothing permitted can serve."""


def grid(n_max: int) -> list[int]:
    """Numbers of tokens to try: all small ones, and those around the powers of two and between them, where kernels change."""
    found = set(range(1, ALL_BELOW)) | {n_max}
    step = 8
    while step <= n_max:
        found |= {step - 1, step, step + 1, step + step // 2, step + step // 2 + 1}
        step *= 2
    return sorted(n for n in found if 1 <= n <= n_max)


def timed(n_max: int) -> list[int]:
    """Numbers of tokens to look for the fastest at: powers of two, up to 512 one between them as well, and the end."""
    powers = [1 << i for i in range(n_max.bit_length())]
    return sorted({*powers, *(n + n // 2 for n in powers if 16 <= n < 512 and n + n // 2 <= n_max), n_max})


def between(n_max: int) -> list[int]:
    """Numbers of tokens to look at what was fastest around them: how well a large product fills the GPU changes quickly."""
    step = max(256, -(-n_max // POINTS))
    return [n for n in range(512 + step, n_max, step) if n not in timed(n_max)]


def fastest(trials: Iterable[Trial], permitted: Sequence[int]) -> dict[int, Candidate | None]:
    """For each number of tokens that was timed, the permitted candidate to serve it with, by rising n; None: the one that
    cublasLt likes best. Another must be faster by more than chance."""
    best: dict[int, tuple[float, Candidate | None]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.n, trial.rank)):
        if trial.seconds is None or trial.algorithm not in permitted:
            continue
        if trial.n not in best:
            best[trial.n] = (trial.seconds, None if trial.offered else trial.candidate)
        elif trial.seconds < FASTER * best[trial.n][0]:
            best[trial.n] = (trial.seconds, trial.candidate)
    return {n: candidate for n, (_, candidate) in best.items()}


def choose(trials: Sequence[Trial]) -> Choice:
    """The class that serves the most numbers of tokens; of equals, the one that cublasLt ranks higher."""
    classes: list[tuple[dict[int, str], set[int]]] = []
    for algorithm in dict.fromkeys(trial.algorithm for trial in sorted(trials, key=lambda trial: (trial.rank, -trial.n))):
        voice = _voice([trial for trial in trials if trial.algorithm == algorithm])
        if voice is None:
            continue
        for known, members in classes:
            if all(known.get(row, digest) == digest for row, digest in voice.items()):
                known.update(voice)
                members.add(algorithm)
                break
        else:
            classes.append((dict(voice), {algorithm}))
    wanted = {trial.n for trial in trials}
    if not classes:
        return Choice((), tuple(sorted(wanted)))
    served = [_served(members, trials) for _, members in classes]
    best = max(range(len(classes)), key=lambda i: (len(served[i]), -sum(served[i].values())))
    permitted = tuple(sorted(classes[best][1]))[:PERMITTED_MAX]
    return Choice(permitted, tuple(sorted(wanted - set(_served(set(permitted), trials)))))


def _voice(trials: Iterable[Trial]) -> Mapping[int, str] | None:
    """One algorithm's digest of each row; None if it has more than one."""
    voice: dict[int, str] = {}
    for trial in trials:
        if not trial.alike or any(voice.setdefault(row, digest) != digest for row, digest in enumerate(trial.rows)):
            return None
    return voice


def _served(members: set[int], trials: Iterable[Trial]) -> Mapping[int, int]:
    """By number of tokens, the best rank among these algorithms."""
    best: dict[int, int] = {}
    for trial in trials:
        if trial.algorithm in members:
            best[trial.n] = min(trial.rank, best.get(trial.n, trial.rank))
    return best


@dataclass(frozen=True, slots=True)
class Permit:
    """What serves a shape."""

    algorithms: tuple[int, ...]
    rows: int
    """Up to how many tokens it was tried."""
    fastest: tuple[tuple[int, str], ...] = ()
    """The codes, in hexadecimal, that serve up to so many tokens, by rising number. An empty one, and any other number, is left
    to cublasLt's own choice among the algorithms."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was measured, kept for the next start of the same thing on the same machine."""

    environment: Mapping[str, str]
    """Everything it was measured under; another value of anything makes it worthless."""
    permits: Mapping[Shape, Permit]
    table: str = ""
    """SHA-256 of TurboMind's own choice of kernels, where it has quantised ones."""

    def fits(self, environment: Mapping[str, str], shapes: Iterable[Shape] = ()) -> bool:
        """Whether it may be used here, and knows all that is needed."""
        return dict(self.environment) == dict(environment) and self.permits.keys() >= set(shapes)

    @property
    def digest(self) -> str:
        """Of the kernels alone: equal ones round alike."""
        body = json.dumps([sorted([astuple(shape), permit.algorithms] for shape, permit in self.permits.items()), self.table])
        return hashlib.sha256(body.encode()).hexdigest()

    def to_json(self) -> str:
        permits = [{"shape": asdict(shape), **asdict(self.permits[shape])} for shape in sorted(self.permits)]
        body = {"environment": dict(self.environment), "permits": permits, "table": self.table, "digest": self.digest}
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n"


def from_json(text: str) -> Manifest:
    """Raises ValueError for a text that is no manifest, or was changed."""
    try:
        body: Any = json.loads(text)
        checksum = body.pop("checksum")
        permits = {
            Shape(**each["shape"]): Permit(
                tuple(map(int, each["algorithms"])),
                int(each["rows"]),
                tuple((int(n), str(code)) for n, code in each["fastest"]),
            )
            for each in body["permits"]
        }
        manifest = Manifest(dict(body["environment"]), permits, str(body["table"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"lacks something: {error}") from error
    if checksum != _checksum(body):
        raise ValueError("does not have the checksum that is written in it")
    return manifest


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
