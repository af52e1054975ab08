"""What was proved, as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ostinato.v1 import types_pb2

from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.plans import Permit, Shape

HEADS = ("product", "type", "algorithms", "tokens")
TYPES = {0: "fp32", 2: "fp16", 14: "bf16"}
"""By cudaDataType_t."""


def table(exactness: Exactness) -> str:
    """Behind `prove`. Products are outputs x inputs; none of their algorithms: whatever cuBLAS likes would serve them."""
    manifest, overrides = exactness.manifest, exactness.overrides
    lines: list[str] = []
    if manifest is not None and overrides is not None:
        shapes = sorted({*overrides.shapes(), *manifest.permits})
        lines += _laid_out([HEADS, *(_row(shape, manifest.permits.get(shape)) for shape in shapes)])
        lines += ["", f"kernel plan  {manifest.digest}", f"kept at      {exactness.path}", f"origin       {exactness.origin}"]
    grade, why = exactness.ceiling
    lines.append(f"can earn     {types_pb2.Grade.Name(grade).removeprefix('GRADE_')}: {why}")
    if exactness.why_not:
        lines.append(f"not covered  {exactness.why_not}")
    return "\n".join(lines)


def _row(shape: Shape, permit: Permit | None) -> Sequence[str]:
    product, kind = f"{shape.m} x {shape.k}", TYPES.get(shape.a_type, str(shape.a_type))
    if permit is None:
        return product, kind, "none", "none"
    return product, kind, " ".join(map(str, permit.algorithms)), f"1 to {permit.rows}"


def _laid_out(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
