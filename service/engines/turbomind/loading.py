"""From options to an engine, in the one order that works: overrides, torch, TurboMind's library, the model, its first run, the
proof of its prefix cache, the proof of its products."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from service.engines.base import EngineUnusable
from service.engines.turbomind import host, memory, model, resuming
from service.engines.turbomind.engine import Loaded, TurbomindEngine
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.native import Native, bring_in
from service.engines.turbomind.options import BLOCK_TOKENS, TurbomindOptions
from service.engines.turbomind.overrides import TOP_K_BUCKET
from service.engines.turbomind.probing import probe
from service.engines.turbomind.request import RULES
from service.engines.turbomind.vocabulary import HuggingFaceVocabulary

_log = logging.getLogger(__name__)


def load(options: TurbomindOptions) -> TurbomindEngine:
    """Raises EngineUnusable."""
    version = host.lmdeploy_version()
    described = model.read(options.model)
    check(options, described)
    exactness = Exactness(options, described)
    exactness.load()
    gpu = host.gpu(options.tp)
    with ThreadPoolExecutor(1) as aside:
        weights = aside.submit(model.weights_digest, described.path)
        vocabulary = HuggingFaceVocabulary(described)
        bring_in()
        exactness.prepare(gpu, version)
        native, share, prefix_cache = _model(options, described, exactness)
        try:
            exactness.prove()
            blocks = _blocks(options, described, share)
            digest = weights.result()
        except EngineUnusable:
            native.close()
            raise
        fields = {
            **exactness.fields,
            "engine": TurbomindEngine.name,
            "engine_version": f"lmdeploy {version}",
            "model": described.name,
            "weights": digest,
            "tokenizer": model.tokenizer_digest(described.path),
            "template": vocabulary.template_digest,
            "dtype": native.dtype,
            "quantisation": options.model_format or described.quantisation,
            "tp": str(options.tp),
            "communicator": options.communicator if options.tp > 1 else "none",
            "device": gpu.name,
            "capability": gpu.capability,
            "driver": gpu.driver,
            "top_k_bucket": str(TOP_K_BUCKET) if exactness.overrides is not None else "its own",
            "kv_bits": str(options.kv_bits),
            "context_tokens": str(options.context_tokens),
            "prefill_tokens": str(options.prefill_tokens),
            "block_tokens": str(BLOCK_TOKENS),
            "prefix_cache": "on" if prefix_cache else "off",
            "runs": str(options.runs),
            "exact": "on" if options.exact else "off",
            "request_rules": RULES,
        }
    return TurbomindEngine(options, Loaded(native, vocabulary, exactness, blocks, fields, prefix_cache))


def _model(options: TurbomindOptions, described: model.Model, exactness: Exactness) -> tuple[Native, float, bool]:
    """The model behind its first run, which part of the KV cache one block is, and whether its prefix cache is on. A cache that
    cannot be relied on costs a second loading, without it. Raises EngineUnusable."""
    wanted = options.prefix_cache == "on"
    if wanted and options.context_tokens < resuming.CONTEXT_TOKENS_MIN:
        wanted = False
        _log.info("prefix cache off", extra={"why": f"--context-tokens is below {resuming.CONTEXT_TOKENS_MIN}"})
    native, share = _loaded(options, described, prefix_cache=wanted)
    if not wanted or exactness.overrides is None:
        return native, share, wanted
    try:
        why = resuming.prove(native, exactness.overrides)
    except EngineUnusable:
        native.close()
        raise
    if not why:
        return native, share, True
    _log.warning("prefix cache off", extra={"why": why})
    native.close()
    return (*_loaded(options, described, prefix_cache=False), False)


def _loaded(options: TurbomindOptions, described: model.Model, *, prefix_cache: bool) -> tuple[Native, float]:
    began = time.monotonic()
    native = Native(options, described, prefix_cache=prefix_cache)
    _log.info(
        "model loaded",
        extra={"dtype": native.dtype, "prefix_cache": prefix_cache, "seconds": round(time.monotonic() - began, 3)},
    )
    try:
        return native, probe(native, options.context_tokens)
    except EngineUnusable:
        native.close()
        raise


def check(options: TurbomindOptions, described: model.Model) -> None:
    """Raises EngineUnusable for what this model cannot do."""
    most = described.context_tokens_max
    if options.context_tokens > most:
        raise EngineUnusable(f"--context-tokens must be at most {most} for {described.name}, is {options.context_tokens}")
    for heads, of in ((described.heads, "attention"), (described.kv_heads, "keys and values")):
        if heads % options.tp:
            raise EngineUnusable(f"--tp must divide the {heads} heads of {of} of {described.name}, is {options.tp}")


def _blocks(options: TurbomindOptions, described: model.Model, share: float) -> int:
    """Of the KV cache, which can be promised. Raises EngineUnusable for too few."""
    size = memory.block_bytes(
        layers=described.layers,
        kv_heads=-(-described.kv_heads // options.tp),
        head_dim=described.head_dim,
        block_tokens=BLOCK_TOKENS,
        kv_bits=options.kv_bits,
    )
    found = memory.blocks(share=share, size=size, runs=options.runs)
    _log.info("KV cache", extra={"blocks": found, "block_bytes": size, "block_share": share})
    if found < memory.needed(options.context_tokens, BLOCK_TOKENS):
        raise EngineUnusable(
            f"the KV cache has room for {found * BLOCK_TOKENS} tokens, not for one run of {options.context_tokens}:"
            " raise --cache-fraction or lower --context-tokens"
        )
    return found
