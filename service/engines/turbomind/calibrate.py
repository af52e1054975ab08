"""Proves on this very GPU which algorithms round alike, or takes a kept proof's word for it.

The products are the model's own: TurboMind has just been through all of them, once for each number of tokens it tunes for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from service.engines.turbomind.host import module
from service.engines.turbomind.overrides import NoOverrides, Overrides
from service.engines.turbomind.plans import (
    Choice,
    Manifest,
    Permit,
    Shape,
    Trial,
    between,
    choose,
    fastest,
    from_json,
    grid,
    timed,
)
from service.engines.turbomind.trials import Trials, can_try

WORKSPACE_BYTES = 64 << 20
FEW_FROM = 512
"""From so many tokens on, what wins here may win a little further on."""
_log = logging.getLogger(__name__)


def lend_workspace(overrides: Overrides, gpus: int) -> None:
    """On each GPU, before the first product is tried or served."""
    torch = module("torch")
    for gpu in range(gpus):
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{gpu}")
        overrides.lend(gpu, workspace, workspace.data_ptr(), WORKSPACE_BYTES)


def find(path: Path, environment: Mapping[str, str]) -> tuple[Manifest | None, str]:
    """The manifest kept at `path`, if it was made in this environment; else why there is none, with what sets the likest of
    those beside it apart."""
    try:
        manifest = from_json(path.read_text())
    except FileNotFoundError:
        return None, _likest(path, environment)
    except (OSError, ValueError) as error:
        _log.warning("kernel plans unreadable", extra={"path": path, "why": str(error)})
        return None, f"the kept one {error}"
    return (manifest, "kept") if manifest.fits(environment) else (None, _apart(manifest.environment, environment))


def _likest(path: Path, environment: Mapping[str, str]) -> str:
    found = []
    for other in path.parent.glob(f"plans-*{path.suffix}"):
        with suppress(OSError, ValueError):
            found.append(from_json(other.read_text()).environment)
    return min((_apart(theirs, environment) for theirs in found), key=lambda text: text.count(";"), default="none was kept")


def _apart(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """The fields in which two environments differ, in words."""
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    parts = [f"{name} was {theirs.get(name, 'not there')}, is {ours.get(name, 'not there')}" for name in names]
    return f"the kept one is of another environment: {'; '.join(parts)}"


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
            choice, permit, trials = _measured(Trials(overrides, shape, rows)) if can_try(shape) else (Choice((), ()), None, [])
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
                "permitted": choice.permitted, "missing": choice.missing, "seconds": round(time.monotonic() - began, 3),
            },
        )  # fmt: skip
    return permits


def _measured(product: Trials) -> tuple[Choice, Permit | None, list[Trial]]:
    """First what cublasLt offers for each number of tokens. Then each offer that may stay races against the others, also at
    numbers it was not offered for: cublasLt's favourite takes up to three times as long as the fastest. Last, what won, at all
    numbers in between, for which it is going to serve."""
    every = grid(product.rows)
    trials = [trial for n in every for trial in product.offered(n)]
    permitted = choose(trials).permitted
    pool = {trial.candidate.config: trial.candidate for trial in trials if trial.algorithm in permitted}
    for n in timed(product.rows):
        trials += product.race(n, pool.values())
    few = {winner for n, winner in fastest(trials, permitted).items() if winner is not None and n >= FEW_FROM}
    for n in between(product.rows):
        trials += product.race(n, few)
    winners = fastest(trials, permitted)
    for n in every:
        above = next((w for w in winners if w >= n), n)
        if n not in winners and (winner := winners.get(above)) is not None:
            trials += product.race(n, [winner])
    choice = choose(trials)
    if not choice.permitted:
        return choice, None, trials
    codes = tuple((n, "" if winner is None else winner.code.hex()) for n, winner in winners.items())
    kept = {winner.algorithm for winner in winners.values() if winner is not None} <= set(choice.permitted)
    return choice, Permit(choice.permitted, product.rows, codes if kept else ()), trials


def install(overrides: Overrides, manifest: Manifest, runs: int) -> str:
    """Serve with these permits from now on. What is not covered, in words, or an empty text."""
    for shape, permit in manifest.permits.items():
        overrides.permit(shape, permit.algorithms)
        for n, code in permit.fastest:
            overrides.prefer(shape, n, bytes.fromhex(code))
    for shape, permit in manifest.permits.items():
        wanted = sorted({*range(1, min(runs, permit.rows) + 1), *grid(permit.rows)})
        missing = [n for n in wanted if not overrides.covers(shape, n)]
        if missing:
            return f"no algorithm rounds alike for {missing[0]} tokens of the product {shape.m}x{shape.k}"
    return ""
