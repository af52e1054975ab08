"""A model's folder without weights, and what plays TurboMind, its overrides and a GPU."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer
from service.engines.base import Run
from service.engines.scripted import ByteVocabulary
from service.engines.turbomind import host
from service.engines.turbomind.model import Model
from service.engines.turbomind.native import RUNNING, Account, Load, Progress
from service.engines.turbomind.overrides import REQUIRED, Counters, Mode, Shape
from service.engines.turbomind.request import Request

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
MODEL = Model(Path("/models/tiny"), 4096, 300, 2, 2, 2, 16, "none", 0, 1, frozenset({2}), "0" * 64)
CANCELLED, BLOCK = 8, 64
_real_version = host.lmdeploy_version


class FakeVocabulary(ByteVocabulary):
    chat = True


VOCABULARY = FakeVocabulary()


@dataclass
class FakeHandle:
    """A run inside TurboMind; the test makes its tokens."""

    run_id: int
    prompt: tuple[int, ...]
    request: Request
    grammar: object
    on_change: Callable[[], None]
    account: Account
    scheduled: bool
    made: list[int] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    news: Progress | None = None
    cancelled: bool = False

    def make(self, tokens: str | Iterable[int], status: int = RUNNING) -> None:
        """Reports as TurboMind does: a newer state replaces one that was not polled, and only the first one notifies."""
        self.made += tokens.encode() if isinstance(tokens, str) else tokens
        waits, self.news = self.news is not None, Progress(status, len(self.prompt) + len(self.made))
        if not waits:
            self.on_change()

    def poll(self) -> Progress | None:
        news, self.news = self.news, None
        return news

    def ids(self, first: int, last: int) -> list[int]:
        return [*self.prompt, *self.made][first:last]

    def logprobs(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return np.array([*row], np.int32), np.array([*row.values()], np.float32)

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeNative:
    """As `native.Native`. It makes no token by itself."""

    scheduled: bool = True
    """Whether runs are in a step at once."""
    tick: int = 7
    waiting: int = 0
    caches: bool = False
    """Whole blocks of prompts are cached, but never a prompt's last token."""
    vocabulary_size: int = 300
    handles: dict[int, FakeHandle] = field(default_factory=dict)
    """By run id, in order of start."""
    blocks: set[tuple[int, ...]] = field(default_factory=set)
    """What is cached: prompts that end with a whole block."""

    def start(
        self, run_id: int, ids: Sequence[int], request: Request, grammar: object, change: Callable[[], None]
    ) -> FakeHandle:
        account = Account(queued=100.0, scheduled=101.0, cached=self.cached_of(tuple(ids)))
        self.handles[run_id] = FakeHandle(run_id, tuple(ids), request, grammar, change, account, self.scheduled)
        return self.handles[run_id]

    def cached_of(self, ids: tuple[int, ...]) -> int:
        """Tokens that come from the cache. The prompt's blocks are cached from now on."""
        whole = [ids[:end] for end in range(BLOCK, len(ids) + 1, BLOCK)]
        found = min(BLOCK * sum(block in self.blocks for block in whole), len(ids) - 1) if self.caches else 0
        self.blocks.update(whole)
        return found

    def load(self) -> Load:
        return Load(self.tick, 0.25, len(self.handles), self.waiting, 0.0)


class FakeOverrides:
    """As `overrides.Overrides`, without a library."""

    def __init__(
        self, shapes: Mapping[Shape, int] | None = None, calls: int = 1, uncovered: int = 0, uncovered_n: int = 0
    ) -> None:
        """`uncovered_n`: the number of tokens that no algorithm covers."""
        self._shapes, self._uncovered_n = shapes or {}, uncovered_n
        self.counters = Counters(dict.fromkeys(REQUIRED, calls), 7, uncovered)
        self.served: dict[tuple[int, ...], Sequence[int]] = {}
        self.ran_pieces = self.ignores_kernels = False
        self.modes: list[Mode] = []
        self.permitted: dict[Shape, tuple[int, ...]] = {}
        self.preferred: list[tuple[Shape, int, bytes]] = []
        self.omitted: frozenset[str] = frozenset()

    def open(self) -> tuple[int, str]:
        return 130100, "/somewhere/libcublasLt.so.13"

    def shapes(self) -> Mapping[Shape, int]:
        assert self.ran_pieces, "a prompt in pieces may record more tokens of a product"
        return self._shapes

    def permit(self, shape: Shape, algorithms: tuple[int, ...]) -> None:
        self.permitted[shape] = algorithms

    def prefer(self, shape: Shape, n: int, code: bytes) -> None:
        self.preferred.append((shape, n, code))

    def covers(self, shape: Shape, n: int) -> bool:
        return n != self._uncovered_n

    def mode(self, mode: Mode) -> None:
        self.modes.append(mode)

    def kernels(self, permitted: dict[tuple[int, ...], Sequence[int]]) -> None:
        self.served = permitted

    def serve(self) -> None:
        """A run of TurboMind's."""
        pinned = bool(self.served) and not self.ignores_kernels
        self.counters = replace(self.counters, pinned=self.counters.pinned + pinned)


def run_of(run_id: int, *, prompt: Iterable[int] = b"ab", stream: bool = False, seed: int = 5, **changes: Any) -> Run:
    given = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 8}
    parameters = types_pb2.ResolvedParameters(**(given | changes))
    answer = Answer(parameters, VOCABULARY)
    return Run(run_id, run_id, 1, engine_pb2.PURPOSE_PRIMARY, tuple(prompt), parameters, seed, stream, answer)


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
