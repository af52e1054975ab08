"""Proves on this very GPU which algorithms round alike, or takes a kept proof's word for it.

The products are the model's own: TurboMind has just been through all of them, once for each number of tokens it tunes for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.engines.turbomind.host import module
from service.engines.turbomind.overrides import NoOverrides, Overrides
from service.engines.turbomind.plans import PERIOD, Manifest, Permit, Shape, Trial, choose, from_json, grid

WORKSPACE_BYTES = 64 << 20
MEMORY_SHARE = 0.4
"""Of the GPU's free memory, for the matrices of a trial."""
RANKS_MAX = 32
_TORCH_TYPES = {0: "float32", 2: "float16", 14: "bfloat16"}
"""By cudaDataType_t."""
_BITS = {2: "int16", 4: "int32"}
_CHUNK = 256 * PERIOD
_log = logging.getLogger(__name__)


def lend_workspace(overrides: Overrides) -> None:
    """Before the first product is tried or served."""
    torch = module("torch")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    overrides.lend(workspace, workspace.data_ptr(), WORKSPACE_BYTES)


def find(path: Path, environment: Mapping[str, str]) -> Manifest | None:
    """The manifest kept at `path`, if it was made in this environment."""
    try:
        manifest = from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("kernel plans unreadable", extra={"path": path, "why": str(error)})
        return None
    return manifest if manifest.fits(environment) else None


def keep(path: Path, manifest: Manifest) -> None:
    """That it cannot be written is only worth a warning: the next start measures again."""
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(manifest.to_json())
        draft.replace(path)
    except OSError as error:
        _log.warning("kernel plans not kept", extra={"path": path, "why": str(error)})


def measure(overrides: Overrides, shapes: Mapping[Shape, int]) -> dict[Shape, Permit]:
    """What may serve each shape, tried with up to so many tokens as its value says. Takes seconds; the GPU must be idle.

    A shape that nothing can serve is left out. Raises NoOverrides where there is no memory to try it.
    """
    torch = module("torch")
    permits: dict[Shape, Permit] = {}
    for shape, rows in sorted(shapes.items()):
        began = time.monotonic()
        try:
            trials = list(_trials(overrides, shape, rows, torch))
        except torch.cuda.OutOfMemoryError as error:
            raise NoOverrides("there is not enough GPU memory left to try the products: lower cache_fraction") from error
        torch.cuda.empty_cache()
        choice = choose(trials)
        if choice.permitted:
            permits[shape] = Permit(choice.permitted, max(trial.n for trial in trials))
        _log.info(
            "product measured",
            extra={
                "m": shape.m, "k": shape.k, "rows": rows, "tried": sorted({trial.algorithm for trial in trials}),
                "permitted": choice.permitted, "missing": choice.missing, "seconds": round(time.monotonic() - began, 3),
            },
        )  # fmt: skip
    return permits


def install(overrides: Overrides, manifest: Manifest, runs: int) -> str:
    """Serve with these permits from now on. What is not covered, in words, or an empty text."""
    for shape, permit in manifest.permits.items():
        overrides.permit(shape, permit.algorithms)
    for shape, permit in manifest.permits.items():
        wanted = sorted({*range(1, min(runs, permit.rows) + 1), *grid(permit.rows)})
        missing = [n for n in wanted if not overrides.covers(shape, n)]
        if missing:
            return f"no algorithm rounds alike for {missing[0]} tokens of the product {shape.m}x{shape.k}"
    return ""


def _trials(overrides: Overrides, shape: Shape, rows: int, torch: Any) -> Iterator[Trial]:
    """Every algorithm at every number of tokens, on random weights and PERIOD random rows, repeated."""
    if shape.transb or shape.a_type not in _TORCH_TYPES or shape.b_type not in _TORCH_TYPES or shape.c_type not in _TORCH_TYPES:
        return
    a_type, b_type, c_type = (getattr(torch, _TORCH_TYPES[each]) for each in (shape.a_type, shape.b_type, shape.c_type))
    rows = min(rows, _rows_max(shape, torch))
    random = torch.Generator("cuda").manual_seed(shape.m * shape.k)
    weights = (shape.m if shape.transa else shape.k) * shape.lda
    a = torch.randn(weights, generator=random, device="cuda", dtype=a_type).mul_(shape.k**-0.5)
    b = torch.randn(PERIOD, shape.ldb, generator=random, device="cuda", dtype=b_type).repeat(-(-rows // PERIOD), 1)
    c = torch.empty(rows, shape.ldc, dtype=c_type, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for n in grid(rows):
        for rank in range(RANKS_MAX):
            c[:n].fill_(float("nan"))  # what an earlier trial left would look right
            made = overrides.attempt(shape, n, rank, a.data_ptr(), b.data_ptr(), c.data_ptr(), stream)
            if made is None:
                break
            if made.runs:
                yield Trial(n, rank, made.algorithm, *_compared(c[:n, : shape.m], torch))


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


def _rows_max(shape: Shape, torch: Any) -> int:
    """So many rows of input and output as there is memory for."""
    free, _ = torch.cuda.mem_get_info()
    weights = 4 * (shape.m if shape.transa else shape.k) * shape.lda
    return max(1, int((free * MEMORY_SHARE - weights) // (4 * (shape.ldb + 2 * shape.ldc))))
