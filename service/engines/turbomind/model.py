"""A model's folder: what its files say, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engines.base import EngineUnusable

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin")
_NESTED = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Model:
    """What config.json says, of which TurboMind tells nothing."""

    path: Path
    context_tokens_max: int
    vocabulary_size: int
    """Of the model; a tokenizer may have less."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    quantisation: str
    """Of the weights; "none" or a method's name."""
    experts: int
    """0: not a mixture of them."""
    end_ids: frozenset[int]
    config_digest: str

    @property
    def name(self) -> str:
        return self.path.name


def read(path: Path | None) -> Model:
    """Raises EngineUnusable, which says what is missing."""
    if path is None:
        raise EngineUnusable("--engine turbomind needs --model: a folder with config.json, safetensors and a tokenizer")
    path = path.resolve()
    try:
        raw = (path / "config.json").read_bytes()
        whole = json.loads(raw)
        config = next((whole[name] for name in _NESTED if isinstance(whole.get(name), dict)), whole)
        heads = int(config["num_attention_heads"])
        return Model(
            path=path,
            context_tokens_max=int(config["max_position_embeddings"]),
            vocabulary_size=int(config["vocab_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            quantisation=str((whole.get("quantization_config") or {}).get("quant_method", "none")),
            experts=max(int(config.get(name) or 0) for name in _EXPERTS),
            end_ids=_end_ids(path, whole),
            config_digest=hashlib.sha256(raw).hexdigest(),
        )
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        advice = "name a folder that has config.json" if missing else "let this user read it"
        file = error.filename or path / "config.json"
        raise EngineUnusable(f"--model: {path} cannot be read as a model: {file}: {error.strerror}; {advice}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineUnusable(f"--model: {path}/config.json is not that of a text model: {error!r}") from error


def _end_ids(path: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Of generation_config.json, or of config.json where that has none."""
    try:
        own = json.loads((path / "generation_config.json").read_bytes())
    except FileNotFoundError:
        own = {}
    given = own.get("eos_token_id", config.get("eos_token_id"))
    return frozenset(int(each) for each in (given if isinstance(given, list) else [given]) if each is not None)


def weights_digest(path: Path) -> str:
    """SHA-256 over the names and SHA-256 of the files that hold weights, read by several threads: a second for each GB or
    two. Raises EngineUnusable if there are none, or one cannot be read."""
    files = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise EngineUnusable(f"--model: {path} has no weights: no file is named {' or '.join(WEIGHTS)}")
    return _digest_of(files)


def tokenizer_digest(path: Path) -> str:
    """Likewise of the tokenizer's files."""
    return _digest_of([file for name in TOKENIZER_FILES if os.path.lexists(file := path / name)])


def _digest_of(files: Iterable[Path]) -> str:
    paths = list(files)
    try:
        with ThreadPoolExecutor() as threads:
            digests = list(threads.map(_sha256, paths))
    except OSError as error:
        raise EngineUnusable(f"{error.filename} cannot be read: {error.strerror}; let this user read it") from error
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            whole.update(block)
    return whole.hexdigest()
