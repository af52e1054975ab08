"""What is said where TurboMind cannot run, and what a model's folder is read as."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.config import Settings
from service.engines import load
from service.engines.base import EngineUnusable
from service.engines.turbomind import TurbomindOptions, host, loading, model
from tests.service.turbomind_kit import CONFIG, folder, not_installed


def test_without_lmdeploy_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to do on a machine without a GPU."""
    monkeypatch.setattr(host, "lmdeploy_version", not_installed)

    with pytest.raises(
        EngineUnusable, match=r"needs lmdeploy: pip install 'ostinato\[turbomind\]'; without a GPU use --engine"
    ):
        load(Settings(engine="turbomind", model=folder(tmp_path), state_dir=tmp_path))


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.18.0", True), ("0.18.9", True), ("0.17.2", False), ("0.19.0", False), ("0.19.0rc1", False), ("1.0", False)],
)
def test_only_versions_that_it_was_proved_with_will_do(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may call other functions."""
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
    """Whichever it is."""
    with pytest.raises(EngineUnusable, match="engine turbomind needs no_such_package"):
        host.module("no_such_package")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"runs": 0}, "--runs must be at least 1, is 0"),
        ({"cache_fraction": 1.0}, "--cache-fraction must be above 0 and below 1"),
        ({"attention_splits": 129}, "--attention-splits must be 0 to 128"),
        ({"attention_splits": 32}, r"--attention-splits \(32\) times --runs \(256\)"),
        ({"tp": 0}, "--tp must be a power of two, is 0"),
        ({"tp": 6}, "--tp must be a power of two, is 6"),
    ],
)
def test_options_that_turbomind_would_take_badly_are_refused(options: dict[str, Any], text: str) -> None:
    """Some of them would overrun a buffer."""
    with pytest.raises(EngineUnusable, match=text):
        TurbomindOptions(**options)


@pytest.mark.parametrize(
    ("context", "runs", "splits", "prefill"),
    [(4096, 256, 1, 8192), (8192, 256, 8, 8192), (32_768, 256, 8, 32_768), (32_768, 1024, 4, 32_768), (128, 256, 1, 8192)],
)
def test_splits_and_prefill_follow_the_context(context: int, runs: int, splits: int, prefill: int) -> None:
    """A prompt is never cut by its company, and partial results always fit."""
    options = TurbomindOptions(context_tokens=context, runs=runs)

    assert (options.splits, options.prefill_tokens) == (splits, prefill)
    assert options.prefill_tokens >= options.session_tokens > runs


def test_a_model_is_what_its_config_says(tmp_path: Path) -> None:
    """Nested in a vision model's as well; ends come from generation_config.json, if there is one."""
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context_tokens": 8193}, "--context-tokens must be at most 8192 for served, is 8193"),
        ({"tp": 2}, "--tp must divide the 9 heads of attention of served, is 2"),
        ({"tp": 4}, "--tp must divide the 9 heads"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    """By the flag's name."""
    (tmp_path / "served").mkdir()
    read = model.read(folder(tmp_path / "served"))

    loading.check(TurbomindOptions(), read)
    with pytest.raises(EngineUnusable, match=text):
        loading.check(TurbomindOptions(**options), read)
    with pytest.raises(EngineUnusable, match="--tp must divide the 3 heads of keys and values"):
        loading.check(TurbomindOptions(tp=2), dataclasses.replace(read, heads=8))


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flag, and what to use instead."""
    monkeypatch.setattr(host, "module", lambda name: SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))

    with pytest.raises(EngineUnusable, match="^--engine turbomind needs a CUDA device, .*; without a GPU use --engine llama$"):
        host.gpu(1)


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how many torch finds."""
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    monkeypatch.setattr(host, "module", lambda name: SimpleNamespace(cuda=cuda))

    with pytest.raises(EngineUnusable, match="--tp is 2, and torch finds 1 CUDA devices: lower it"):
        host.gpu(2)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "is not that of a text model"),
        ('{"vocab_size": 5}', "is not that of a text model"),
        (None, "name a folder that has config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_named(config: str | None, text: str, tmp_path: Path) -> None:
    """With what is wrong with it."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    with pytest.raises(EngineUnusable, match=text):
        model.read(tmp_path)


def test_a_model_has_to_be_named() -> None:
    """There is none to fall back on."""
    with pytest.raises(EngineUnusable, match="needs --model"):
        model.read(None)


def test_digests_follow_contents_and_names(tmp_path: Path) -> None:
    """Of weights and of the tokenizer, each by itself."""
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
    """It is not taken for one that is not there."""
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
