"""Which algorithms of cublasLt may serve: those that give a row the same bits for every number of rows.

A product is one weight, m outputs by k inputs, times n tokens; n changes at every step. For a grid of n, every
algorithm that cublasLt offers is tried with the same rows, repeated. Algorithms that agree on every row at every n form
a class. The class that can serve the most n is permitted; no other algorithm ever runs. Within the class the fastest
serves. What was measured is kept as a manifest, for the next start of the same configuration on the same machine.

The choice is pure (`choose`, `fastest`, `Manifest`); `Trials` and `measure` need the GPU. The products are the model's
own: TurboMind has just run all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from serving import files

from service.engines.turbomind.host import module
from service.engines.turbomind.overrides import (
    PERMITTED_MAX,
    PRODUCT_NUMBERS,
    Candidate,
    Matrices,
    NoOverrides,
    Overrides,
    Shape,
)

PERIOD = 4
"""Distinct rows of a trial; the others repeat them."""
ALL_BELOW = 9
FASTER = 0.97
"""Share of another's time below which a candidate counts as faster, and not as equal within noise."""
POINTS = 16
"""Numbers of tokens beyond 512 that are timed, about."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of one candidate with n tokens."""

    n: int
    rank: int
    """Its place in cublasLt's answer for this n; 0 is the one that cublasLt prefers."""
    candidate: Candidate
    alike: bool
    """Whether equal rows have equal results."""
    rows: tuple[str, ...]
    """A digest of each distinct row, min(n, PERIOD) of them."""
    seconds: float | None = None
    """Of one product; None: not measured."""
    offered: bool = True
    """Whether cublasLt offered it for this n. If not, its rank is behind those that it offered."""

    @property
    def algorithm(self) -> int:
        return self.candidate.algorithm


def grid(n_max: int) -> list[int]:
    """Numbers of tokens to try: all small ones, and those around powers of two and half-way between, where kernels change."""
    found = set(range(1, ALL_BELOW)) | {n_max}
    step = 8
    while step <= n_max:
        found |= {step - 1, step, step + 1, step + step // 2, step + step // 2 + 1}
        step *= 2
    return sorted(n for n in found if 1 <= n <= n_max)


def timed(n_max: int) -> list[int]:
    """Numbers of tokens to time all candidates at: powers of two, up to 512 also those half-way between, and the last."""
    powers = [1 << i for i in range(n_max.bit_length())]
    return sorted({*powers, *(n + n // 2 for n in powers if 16 <= n < 512 and n + n // 2 <= n_max), n_max})


def between(n_max: int) -> list[int]:
    """Numbers of tokens to time the fastest candidates at again, because how well a large product fills the GPU varies."""
    step = max(256, -(-n_max // POINTS))
    return [n for n in range(512 + step, n_max, step) if n not in timed(n_max)]


def fastest(trials: Iterable[Trial], permitted: Sequence[int]) -> dict[int, Candidate | None]:
    """For each number of tokens that was timed, by rising n, the permitted candidate that serves it. None: the one that
    cublasLt prefers, unless another is faster by more than noise."""
    best: dict[int, tuple[float, Candidate | None]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.n, trial.rank)):
        if trial.seconds is None or trial.algorithm not in permitted:
            continue
        if trial.n not in best:
            best[trial.n] = (trial.seconds, None if trial.offered else trial.candidate)
        elif trial.seconds < FASTER * best[trial.n][0]:
            best[trial.n] = (trial.seconds, trial.candidate)
    return {n: candidate for n, (_, candidate) in best.items()}


def choose(trials: Sequence[Trial]) -> tuple[int, ...]:
    """The algorithms of the class that serves the most numbers of tokens; of equals, of the one that cublasLt prefers."""
    classes: list[tuple[dict[int, str], set[int]]] = []
    for algorithm in dict.fromkeys(trial.algorithm for trial in sorted(trials, key=lambda trial: (trial.rank, -trial.n))):
        digests = _row_digests([trial for trial in trials if trial.algorithm == algorithm])
        if digests is None:
            continue
        for known, members in classes:
            if all(known.get(row, digest) == digest for row, digest in digests.items()):
                known.update(digests)
                members.add(algorithm)
                break
        else:
            classes.append((dict(digests), {algorithm}))
    ranks = [(members, _ranks(members, trials)) for _, members in classes]
    best, _ = max(ranks, key=lambda each: (len(each[1]), -sum(each[1].values())), default=(set[int](), {}))
    return tuple(sorted(best))[:PERMITTED_MAX]


def _row_digests(trials: Iterable[Trial]) -> Mapping[int, str] | None:
    """The digests that one algorithm gives each row; None if a row has several."""
    digests: dict[int, str] = {}
    for trial in trials:
        if not trial.alike or any(digests.setdefault(row, digest) != digest for row, digest in enumerate(trial.rows)):
            return None
    return digests


def _ranks(members: set[int], trials: Iterable[Trial]) -> Mapping[int, int]:
    """By number of tokens that one of these algorithms serves, the best rank among them."""
    best: dict[int, int] = {}
    for trial in trials:
        if trial.algorithm in members:
            best[trial.n] = min(trial.rank, best.get(trial.n, trial.rank))
    return best


TABLE_MAGIC = b"TMGEMM2\0"
TABLE_VERSION, RECORD_BYTES, HEADER_BYTES = 6, 304, 24
"""Of TurboMind's table of kernels: a header, and a record for each product and number of rows."""
BATCH_DIM, ROWS, COLUMNS, DEPTH, GROUPS = 20, 22, 23, 24, 25
"""Places of int32 in the description of a product; by the first, the rows are the second or the third."""
TILE, BACKEND = slice(50, 53), 72
"""Places of int32 in a record: the kernel's tile, in rows, outputs and inputs, and whose it is. 0: TurboMind's own."""


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """A kind of product as TurboMind's own kernels see it."""

    numbers: tuple[int, ...]
    """TurboMind's description of it, with 0 rows."""

    @property
    def name(self) -> str:
        outputs = self.numbers[ROWS if self.numbers[BATCH_DIM] else COLUMNS]
        groups = self.numbers[GROUPS]
        return f"{outputs} x {self.numbers[DEPTH]}" + (f" of {groups} experts" if groups > 1 else "")


def own_kernels(table: bytes) -> dict[Product, dict[int, str]]:
    """Of TurboMind's exported table, the products that its own kernels serve. By numbers of rows, rising, that each was tuned
    for, the tile of its kernel; other numbers of rows take the next one. Raises ValueError for a table of another version."""
    if len(table) < HEADER_BYTES:
        raise ValueError("is too short")
    magic, version, size, count = struct.unpack_from("<8sIIQ", table)
    if (magic, version, size) != (TABLE_MAGIC, TABLE_VERSION, RECORD_BYTES) or len(table) != HEADER_BYTES + size * count:
        raise ValueError(f"is of version {version} with records of {size} bytes, not of version {TABLE_VERSION}")
    found: dict[Product, dict[int, str]] = {}
    for start in range(HEADER_BYTES, len(table), size):
        record = struct.unpack_from(f"<{size // 4}i", table, start)
        if record[BACKEND]:
            continue
        numbers = list(record[:PRODUCT_NUMBERS])
        place = COLUMNS if numbers[BATCH_DIM] else ROWS
        rows, numbers[place] = numbers[place], 0
        found.setdefault(Product(tuple(numbers)), {})[rows] = "x".join(map(str, record[TILE]))
    return {product: dict(sorted(found[product].items())) for product in sorted(found)}


def alike(digests: Sequence[str | None]) -> tuple[int, ...]:
    """Places of the digest that is there most often; of equals, that of the last place. None counts for nothing."""
    places: dict[str, list[int]] = {}
    for place, digest in enumerate(digests):
        if digest is not None:
            places.setdefault(digest, []).append(place)
    ranked = sorted(places.values(), key=lambda those: (len(those), those[-1]))
    return tuple(ranked[-1]) if ranked else ()


@dataclass(frozen=True, slots=True)
class Permit:
    """The algorithms that serve a shape."""

    algorithms: tuple[int, ...]
    rows: int
    """The most tokens that they were tried with."""
    fastest: tuple[tuple[int, str], ...] = ()
    """By rising number of tokens, the code in hexadecimal that serves up to so many. An empty code, and larger numbers, are
    served by the algorithm that cublasLt prefers."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was measured, kept for later starts."""

    environment: Mapping[str, str]
    """What the measurement depends on. A manifest of another environment is not used."""
    permits: Mapping[Shape, Permit]
    table: str = ""
    """SHA-256 of TurboMind's table of its own kernels, where they serve."""
    own: Mapping[Product, tuple[int, ...]] = field(default_factory=dict)
    """Of that table, the numbers of rows whose kernels round alike."""
    excluded: tuple[str, ...] = ()
    """The others, in words."""

    @property
    def digest(self) -> str:
        """Of the kernels: equal digests round alike."""
        own = sorted([product.numbers, rows] for product, rows in self.own.items())
        body = json.dumps(
            [sorted([astuple(shape), permit.algorithms] for shape, permit in self.permits.items()), self.table, own]
        )
        return hashlib.sha256(body.encode()).hexdigest()

    def to_json(self) -> str:
        permits = [{"shape": asdict(shape), **asdict(self.permits[shape])} for shape in sorted(self.permits)]
        own = [{"product": product.numbers, "rows": self.own[product]} for product in sorted(self.own)]
        body = {
            "environment": dict(self.environment), "permits": permits, "table": self.table, "own": own,
            "excluded": list(self.excluded), "digest": self.digest,
        }  # fmt: skip
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n"


def from_json(text: str) -> Manifest:
    """Raises ValueError if the text is no manifest, or was changed."""
    try:
        body: Any = json.loads(text)
        checksum = body.pop("checksum")
        permits = {msgspec.convert(each["shape"], Shape): msgspec.convert(each, Permit) for each in body["permits"]}
        own = {Product(tuple(each["product"])): tuple(each["rows"]) for each in body["own"]}
        manifest = Manifest(body["environment"], permits, body["table"], own, tuple(body["excluded"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"lacks something: {error}") from error
    if checksum != _checksum(body):
        raise ValueError("does not have the checksum that is written in it")
    return manifest


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


MEMORY_SHARE = 0.4
"""Of the GPU's free memory, for the matrices."""
WEIGHTS_BYTES = 128 << 20
"""Size of all copies of the weights, so that they are read from memory and not from a cache."""
COPIES_MAX = 16
SLOW = 1.5
"""A candidate that takes so many times as long as the best one is measured once."""
MEASURE_SECONDS = 0.0004
"""Of one measurement, unless two products take longer."""
_TORCH_TYPES = {0: "float32", 2: "float16", 14: "bfloat16"}
"""By cudaDataType_t."""
_BITS = {2: "int16", 4: "int32"}
_CHUNK = 256 * PERIOD


class Trials:
    """One product on this GPU, with random weights and PERIOD random rows, repeated. Raises torch's OutOfMemoryError."""

    def __init__(self, overrides: Overrides, shape: Shape, rows: int) -> None:
        self._overrides, self.shape = overrides, shape
        self._torch = torch = module("torch")
        a_type, b_type, c_type = (getattr(torch, _TORCH_TYPES[each]) for each in (shape.a_type, shape.b_type, shape.c_type))
        weights = (shape.m if shape.transa else shape.k) * shape.lda
        copies = min(COPIES_MAX, max(1, WEIGHTS_BYTES // (weights * a_type.itemsize)))
        free, _ = torch.cuda.mem_get_info()
        room = free * MEMORY_SHARE - weights * copies * a_type.itemsize
        self.rows = shape.computed(min(rows, max(1, int(room // (4 * (shape.ldb + 2 * shape.ldc))))))
        random = torch.Generator("cuda").manual_seed(shape.m * shape.k)
        self._a = torch.randn(weights, generator=random, device="cuda", dtype=a_type).mul_(shape.k**-0.5).repeat(copies)
        period = torch.randn(PERIOD, shape.ldb, generator=random, device="cuda", dtype=b_type)
        self._b = period.repeat(-(-self.rows // PERIOD), 1)
        self._c = torch.empty(self.rows, shape.ldc, dtype=c_type, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        bc = self._b.data_ptr(), self._c.data_ptr()
        self._matrices = Matrices(self._a.data_ptr(), weights * a_type.itemsize, copies, *bc, stream)

    def offered(self, n: int) -> Iterator[Trial]:
        """The candidates that cublasLt offers for n tokens."""
        for rank, candidate in enumerate(self._overrides.offers(self.shape, n)):
            if (trial := self._tried(n, rank, candidate)) is not None:
                yield trial

    def timed(self, n: int, others: Iterable[Candidate]) -> Iterator[Trial]:
        """The candidates that cublasLt offers for n tokens, and these others, with their times."""
        offers = {candidate.config: candidate for candidate in self._overrides.offers(self.shape, n)}
        best = float("inf")
        for rank, candidate in enumerate((offers | {other.config: other for other in others}).values()):
            if (trial := self._tried(n, rank, candidate)) is None:
                continue
            seconds = self._seconds(n, candidate, 2)
            if seconds < SLOW * best:
                times = min(32, max(2, int(MEASURE_SECONDS / seconds)))
                seconds = min(self._seconds(n, candidate, times) for _ in range(3))
            best = min(best, seconds)
            yield replace(trial, seconds=seconds, offered=candidate.config in offers)

    def _tried(self, n: int, rank: int, candidate: Candidate) -> Trial | None:
        self._c[:n].fill_(float("nan"))  # or the results of an earlier trial would be taken for this one's
        if not self._overrides.attempt(self.shape, n, candidate, self._matrices):
            return None
        return Trial(n, rank, candidate, *_compared(self._c[:n, : self.shape.m], self._torch))

    def _seconds(self, n: int, candidate: Candidate, times: int) -> float:
        """Of one product, by the GPU's clock."""
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._overrides.attempt(self.shape, n, candidate, self._matrices, times)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / times


def _compared(c: Any, torch: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether the bits of the rows repeat with their period, and a digest of each of the first rows."""
    bits = c.view(getattr(torch, _BITS[c.element_size()]))
    first = bits[:PERIOD]
    alike = torch.ones((), dtype=torch.bool, device=c.device)
    if len(bits) > PERIOD:
        model = first.repeat(_CHUNK // PERIOD, 1)
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK]
            alike &= (part == model[: len(part)]).all()
    digests = tuple(hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in first.contiguous().cpu().numpy())
    return bool(alike), digests


WORKSPACE_BYTES = 64 << 20
FEW_FROM = 512
"""The fastest candidates for at least so many tokens are timed again between."""
_log = logging.getLogger(__name__)


def set_workspace(overrides: Overrides, gpus: int) -> None:
    """Gives the overrides memory on each GPU. To be called before a product is tried or served."""
    torch = module("torch")
    for gpu in range(gpus):
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{gpu}")
        overrides.set_workspace(gpu, workspace, workspace.data_ptr(), WORKSPACE_BYTES)


def load(path: Path, environment: Mapping[str, str]) -> tuple[Manifest | None, str]:
    """The manifest at `path` and "kept", or None and why not: it is damaged, or the most similar one beside it is of another
    environment."""
    try:
        manifest = from_json(files.read(path).decode())
    except FileNotFoundError:
        return None, _most_similar(path, environment)
    except (OSError, ValueError) as error:
        _log.warning("kernel plans unreadable", extra={"path": path, "why": str(error)})
        return None, f"the kept one {error}"
    return (manifest, "kept") if manifest.environment == environment else (None, _difference(manifest.environment, environment))


def _most_similar(path: Path, environment: Mapping[str, str]) -> str:
    found = []
    for other in path.parent.glob(f"plans-*{path.suffix}"):
        with suppress(OSError, ValueError):
            found.append(from_json(other.read_text()).environment)
    return min(
        (_difference(theirs, environment) for theirs in found), key=lambda text: text.count(";"), default="none was kept"
    )


def _difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """The fields in which two environments differ, in words."""
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    parts = [f"{name} was {theirs.get(name, 'not there')}, is {ours.get(name, 'not there')}" for name in names]
    return f"the kept one is of another environment: {'; '.join(parts)}"


def save(path: Path, manifest: Manifest) -> None:
    """If it cannot be written, the next start measures again."""
    try:
        files.replace(path, manifest.to_json(), parents=True)
    except OSError as error:
        _log.warning("kernel plans not kept", extra={"path": path, "why": str(error)})


def measure(overrides: Overrides, shapes: Mapping[Shape, int]) -> dict[Shape, Permit]:
    """The permitted algorithms of each shape, tried with up to `shapes[shape]` tokens. Takes seconds; the GPU must be idle. A
    shape without one is left out. Raises NoOverrides if there is no memory for the trials."""
    torch = module("torch")
    permits: dict[Shape, Permit] = {}
    for shape, rows in sorted(shapes.items()):
        began = time.monotonic()
        matrices_can_be_made = not shape.transb and {shape.a_type, shape.b_type, shape.c_type} <= _TORCH_TYPES.keys()
        try:
            permit, trials = _measured(Trials(overrides, shape, rows)) if matrices_can_be_made else (None, [])
        except torch.cuda.OutOfMemoryError as error:
            raise NoOverrides("there is not enough GPU memory left to try the products: lower --cache-fraction") from error
        torch.cuda.empty_cache()
        if permit is not None:
            permits[shape] = permit
        _log.info(
            "product measured",
            extra={
                "m": shape.m, "k": shape.k, "rows": rows, "tried": sorted({trial.algorithm for trial in trials}),
                "configurations": len({trial.candidate.config for trial in trials}), "trials": len(trials),
                "permitted": permit.algorithms if permit else (), "seconds": round(time.monotonic() - began, 3),
            },
        )  # fmt: skip
    return permits


def _measured(product: Trials) -> tuple[Permit | None, list[Trial]]:
    """Tries what cublasLt offers for each number of tokens. Then times all permitted candidates, also at numbers for which they
    were not offered, because the one that cublasLt prefers takes up to three times as long as the fastest. At last tries the
    fastest ones at all numbers that they will serve."""
    every = _computed(product.shape, grid(product.rows))
    trials = [trial for n in every for trial in product.offered(n)]
    permitted = choose(trials)
    pool = {trial.candidate.config: trial.candidate for trial in trials if trial.algorithm in permitted}
    for n in _computed(product.shape, timed(product.rows)):
        trials += product.timed(n, pool.values())
    few = {winner for n, winner in fastest(trials, permitted).items() if winner is not None and n >= FEW_FROM}
    for n in _computed(product.shape, between(product.rows)):
        trials += product.timed(n, few)
    winners = fastest(trials, permitted)
    for n in every:
        above = next((w for w in winners if w >= n), n)
        if n not in winners and (winner := winners.get(above)) is not None:
            trials += product.timed(n, [winner])
    if not (serving := choose(trials)):
        return None, trials
    codes = tuple((n, "" if winner is None else winner.code.hex()) for n, winner in winners.items())
    kept = {winner.algorithm for winner in winners.values() if winner is not None} <= set(serving)
    return Permit(serving, product.rows, codes if kept else ()), trials


def _computed(shape: Shape, numbers: Iterable[int]) -> list[int]:
    return sorted({shape.computed(n) for n in numbers})


def install(overrides: Overrides, permits: Mapping[Shape, Permit], runs: int) -> str:
    """Serves with these permits from now on. Returns what they do not cover, or an empty text."""
    for shape, permit in permits.items():
        overrides.permit(shape, permit.algorithms)
        for n, code in permit.fastest:
            overrides.prefer(shape, n, bytes.fromhex(code))
    for shape, permit in permits.items():
        wanted = sorted({*range(1, min(runs, permit.rows) + 1), *grid(permit.rows)})
        missing = [n for n in wanted if not overrides.covers(shape, n)]
        if missing:
            return f"no algorithm rounds alike for {missing[0]} tokens of the product {shape.m}x{shape.k}"
    return ""
