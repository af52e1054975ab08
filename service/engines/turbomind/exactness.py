"""Whether this configuration can be exact: it puts in place what that takes, and says what is missing."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ostinato.v1 import types_pb2

from service.engines.turbomind import TurbomindOptions, host, kernels, probe
from service.engines.turbomind.kernels import Manifest, Permit
from service.engines.turbomind.model import Model
from service.engines.turbomind.native import Native
from service.engines.turbomind.overrides import LOOKUP, PIECE, REQUIRED, Mode, NoOverrides, Overrides, Shape, build
from service.engines.turbomind.overrides import digest as overrides_digest
from service.engines.turbomind.probe import KernelProof

HEADS = ("product", "type", "algorithms", "tokens")
TYPES = {0: "fp32", 2: "fp16", 14: "bf16"}
"""By cudaDataType_t."""
NO_SPLITS = "max_splits=1"
"""TurboMind's setting: its own kernels, which serve quantised weights and experts, do not split K."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exactness:
    """One per process, since a loaded library stays. To be called in order: load, prepare, prove."""

    options: TurbomindOptions
    model: Model
    overrides: Overrides | None = None
    manifest: Manifest | None = None
    cublas: str = "unknown"
    why_not: str = ""
    """The first thing that is missing; empty if nothing is."""
    origin: str = ""
    """Whether the manifest was kept, or why it was made."""
    seconds: float = 0.0
    """Duration of the proof."""
    _kept: Manifest | None = None
    _environment: Mapping[str, str] | None = None

    @property
    def folder(self) -> Path:
        return self.options.state_dir / "turbomind"

    @property
    def path(self) -> Path:
        """Of the manifest, after `prepare`."""
        return self._path("plans", "json")

    def load(self) -> None:
        """Loads the overrides. Before torch is imported."""
        if not self.options.exact:
            self.why_not = "exact mode is off"
            return
        try:
            self.overrides = Overrides(build(self.folder))
        except NoOverrides as error:
            self._miss(f"the overrides are missing: {error}")
            return
        self.overrides.configure(host.turbomind_library(), self.options.splits)
        self.overrides.mode(Mode.LEARN)

    def prepare(self, gpu: host.Gpu, version: str) -> None:
        """After TurboMind's library is loaded, before the model."""
        if self.overrides is None:
            self.cublas = host.mapped("libcublas")
            return
        try:
            number, library = self.overrides.open()
        except NoOverrides as error:
            self._miss(str(error))
            self.overrides = None
            return
        self.cublas = f"{Path(library).name} {number}"
        options = self.options
        kernels.set_workspace(self.overrides, options.tp)
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # a switch that adds would round in its own way
        self._environment = {
            "lmdeploy": version, "cublas": self.cublas, "gpu": gpu.name, "capability": gpu.capability, "driver": gpu.driver,
            "config": self.model.config_digest, "dtype": options.dtype, "model_format": options.model_format or "",
            "tp": str(options.tp), "runs": str(options.runs), "prefill_tokens": str(options.prefill_tokens),
            "overrides": overrides_digest(), "tuned_layers": str(self.model.tuned_layers),
        }  # fmt: skip
        self._kept, self.origin = kernels.load(self.path, self._environment)
        if LOOKUP in self.overrides.omitted:
            return
        os.environ["TM_GEMM_TUNE"] = NO_SPLITS
        if not self._own_kernels:
            return
        table = self._table
        if self._kept is not None and self._kept.table == _sha256(table):
            os.environ["TM_GEMM_IMPORT"] = str(table)  # or timing would choose again
        else:
            if self._kept is not None:
                self._kept, self.origin = None, f"{table.name} is not the one that it was made with"
            table.unlink(missing_ok=True)
            os.environ["TM_GEMM_EXPORT"] = str(table)

    def prove(self, native: Native) -> None:
        """Measures, or uses the kept manifest. After the model's first run, before any that is served. Raises EngineUnusable if
        TurboMind does not answer."""
        began = time.monotonic()
        self._prove(native)
        self.seconds = round(time.monotonic() - began, 3)
        if self.manifest is not None:
            _log.info(
                "kernel plans",
                extra={"digest": self.manifest.digest, "path": self.path, "origin": self.origin, "seconds": self.seconds},
            )

    def _prove(self, native: Native) -> None:
        overrides, environment = self.overrides, self._environment
        if overrides is None or environment is None:
            return
        calls = overrides.counters.calls
        try:
            if unreached := [name for name in REQUIRED if not calls[name]]:
                raise NoOverrides(f"TurboMind does not reach the override {unreached[0]}")
            if why := probe.prove_pieces(native, overrides, self.options):
                self._miss(why)
            if PIECE in overrides.omitted:
                self._miss("prompts are cut where others leave off")
            shapes = overrides.shapes()
            kept = self._kept if self._kept is not None and self._kept.permits.keys() >= shapes.keys() else None
            permits = kept.permits if kept is not None else self._measured(overrides, shapes)
            if bare := shapes.keys() - permits.keys():
                self._miss(f"nothing rounds alike in the product {min(bare).m}x{min(bare).k}")
            if uncovered := kernels.install(overrides, permits, self.options.runs):
                self._miss(uncovered)
            overrides.mode(Mode.SERVE)
            own = self._own(native, overrides, kept)
            self.manifest = kept
            if kept is None:
                table = _sha256(self._table) if self._own_kernels else ""
                self.manifest = Manifest(environment, permits, table, own.permitted, own.excluded)
                kernels.save(self.path, self.manifest)
        except (NoOverrides, OSError, ValueError) as error:
            self._miss(str(error))
            overrides.mode(Mode.SERVE)

    def _measured(self, overrides: Overrides, shapes: Mapping[Shape, int]) -> Mapping[Shape, Permit]:
        """Raises NoOverrides."""
        options = self.options
        most = options.prefill_tokens + options.runs if "TM_GEMM_IMPORT" in os.environ else options.runs
        if self._kept is not None:
            self.origin = "the kept one lacks a product"
        self.origin = f"made now: {self.origin}"
        return kernels.measure(overrides, {shape: max(most, rows) for shape, rows in shapes.items()})

    def _own(self, native: Native, overrides: Overrides, kept: Manifest | None) -> KernelProof:
        """Of TurboMind's own kernels, those that serve from now on, and the others. Raises EngineUnusable, NoOverrides, OSError
        and ValueError."""
        if not self._own_kernels:
            return KernelProof({}, (), ())
        if LOOKUP in overrides.omitted:
            self._miss("TurboMind's own kernels are not pinned: it picks them by timing at every start")
            return KernelProof({}, (), ())
        if kept is None:
            proof = self._proved(native, overrides)
        else:
            proof = KernelProof(kept.own, kept.excluded, ())
            overrides.kernels({product.numbers: rows for product, rows in kept.own.items()})
            before = overrides.counters.pinned
            probe.first_run(native, self.options.context_tokens)
            if kept.own and overrides.counters.pinned == before:
                self._miss(f"TurboMind does not serve with the kernels of {self._table.name}")
        if not proof.permitted:
            others = "; ".join(proof.excluded)[:300]
            why = f"none rounds alike whatever else runs: {others}" if others else "its table has none"
            self._miss(f"of TurboMind's own kernels {why}")
        return proof

    def _proved(self, native: Native, overrides: Overrides) -> KernelProof:
        """Raises as `_own` does."""
        try:
            tuned = kernels.own_kernels(self._table.read_bytes())
        except ValueError as error:
            raise ValueError(f"TurboMind's table of kernels {error}") from None
        proof = probe.prove_kernels(native, overrides, tuned)
        _log.info(
            "own kernels",
            extra={
                "products": [f"{product.name}: {list(rows)}" for product, rows in proof.permitted.items()],
                "excluded": proof.excluded, "classes": proof.classes, "tuned": [list(rows) for rows in tuned.values()],
            },
        )  # fmt: skip
        return proof

    @property
    def ceiling(self) -> tuple[types_pb2.Grade.ValueType, str]:
        """The best grade that the self-test may give, and why."""
        if why := _sums_vary(self.options):
            return types_pb2.GRADE_BEST_EFFORT, why
        if self.options.runs == 1:
            return types_pb2.GRADE_SERIAL, "there is one slot: runs are computed one at a time"
        if self.why_not:
            return types_pb2.GRADE_BEST_EFFORT, self.why_not
        return types_pb2.GRADE_EXACT, "attention splits, sampling kernel and product algorithms do not depend on the batch"

    @property
    def fields(self) -> Mapping[str, str]:
        """Fields of the fingerprint."""
        loaded = self.overrides
        omitted = ",".join(sorted(loaded.omitted)) if loaded is not None else ""
        own = "chosen by timing at start " + secrets.token_hex(8) if self._own_kernels else "its own"
        return {
            "overrides": "none" if loaded is None else overrides_digest() + (f" without {omitted}" if omitted else ""),
            "kernel_plan": own if self.manifest is None else self.manifest.digest,
            "attention_splits": "its own" if loaded is None else str(self.options.splits),
            "cublas": self.cublas,
        }

    @property
    def _own_kernels(self) -> bool:
        return self.model.own_kernels or self.options.model_format not in (None, "hf")

    @property
    def _table(self) -> Path:
        """Where TurboMind writes down which kernels it found fastest."""
        return self._path("kernels", "bin")

    def _path(self, name: str, suffix: str) -> Path:
        lines = [f"{key}={value}\n" for key, value in sorted((self._environment or {}).items())]
        return (self.folder / f"{name}-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}.{suffix}").absolute()

    def table(self) -> str:
        """What was proved. Products are outputs x inputs. One without algorithms is served by what cuBLAS prefers."""
        manifest, lines = self.manifest, list[str]()
        if manifest is not None and self.overrides is not None:
            rows = [HEADS]
            for shape in sorted({*self.overrides.shapes(), *manifest.permits}):
                permit = manifest.permits.get(shape)
                served = (" ".join(map(str, permit.algorithms)), f"1 to {permit.rows}") if permit else ("none", "none")
                rows.append((f"{shape.m} x {shape.k}", TYPES.get(shape.a_type, str(shape.a_type)), *served))
            for product, tuned in sorted(manifest.own.items()):
                rows.append((product.name, "own", "TurboMind's", f"as for {', '.join(map(str, tuned))}"))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
            lines += [f"not used      {text}" for text in manifest.excluded]
            lines += ["", f"kernel plan  {manifest.digest}", f"kept at      {self.path}", f"origin       {self.origin}"]
        grade, why = self.ceiling
        lines.append(f"can earn     {types_pb2.Grade.Name(grade).removeprefix('GRADE_')}: {why}")
        if self.why_not:
            lines.append(f"not covered  {self.why_not}")
        return "\n".join(lines)

    def _miss(self, why: str) -> None:
        self.why_not = self.why_not or why
        _log.warning("not exact", extra={"why": why})


def _sums_vary(options: TurbomindOptions) -> str:
    """Why the sums of several GPUs depend on the batch; empty: they do not. NCCL adds two numbers, in any order, with one
    rounding for messages of every size."""
    if options.tp > 2:
        return f"more than two GPUs add in an order that depends on the batch: --tp is {options.tp}"
    if options.tp == 2 and options.communicator != "nccl":
        return f"two GPUs round otherwise for large batches with --communicator {options.communicator}: use nccl"
    return ""


def _sha256(path: Path) -> str:
    """Of a file; "" if there is none, or it cannot be read, which is logged."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        _log.warning("kernel table unreadable", extra={"path": path, "why": str(error)})
        return ""
