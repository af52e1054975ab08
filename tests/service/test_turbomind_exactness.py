"""What a start proves, keeps and refuses, and which grade it may earn."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import struct
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ostinato.v1 import types_pb2

from service.__main__ import calibrate as calibrate_command
from service.config import Settings
from service.engines import load
from service.engines.base import EngineUnusable
from service.engines.turbomind import BLOCK_TOKENS, PIECE_TOKENS, TurbomindOptions, engine, host, kernels, model, probe
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.kernels import Manifest, Permit, Product
from service.engines.turbomind.native import Native
from service.engines.turbomind.overrides import Mode, NoOverrides, Overrides, Shape
from service.engines.turbomind.probe import KernelProof
from tests.service.turbomind_kit import CONFIG, GPU, HEAD, LAYER, TAIL, FakeOverrides, folder, not_installed, without

PERMITS = {LAYER: Permit((66,), 8448, ((1, "0a"), (8448, "ff"))), HEAD: Permit((66,), 256)}
EXPERTS = Product(tuple(64 if place == 25 else 0 for place in range(26)))
PROOF = KernelProof({EXPERTS: (8, 64)}, (), (0,))
TABLE = struct.pack("<8sIIQ", b"TMGEMM2\0", 6, 304, 1) + struct.pack("<76i", *(8 if place == 22 else 0 for place in range(76)))
AWQ = {"quantization_config": {"quant_method": "awq"}}
MIXTURE = {"num_experts": 64}


class Start:
    """Starts of a model, each with its proof."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.measured: list[Mapping[Shape, int]] = []
        """The products of each measurement."""

    def __call__(
        self,
        overrides: FakeOverrides,
        permits: Mapping[Shape, Permit] = PERMITS,
        *,
        config: Mapping[str, Any] = {},  # is not changed
        gpu: host.Gpu = GPU,
        pieces: str = "",
        written: bytes = TABLE,
        proof: KernelProof = PROOF,
        **options: Any,
    ) -> Exactness:
        """With these permits as the measurement, this proof of own kernels, and this reason why prompts are not cut. TurboMind
        writes this table of kernels if it is told to."""

        def measure(_: object, shapes: Mapping[Shape, int]) -> Mapping[Shape, Permit]:
            self.measured.append(shapes)
            return permits

        def prove_pieces(*_: object) -> str:
            overrides.ran_pieces = True
            return pieces

        self._patch.setattr(kernels, "set_workspace", lambda _, gpus: None)
        self._patch.setattr(kernels, "measure", measure)
        self._patch.setattr(probe, "prove_pieces", prove_pieces)
        self._patch.setattr(probe, "prove_kernels", lambda *_: proof)
        self._patch.setattr(probe, "first_run", lambda *_: overrides.serve())
        without(self._patch, "TM_GEMM_IMPORT", "TM_GEMM_EXPORT", "TM_GEMM_TUNE", "NCCL_NVLS_ENABLE")
        read = model.read(folder(self.folder, CONFIG | dict(config)))
        given = TurbomindOptions(model=self.folder, state_dir=self.folder, **options)
        exactness = Exactness(given, read, cast(Overrides, overrides))
        exactness.prepare(gpu, "0.18.0")
        if exported := os.environ.get("TM_GEMM_EXPORT"):
            Path(exported).parent.mkdir(exist_ok=True)
            Path(exported).write_bytes(written)
        exactness.prove(cast(Native, SimpleNamespace()))
        return exactness


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(tmp_path, monkeypatch)


def test_with_all_in_place_it_may_be_exact(start: Start) -> None:
    """Every shape is served, and tried with at least as many tokens as there are runs."""
    overrides = FakeOverrides({LAYER: 8448, HEAD: 1})
    exactness = start(overrides)

    assert exactness.ceiling[0] == types_pb2.GRADE_EXACT
    assert start.measured == [{LAYER: 8448, HEAD: 256}]
    assert (overrides.permitted, overrides.modes) == ({LAYER: (66,), HEAD: (66,)}, [Mode.SERVE])
    assert overrides.preferred == [(LAYER, 1, b"\x0a"), (LAYER, 8448, b"\xff")]
    assert exactness.fields["kernel_plan"] == Manifest({}, PERMITS).digest
    assert (exactness.fields["cublas"], exactness.fields["attention_splits"]) == ("libcublasLt.so.13 130100", "1")


def test_a_manifest_that_was_damaged_is_measured_again(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged manifest is logged and measured again."""
    start(FakeOverrides({LAYER: 8448}))
    (kept,) = (start.folder / "turbomind").glob("plans-*.json")
    kept.write_text(kept.read_text().replace("66", "99"))
    start(FakeOverrides({LAYER: 8448}))

    assert len(start.measured) == 2
    assert "kernel plans unreadable" in caplog.text


def test_a_manifest_that_is_refused_says_why(start: Start) -> None:
    """A kept manifest is used on the same machine; elsewhere it is measured again, and the log has the fields in which the most
    similar one differs."""
    newer = host.Gpu(GPU.name, GPU.capability, "590.1")
    gpus = (GPU, GPU, newer, host.Gpu("NVIDIA H200", GPU.capability, "590.1"))
    origins = [start(FakeOverrides({LAYER: 8448}), gpu=gpu).origin for gpu in gpus]

    assert len(start.measured) == 3
    assert origins == [
        "made now: none was kept",
        "kept",
        "made now: the kept one is of another environment: driver was 580.159, is 590.1",
        f"made now: the kept one is of another environment: gpu was {GPU.name}, is NVIDIA H200",
    ]
    assert start(FakeOverrides({LAYER: 8448, TAIL: 1})).origin == "made now: the kept one lacks a product"


def test_the_table_of_what_was_proved(start: Start) -> None:
    """The table has a row for each product, covered or not, then the digest, its path and the best grade."""
    exactness = start(FakeOverrides({LAYER: 8448, HEAD: 1}), {LAYER: Permit((66, 71), 8448)})
    lines = exactness.table().splitlines()
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
    covered: bool, code: int, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`calibrate` prints the table, its exit code says whether all is covered, and it closes the engine."""
    exactness = start(FakeOverrides({LAYER: 8448} | ({} if covered else {HEAD: 1})), {LAYER: PERMITS[LAYER]})
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr(engine, "load", lambda options: SimpleNamespace(exactness=exactness, close=close))

    assert calibrate_command(Settings(engine="turbomind", model=start.folder, state_dir=start.folder)) == code
    assert (closed, "576 x 1536" in capsys.readouterr().out) == ([True], True)


def test_calibrate_of_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`calibrate` refuses an engine without products, and fails for one that cannot be loaded, each with one line."""
    monkeypatch.setattr(host, "lmdeploy_version", not_installed)

    assert calibrate_command(Settings(engine="llama")) == 2
    assert capsys.readouterr().err == ("service: calibrate: --engine llama has no products to prove; only turbomind has\n")
    assert calibrate_command(Settings(engine="turbomind", model=tmp_path)) == 1
    assert capsys.readouterr().err.startswith("service: calibrate: --engine turbomind needs lmdeploy")


@pytest.mark.parametrize(
    ("fake", "omitted", "pieces", "permits", "why"),
    [
        ({"calls": 0}, "", "", PERMITS, "TurboMind does not reach the override split_count"),
        ({}, "", "", {LAYER: Permit((66,), 8448)}, "nothing rounds alike in the product 49152x576"),
        ({"uncovered_n": 77}, "", "", PERMITS, "no algorithm rounds alike for 77 tokens of the product 576x1536"),
        ({}, "", "it reads (1, 0, 0)", PERMITS, "it reads (1, 0, 0)"),
        ({}, "piece", "", PERMITS, "prompts are cut where others leave off"),
    ],
)
def test_what_is_missing_is_the_ceilings_reason(
    fake: dict[str, int], omitted: str, pieces: str, permits: Mapping[Shape, Permit], why: str, start: Start
) -> None:
    """What is missing is the ceiling's reason, also where prompts are not cut at places of their own; the engine runs
    nevertheless."""
    overrides = FakeOverrides({LAYER: 8448, HEAD: 1}, **fake)
    overrides.omitted = frozenset(filter(None, [omitted]))

    assert start(overrides, permits, pieces=pieces).ceiling == (types_pb2.GRADE_BEST_EFFORT, why)


@pytest.mark.parametrize(
    ("tp", "communicator", "why"),
    [
        (2, "nccl", ""),
        (2, "cuda-ipc", "two GPUs round otherwise for large batches with --communicator cuda-ipc: use nccl"),
        (4, "nccl", "more than two GPUs add in an order that depends on the batch: --tp is 4"),
    ],
)
def test_two_gpus_may_be_exact_with_nccl(tp: int, communicator: str, why: str, start: Start) -> None:
    """Two GPUs that add with NCCL may earn EXACT, without sums by the switch; others may not, and the reason says why."""
    overrides = FakeOverrides({LAYER: 8448, HEAD: 1})
    grade, reason = start(overrides, tp=tp, communicator=communicator).ceiling

    assert grade == (types_pb2.GRADE_BEST_EFFORT if why else types_pb2.GRADE_EXACT)
    assert reason == why or not why
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"


def test_without_overrides_the_engine_runs_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without overrides the engine runs as stock TurboMind, and the ceiling says why."""

    def refuse(_: Path) -> Path:
        raise NoOverrides("there is no C compiler")

    monkeypatch.setattr("service.engines.turbomind.exactness.build", refuse)
    exactness = Exactness(TurbomindOptions(model=tmp_path, state_dir=tmp_path), model.read(folder(tmp_path)))
    exactness.load()
    exactness.prepare(GPU, "0.18.0")
    exactness.prove(cast(Native, None))

    assert exactness.ceiling == (types_pb2.GRADE_BEST_EFFORT, "the overrides are missing: there is no C compiler")
    assert exactness.fields == {
        "overrides": "none",
        "kernel_plan": "its own",
        "attention_splits": "its own",
        "cublas": "",
    }


@pytest.mark.parametrize("config", [AWQ, MIXTURE])
def test_own_kernels_are_pinned_by_the_first_start(config: Mapping[str, Any], start: Start) -> None:
    """TurboMind chooses them by timing: the first choice is exported and proved, and imported from then on with the same
    permits while its file is unharmed. The digest of the kernel plan stays."""
    told, plans, served = [], set(), []
    for damage in (False, False, True):
        if damage:
            next((start.folder / "turbomind").glob("kernels-*.bin")).write_bytes(b"other")
        overrides = FakeOverrides({HEAD: 1})
        exactness = start(overrides, config=config)
        assert exactness.ceiling[0] == types_pb2.GRADE_EXACT
        told.append([name for name in ("TM_GEMM_EXPORT", "TM_GEMM_IMPORT") if name in os.environ])
        assert os.environ["TM_GEMM_TUNE"] == "max_splits=1"
        plans.add(exactness.fields["kernel_plan"])
        served.append(overrides.served)

    assert told == [["TM_GEMM_EXPORT"], ["TM_GEMM_IMPORT"], ["TM_GEMM_EXPORT"]]
    assert len(plans) == 1
    assert served[1] == {EXPERTS.numbers: (8, 64)}


def test_other_kernels_are_another_plan(start: Start) -> None:
    """The table, and which of its kernels may serve, are part of the digest."""
    plans = set()
    for written, permitted in ((TABLE, (8,)), (TABLE, (8, 64)), (TABLE[:-4] + b"more", (8, 64))):
        proof = KernelProof({EXPERTS: permitted}, (), (0,))
        plans.add(start(FakeOverrides({HEAD: 1}), config=MIXTURE, written=written, proof=proof).fields["kernel_plan"])
        shutil.rmtree(start.folder / "turbomind")

    assert len(plans) == 3


@pytest.mark.parametrize(
    ("written", "proof", "why"),
    [
        (TABLE, KernelProof({}, ("2 x 3 for 8 rows (tile 8x256x64)",), (-1,)), "none rounds alike whatever else runs: 2 x 3"),
        (TABLE, KernelProof({}, (), ()), "of TurboMind's own kernels its table has none"),
        (b"", KernelProof({}, (), ()), "TurboMind's table of kernels is too short"),
        (TABLE.replace(b"\x06", b"\x07", 1), KernelProof({}, (), ()), "table of kernels is of version 7"),
    ],
)
def test_own_kernels_that_are_not_proved_cost_the_grade(written: bytes, proof: KernelProof, why: str, start: Start) -> None:
    """The reason names the kernel, or what is wrong with TurboMind's table; it is the same at the next start."""
    for _ in range(2):
        grade, reason = start(FakeOverrides({HEAD: 1}), config=MIXTURE, written=written, proof=proof).ceiling

        assert grade == types_pb2.GRADE_BEST_EFFORT
        assert why in reason


def test_a_table_that_turbomind_ignores_costs_the_grade(start: Start) -> None:
    """It says nothing when it imports no record of a table: a run has to be served with what is permitted."""
    start(FakeOverrides({HEAD: 1}), config=MIXTURE)
    overrides = FakeOverrides({HEAD: 1})
    overrides.ignores_kernels = True
    grade, reason = start(overrides, config=MIXTURE).ceiling

    assert grade == types_pb2.GRADE_BEST_EFFORT
    assert "does not serve with the kernels of kernels-" in reason


def test_own_kernels_that_are_not_pinned_cost_the_grade(start: Start) -> None:
    """Without the override, TurboMind's own kernels are not pinned, which costs the grade."""
    overrides = FakeOverrides({HEAD: 1})
    overrides.omitted = frozenset({"lookup"})
    grade, reason = start(overrides, config=AWQ).ceiling

    assert not [name for name in os.environ if name.startswith("TM_GEMM_")]
    assert not overrides.served
    assert grade == types_pb2.GRADE_BEST_EFFORT
    assert "not pinned" in reason


def test_without_lmdeploy_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install LMDeploy, and what to use without a GPU."""
    monkeypatch.setattr(host, "lmdeploy_version", not_installed)

    with pytest.raises(EngineUnusable, match=r"needs lmdeploy: pip install .*\[turbomind\]'; without a GPU use --engine llama"):
        load(Settings(engine="turbomind", model=folder(tmp_path), state_dir=tmp_path))


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.18.0", True), ("0.18.9", True), ("0.17.2", False), ("0.19.0", False), ("0.19.0rc1", False), ("1.0", False)],
)
def test_only_versions_that_it_was_proved_with_will_do(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tested versions of LMDeploy are accepted, since others may call other functions."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    if fits:
        assert host.lmdeploy_version() == version
    else:
        with pytest.raises(EngineUnusable, match=rf"lmdeploy>=0\.18,<0\.19, found {version}"):
            host.lmdeploy_version()


def test_the_extra_asks_for_what_is_checked() -> None:
    """pyproject.toml and the check at start have one range of versions."""
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    least, below = (".".join(map(str, version)) for version in host.VERSIONS)

    assert extras["lmdeploy"] == [f"lmdeploy>={least},<{below}"]


def test_a_missing_package_is_named() -> None:
    """A package that cannot be imported is named."""
    with pytest.raises(EngineUnusable, match="engine turbomind needs no_such_package"):
        host.module("no_such_package")


@pytest.mark.parametrize(
    ("context", "runs", "splits", "prefill"),
    [(4096, 256, 1, 8192), (8192, 256, 8, 8192), (32_768, 256, 8, 32_768), (32_768, 1024, 4, 32_768), (128, 256, 1, 8192)],
)
def test_splits_and_prefill_follow_the_context(context: int, runs: int, splits: int, prefill: int) -> None:
    """Partial results always fit. A step has room for two pieces that are each two tokens longer; only where nothing is exact
    does it have room for every prompt."""
    options = TurbomindOptions(context_tokens=context, runs=runs)

    assert (options.splits, TurbomindOptions(context_tokens=context, runs=runs, exact=False).prefill_tokens) == (
        splits,
        prefill,
    )
    assert options.prefill_tokens >= 2 * (PIECE_TOKENS + 2)
    assert options.session_tokens > runs and PIECE_TOKENS % BLOCK_TOKENS == 0
    assert options.step_context_tokens >= options.session_tokens


def test_a_model_is_what_its_config_says(tmp_path: Path) -> None:
    """The config may be nested in a vision model's; ends come from generation_config.json, if there is one."""
    plain = model.read(folder(tmp_path))
    nested = model.read(
        folder(
            tmp_path,
            {"text_config": CONFIG, "quantization_config": {"quant_method": "awq"}},
            generation_config_JSON='{"eos_token_id": [2, 5]}',
        )
    )

    assert (plain.layers, plain.kv_heads, plain.head_dim, plain.quantisation, plain.experts) == (30, 3, 64, "none", 0)
    assert (plain.end_ids, nested.end_ids) == (frozenset({0}), frozenset({2, 5}))
    assert (nested.quantisation, nested.vocabulary_size) == ("awq", 49152)
    latent = model.read(folder(tmp_path, CONFIG | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}))
    assert (latent.kv_heads, latent.head_dim) == (1, 576)  # latent attention caches one head


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, 1),
        ({"num_experts": 64, "mlp_only_layers": [0, 1]}, 3),
        ({"n_routed_experts": 64, "first_k_dense_replace": 3}, 4),
        ({"n_routed_experts": 64}, 2),
        ({"n_routed_experts": 64, "mlp_layer_types": ["sparse"]}, 1),
    ],
)
def test_kernels_are_tuned_with_the_first_layer_that_has_experts(config: dict[str, Any], layers: int, tmp_path: Path) -> None:
    """A model says in one of several ways how many layers before it have none; GLM-4.7-Flash has one, and need not say so."""
    assert model.read(folder(tmp_path, CONFIG | config)).tuned_layers == layers


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context_tokens": 8193}, "--context-tokens must be at most 8192 for served, is 8193"),
        ({"tp": 2}, "--tp must divide the 9 heads of attention of served, is 2"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    """Impossible options of a model are refused before it is loaded, with the flag's name."""
    (tmp_path / "served").mkdir()
    read = model.read(folder(tmp_path / "served"))

    engine.check(TurbomindOptions(), read)
    with pytest.raises(EngineUnusable, match=text):
        engine.check(TurbomindOptions(**options), read)
    with pytest.raises(EngineUnusable, match="--tp must divide the 3 heads of keys and values"):
        engine.check(TurbomindOptions(tp=2), dataclasses.replace(read, heads=8))


@pytest.mark.parametrize(
    ("available", "wanted", "why"),
    [
        (False, 1, "^--engine turbomind needs a CUDA device, .*; without a GPU use --engine llama$"),
        (True, 2, "--tp is 2, and torch finds 1 CUDA devices: lower it"),
    ],
)
def test_a_machine_without_a_gpu_is_refused(available: bool, wanted: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA is refused with the flag and an alternative; too few GPUs with their number."""
    cuda = SimpleNamespace(is_available=lambda: available, device_count=lambda: 1)
    monkeypatch.setattr(host, "module", lambda name: SimpleNamespace(cuda=cuda))

    with pytest.raises(EngineUnusable, match=why):
        host.gpu(wanted)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "name a folder that has config.json"),
        ("{", "is not that of a text model"),
        ('{"vocab_size": 5}', "is not that of a text model"),
    ],
)
def test_a_folder_that_is_no_model_is_named(config: str | None, text: str, tmp_path: Path) -> None:
    """A folder that is no model is refused with what is wrong; a model has to be named."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    with pytest.raises(EngineUnusable, match=text):
        model.read(tmp_path)
    with pytest.raises(EngineUnusable, match="needs --model"):
        model.read(None)


def test_digests_follow_contents_and_names(tmp_path: Path) -> None:
    """Weights and tokenizer have digests of their own."""
    with pytest.raises(EngineUnusable, match="has no weights"):
        model.weights_digest(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"a")
    one = model.weights_digest(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"b")
    two = model.weights_digest(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"c")
    without = model.tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")

    assert len({one, two, model.weights_digest(tmp_path)}) == 3
    assert model.tokenizer_digest(tmp_path) != without


def test_a_file_of_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """An unreadable file is not treated as a missing one."""
    folder(tmp_path)
    for name, read in (
        ("generation_config.json", model.read),
        ("tokenizer.json", model.tokenizer_digest),
        ("model.safetensors", model.weights_digest),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
        with pytest.raises(EngineUnusable, match=rf"{name}.*: Is a directory; let this user read it"):
            read(tmp_path)
        (tmp_path / name).rmdir()
