"""A model's folder without weights, and fake values of TurboMind and a GPU."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service.engines.turbomind import host
from service.engines.turbomind.overrides import Shape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "eos_token_id": 0,
}
LAYER = Shape(0, 0, 576, 1536, 14, 14, 14, 576, 1536, 576, 68)
HEAD = Shape(0, 0, 49152, 576, 14, 14, 14, 49152, 576, 49152, 68)
TAIL = Shape(0, 0, 576, 576, 14, 14, 14, 576, 576, 576, 68)
GPU = host.Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.159")
_real_version = host.lmdeploy_version


def folder(tmp_path: Path, config: Mapping[str, Any] = CONFIG, **files: str) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (tmp_path / name.replace("_JSON", ".json")).write_text(text)
    return tmp_path


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Unsets these variables now, and after the test."""
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def not_installed() -> str:
    """As `host.lmdeploy_version`, on a machine without LMDeploy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", _raise_not_found)
        return _real_version()


def _raise_not_found(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)
