"""How a start comes to its grade: what is proved, kept, refused and missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from ostinato.v1 import types_pb2

from service.__main__ import calibrate as calibrate_command
from service.config import Settings
from service.engines.turbomind import TurbomindOptions, calibrate, host, loading, model
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.overrides import Counters, Mode, NoOverrides, Overrides
from service.engines.turbomind.plans import Manifest, Permit, Shape
from service.engines.turbomind.table import table
from tests.service.turbomind_kit import CONFIG, GPU, HEAD, LAYER, TAIL, folder, not_installed, without


class FakeOverrides:
    """As far as exactness asks."""

    def __init__(self, shapes: Mapping[Shape, int], calls: int = 1, uncovered_n: int = 0) -> None:
        self._shapes, self._uncovered_n = shapes, uncovered_n
        self.counters = Counters(dict.fromkeys(("split_count", "top_k", "gemm"), calls), 0, 0)
        self.modes: list[Mode] = []
        self.permitted: dict[Shape, tuple[int, ...]] = {}
        self.preferred: list[tuple[Shape, int, bytes]] = []
        self.omitted: frozenset[str] = frozenset()

    def open(self) -> tuple[int, str]:
        return 130100, "/somewhere/libcublasLt.so.13"

    def shapes(self) -> Mapping[Shape, int]:
        return self._shapes

    def permit(self, shape: Shape, algorithms: tuple[int, ...]) -> None:
        self.permitted[shape] = algorithms

    def prefer(self, shape: Shape, n: int, code: bytes) -> None:
        self.preferred.append((shape, n, code))

    def covers(self, shape: Shape, n: int) -> bool:
        return n != self._uncovered_n

    def mode(self, mode: Mode) -> None:
        self.modes.append(mode)


def proved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: FakeOverrides,
    permits: Mapping[Shape, Permit],
    *,
    gpu: host.Gpu = GPU,
    measured: list[Mapping[Shape, int]] | None = None,
) -> Exactness:
    """An exactness behind its proof, where measuring gives these permits."""

    def measure(_: object, shapes: Mapping[Shape, int]) -> Mapping[Shape, Permit]:
        (measured if measured is not None else []).append(shapes)
        return permits

    monkeypatch.setattr(calibrate, "lend_workspace", lambda _, gpus: None)
    monkeypatch.setattr(calibrate, "measure", measure)
    without(monkeypatch, "TM_GEMM_TUNE")
    read = model.read(folder(tmp_path))
    exactness = Exactness(TurbomindOptions(model=tmp_path, state_dir=tmp_path), read, cast(Overrides, overrides))
    exactness.prepare(gpu, "0.18.0")
    exactness.prove()
    return exactness


PERMITS = {LAYER: Permit((66,), 8448, ((1, "0a"), (8448, "ff"))), HEAD: Permit((66,), 256)}


def test_with_all_in_place_it_may_be_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape is served, and tried with as many tokens as it can get: a batch at least."""
    overrides, measured = FakeOverrides({LAYER: 8448, HEAD: 1}), list[Mapping[Shape, int]]()
    exactness = proved(tmp_path, monkeypatch, overrides, PERMITS, measured=measured)

    assert exactness.ceiling[0] == types_pb2.GRADE_EXACT
    assert measured == [{LAYER: 8448, HEAD: 256}]
    assert (overrides.permitted, overrides.modes) == ({LAYER: (66,), HEAD: (66,)}, [Mode.SERVE])
    assert overrides.preferred == [(LAYER, 1, b"\x0a"), (LAYER, 8448, b"\xff")]
    assert exactness.fields["kernel_plan"] == Manifest({}, PERMITS).digest
    assert (exactness.fields["cublas"], exactness.fields["attention_splits"]) == ("libcublasLt.so.13 130100", "1")


def test_the_next_start_takes_the_manifests_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine; another driver is measured again."""
    measured: list[Mapping[Shape, int]] = []
    for gpu in (GPU, GPU, host.Gpu(GPU.name, GPU.capability, "590.1")):
        exactness = proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448, HEAD: 1}), PERMITS, gpu=gpu, measured=measured)
        assert exactness.ceiling[0] == types_pb2.GRADE_EXACT

    assert len(measured) == 2


def test_a_manifest_that_was_damaged_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning."""
    measured: list[Mapping[Shape, int]] = []
    proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448}), PERMITS, measured=measured)
    (kept,) = (tmp_path / "turbomind").glob("plans-*.json")
    kept.write_text(kept.read_text().replace("66", "99"))
    proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448}), PERMITS, measured=measured)

    assert len(measured) == 2
    assert "kernel plans unreadable" in caplog.text


def test_a_manifest_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fields in which the likest of those that are kept was made elsewhere."""
    origins = []
    newer = host.Gpu(GPU.name, GPU.capability, "590.1")
    for gpu in (GPU, GPU, newer, host.Gpu("NVIDIA H200", GPU.capability, "590.1")):
        exactness = proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448}), PERMITS, gpu=gpu)
        origins.append(exactness.origin)

    assert origins == [
        "made now: none was kept",
        "kept",
        "made now: the kept one is of another environment: driver was 580.159, is 590.1",
        f"made now: the kept one is of another environment: gpu was {GPU.name}, is NVIDIA H200",
    ]
    assert proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448, TAIL: 1}), PERMITS).origin == (
        "made now: the kept one lacks a product"
    )


def test_the_table_of_what_was_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each product, covered or not; then the digest, where it is kept, and what can be earned."""
    exactness = proved(tmp_path, monkeypatch, FakeOverrides({LAYER: 8448, HEAD: 1}), {LAYER: Permit((66, 71), 8448)})
    lines = table(exactness).splitlines()
    assert exactness.manifest is not None

    assert lines[:3] == [
        "product      type  algorithms  tokens",
        "576 x 1536   bf16  66 71       1 to 8448",
        "49152 x 576  bf16  none        none",
    ]
    assert lines[4:] == [
        f"kernel plan  {exactness.manifest.digest}",
        f"kept at      {exactness.path}",
        "origin       made now: none was kept",
        "can earn     BEST_EFFORT: nothing rounds alike in the product 49152x576",
        "not covered  nothing rounds alike in the product 49152x576",
    ]
    assert exactness.path.exists()


@pytest.mark.parametrize(("covered", "code"), [(True, 0), (False, 1)])
def test_calibrate_says_what_was_proved(
    covered: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its exit code whether that is everything; the engine is closed."""
    exactness = proved(
        tmp_path, monkeypatch, FakeOverrides({LAYER: 8448} | ({} if covered else {HEAD: 1})), {LAYER: PERMITS[LAYER]}
    )
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr(loading, "load", lambda options: SimpleNamespace(exactness=exactness, close=close))

    assert calibrate_command(Settings(engine="turbomind", model=tmp_path, state_dir=tmp_path)) == code
    assert (closed, "576 x 1536" in capsys.readouterr().out) == ([True], True)


def test_calibrate_of_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine without products is a bad command line; one that cannot be loaded is a failure; each says why in a line."""
    monkeypatch.setattr(host, "lmdeploy_version", not_installed)

    assert calibrate_command(Settings(engine="llama")) == 2
    assert capsys.readouterr().err == ("service: calibrate: --engine llama has no products to prove; only turbomind has\n")
    assert calibrate_command(Settings(engine="turbomind", model=tmp_path)) == 1
    assert capsys.readouterr().err.startswith("service: calibrate: --engine turbomind needs lmdeploy")


@pytest.mark.parametrize(
    ("overrides", "permits", "why"),
    [
        (FakeOverrides({LAYER: 8448}, calls=0), PERMITS, "does not reach the override split_count"),
        (FakeOverrides({LAYER: 8448, HEAD: 1}), {LAYER: Permit((66,), 8448)}, "nothing rounds alike in the product 49152x576"),
        (
            FakeOverrides({LAYER: 8448}, uncovered_n=77),
            PERMITS,
            "no algorithm rounds alike for 77 tokens of the product 576x1536",
        ),
    ],
)
def test_what_is_missing_is_the_ceilings_reason(
    overrides: FakeOverrides, permits: Mapping[Shape, Permit], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine runs all the same."""
    exactness = proved(tmp_path, monkeypatch, overrides, permits)

    assert exactness.ceiling[0] == types_pb2.GRADE_BEST_EFFORT
    assert why in exactness.ceiling[1]


def test_without_overrides_the_engine_runs_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says why it is no better."""

    def refuse(_: Path) -> Path:
        raise NoOverrides("there is no C compiler")

    monkeypatch.setattr("service.engines.turbomind.exactness.build", refuse)
    exactness = Exactness(TurbomindOptions(model=tmp_path, state_dir=tmp_path), model.read(folder(tmp_path)))
    exactness.load()
    exactness.prepare(GPU, "0.18.0")
    exactness.prove()

    assert exactness.ceiling == (types_pb2.GRADE_BEST_EFFORT, "the overrides are missing: there is no C compiler")
    assert exactness.fields == {
        "overrides": "none",
        "kernel_plan": "its own",
        "attention_splits": "its own",
        "cublas": "",
    }


def test_experts_are_not_proved(tmp_path: Path) -> None:
    """Their products go through other kernels."""
    exactness = Exactness(TurbomindOptions(model=tmp_path), model.read(folder(tmp_path, CONFIG | {"num_experts": 64})))

    assert exactness.ceiling[0] == types_pb2.GRADE_BEST_EFFORT
    assert "experts" in exactness.ceiling[1]


def test_quantised_kernels_are_pinned_by_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TurboMind chooses them by timing: the first choice is exported, and imported from then on while its file is unharmed."""
    monkeypatch.setattr(calibrate, "lend_workspace", lambda _, gpus: None)
    monkeypatch.setattr(calibrate, "measure", lambda _, shapes: {shape: Permit((66,), 256) for shape in shapes})
    config = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    seen = []
    for damage in (False, False, True):
        without(monkeypatch, "TM_GEMM_IMPORT", "TM_GEMM_EXPORT", "TM_GEMM_TUNE")
        if damage:
            next((tmp_path / "turbomind").glob("kernels-*.bin")).write_bytes(b"other")
        read = model.read(folder(tmp_path, config))
        exactness = Exactness(
            TurbomindOptions(model=tmp_path, state_dir=tmp_path), read, cast(Overrides, FakeOverrides({HEAD: 1}))
        )
        exactness.prepare(GPU, "0.18.0")
        exported, imported = os.environ.get("TM_GEMM_EXPORT"), os.environ.get("TM_GEMM_IMPORT")
        if exported:
            Path(exported).parent.mkdir(exist_ok=True)
            Path(exported).write_bytes(b"table")
        exactness.prove()
        assert exactness.manifest is not None
        seen.append((bool(exported), bool(imported), os.environ["TM_GEMM_TUNE"], exactness.manifest.digest))

    assert [each[:3] for each in seen] == [
        (True, False, "max_splits=1"),
        (False, True, "max_splits=1"),
        (True, False, "max_splits=1"),
    ]
    assert len({each[3] for each in seen}) == 1
