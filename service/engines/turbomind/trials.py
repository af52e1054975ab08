"""One product of the model, tried on this GPU: which candidates run it, whether they round alike, and how long they take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from service.engines.turbomind.host import module
from service.engines.turbomind.overrides import Matrices, Overrides
from service.engines.turbomind.plans import PERIOD, Candidate, Shape, Trial

MEMORY_SHARE = 0.4
"""Of the GPU's free memory, for the matrices."""
WEIGHTS_BYTES = 128 << 20
"""Copies of the weights come to this, so that they are read from memory and not from a cache, as a model's are."""
COPIES_MAX = 16
HOPELESS = 1.5
"""Times as long as the best so far: not looked at again."""
LOOK_SECONDS = 0.0004
"""Of one measurement, if that is more than two products."""
_TORCH_TYPES = {0: "float32", 2: "float16", 14: "bfloat16"}
"""By cudaDataType_t."""
_BITS = {2: "int16", 4: "int32"}
_CHUNK = 256 * PERIOD


def can_try(shape: Shape) -> bool:
    """Whether the matrices can be made up."""
    return not shape.transb and {shape.a_type, shape.b_type, shape.c_type} <= _TORCH_TYPES.keys()


class Trials:
    """Random weights, and PERIOD random rows, repeated. Raises torch's OutOfMemoryError."""

    def __init__(self, overrides: Overrides, shape: Shape, rows: int) -> None:
        self._overrides, self._shape = overrides, shape
        self._torch = torch = module("torch")
        a_type, b_type, c_type = (getattr(torch, _TORCH_TYPES[each]) for each in (shape.a_type, shape.b_type, shape.c_type))
        weights = (shape.m if shape.transa else shape.k) * shape.lda
        copies = min(COPIES_MAX, max(1, WEIGHTS_BYTES // (weights * a_type.itemsize)))
        free, _ = torch.cuda.mem_get_info()
        room = free * MEMORY_SHARE - weights * copies * a_type.itemsize
        self.rows = min(rows, max(1, int(room // (4 * (shape.ldb + 2 * shape.ldc)))))
        random = torch.Generator("cuda").manual_seed(shape.m * shape.k)
        self._a = torch.randn(weights, generator=random, device="cuda", dtype=a_type).mul_(shape.k**-0.5).repeat(copies)
        period = torch.randn(PERIOD, shape.ldb, generator=random, device="cuda", dtype=b_type)
        self._b = period.repeat(-(-self.rows // PERIOD), 1)
        self._c = torch.empty(self.rows, shape.ldc, dtype=c_type, device="cuda")
        self._matrices = Matrices(
            self._a.data_ptr(), self._b.data_ptr(), self._c.data_ptr(), torch.cuda.current_stream().cuda_stream,
            weights * a_type.itemsize, copies,
        )  # fmt: skip

    def offered(self, n: int) -> Iterator[Trial]:
        """What cublasLt offers for n tokens."""
        for rank, candidate in enumerate(self._overrides.offers(self._shape, n)):
            if (trial := self._tried(n, rank, candidate)) is not None:
                yield trial

    def race(self, n: int, others: Iterable[Candidate]) -> Iterator[Trial]:
        """What cublasLt offers for n tokens and these others, with the time that one product takes."""
        offers = {candidate.config: candidate for candidate in self._overrides.offers(self._shape, n)}
        best = float("inf")
        for rank, candidate in enumerate((offers | {other.config: other for other in others}).values()):
            if (trial := self._tried(n, rank, candidate)) is None:
                continue
            seconds = self._seconds(n, candidate, 2)
            if seconds < HOPELESS * best:
                times = min(32, max(2, int(LOOK_SECONDS / seconds)))
                seconds = min(self._seconds(n, candidate, times) for _ in range(3))
            best = min(best, seconds)
            yield replace(trial, seconds=seconds, offered=candidate.config in offers)

    def _tried(self, n: int, rank: int, candidate: Candidate) -> Trial | None:
        self._c[:n].fill_(float("nan"))  # what an earlier trial left would look right
        if not self._overrides.attempt(self._shape, n, candidate, self._matrices):
            return None
        return Trial(n, rank, candidate, *_compared(self._c[:n, : self._shape.m], self._torch))

    def _seconds(self, n: int, candidate: Candidate, times: int) -> float:
        """Of one product, by the GPU's clock."""
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._overrides.attempt(self._shape, n, candidate, self._matrices, times)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / times


def _compared(c: Any, torch: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether the rows repeat with their period, bit by bit, and a digest of each of the first."""
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
