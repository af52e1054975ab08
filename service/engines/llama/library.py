"""libllama's calls as Python's: with `abi`, all that touches it.

What goes in must be sound: where llama.cpp finds a mistake, it ends the process. Handles are addresses, never 0. A context,
and a sampler, belong to one thread at a time; everything else may be used from any. All calls release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.engines.base import EngineUnusable
from service.engines.llama import abi

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data: a token that may come next."""
_SILENT = -1
_WHERE = re.compile(r"^\w+: (error loading model: )?")
"""How llama.cpp's errors begin: the function's name."""
MIN_KEEP = 1
"""The least that top_p and min_p leave."""


class Batch:
    """Rows for one decode: tokens, each with its place in its sequence, in order of the sequences."""

    def __init__(self, room: int, sequences: int) -> None:
        """Of at most `room` rows; sequences count from 0."""
        self._tokens, self._places = np.empty(room, np.int32), np.empty(room, np.int32)
        self._ones, self._wanted = np.ones(room, np.int32), np.empty(room, np.int8)
        self._numbers = np.arange(sequences, dtype=np.int32)
        self._sequences = np.empty(room, np.uintp)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        self._count = 0

    def add(self, sequence: int, place: int, token_ids: Sequence[int], *, wanted: bool) -> int:
        """Append consecutive tokens. The row of the last; its logits are `wanted` or not."""
        begin, end = self._count, self._count + len(token_ids)
        self._tokens[begin:end] = token_ids
        self._places[begin:end] = np.arange(place, place + len(token_ids))
        self._sequences[begin:end] = self._numbers.ctypes.data + sequence * self._numbers.itemsize
        self._wanted[begin:end] = False
        self._wanted[end - 1] = wanted
        self._count = end
        return end - 1

    def rows(self) -> abi.Rows:
        arrays = (self._places, self._ones, self._sequences, self._wanted)
        return abi.Rows(self._count, self._tokens.ctypes.data, None, *(array.ctypes.data for array in arrays))


class Library:
    """The loaded library; one in a process (`library`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = abi.bind(path)
        self._errors: list[str] = []
        self._log = abi.Log(self._listen)  # kept, for C does not
        self._llguidance = threading.Lock()  # it has a cache without one
        self._c.llama_log_set(self._log, None)
        self.set_verbosity(_SILENT)
        self._c.llama_backend_init()

    @property
    def features(self) -> str:
        """Of the processor, as far as this build uses them."""
        text: bytes = self._c.llama_print_system_info()
        return " ".join(part.strip().removesuffix(" = 1") for part in text.decode().split(":", 1)[-1].split("|")).strip()

    def load(self, path: Path, *, vocabulary_only: bool = False) -> int:
        """A model. Raises EngineUnusable that names the file and quotes llama.cpp."""
        params = self._c.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocabulary_only, 0
        self._errors.clear()
        model: int | None = self._c.llama_model_load_from_file(bytes(path), params)
        if not model:
            raise EngineUnusable(f"--model: {path}: cannot be loaded; {self._says}")
        return model

    def free(self, model: int) -> None:
        self._c.llama_model_free(model)

    def generates(self, model: int) -> bool:
        """Whether it is a model that continues its prompt, and nothing else."""
        return bool(self._c.llama_model_has_decoder(model)) and not self._c.llama_model_has_encoder(model)

    def trained_context(self, model: int) -> int:
        """In tokens."""
        return int(self._c.llama_model_n_ctx_train(model))

    def template(self, model: int) -> str | None:
        text: bytes | None = self._c.llama_model_chat_template(model, None)
        return None if text is None else text.decode()

    def vocabulary(self, model: int) -> int:
        """It lives as long as the model."""
        return int(self._c.llama_model_get_vocab(model))

    def size(self, vocabulary: int) -> int:
        return int(self._c.llama_vocab_n_tokens(vocabulary))

    def is_end(self, vocabulary: int, token_id: int) -> bool:
        return bool(self._c.llama_vocab_is_eog(vocabulary, token_id))

    def edge_ids(self, vocabulary: int) -> tuple[int | None, int | None]:
        """The tokens that begin and end a text, if there are any."""
        begin, end = int(self._c.llama_vocab_bos(vocabulary)), int(self._c.llama_vocab_eos(vocabulary))
        return begin if begin >= 0 else None, end if end >= 0 else None

    def wants_begin(self, vocabulary: int) -> bool:
        return bool(self._c.llama_vocab_get_add_bos(vocabulary))

    def piece(self, vocabulary: int, token_id: int, *, control: bool) -> bytes:
        """The token's text; of a control token only if `control`, else nothing."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length: int = self._c.llama_token_to_piece(vocabulary, token_id, buffer, room, 0, control)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def tokenize(self, vocabulary: int, text: bytes, *, control: bool) -> list[int]:
        """Nothing is added. With `control`, control tokens written out in the text become those tokens."""
        room = len(text) + 8
        while True:
            buffer = np.empty(room, np.int32)
            count: int = self._c.llama_tokenize(vocabulary, text, len(text), buffer.ctypes.data, room, False, control)
            if count >= 0:
                return [int(token_id) for token_id in buffer[:count]]
            room = -count

    def new_context(self, model: int, *, tokens: int, runs: int, batch: int, ubatch: int, threads: int, kv: str) -> int:
        """Room for `runs` sequences of `tokens` each, decoded at most `batch` rows at once. Raises EngineUnusable.

        The sequences have caches of their own (kv_unified off), or attention would sum in an order that depends on neighbours.
        """
        params = self._c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = tokens * runs, runs, batch, ubatch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = abi.KV_TYPES[kv]
        params.flash_attn_type, params.kv_unified = abi.FLASH_ATTENTION_ON, False
        self._errors.clear()
        context: int | None = self._c.llama_init_from_model(model, params)
        if not context:
            raise EngineUnusable(
                f"--runs {runs}, --context-tokens {tokens}, --kv {kv}: there can be no such context; {self._says}"
            )
        return context

    def free_context(self, context: int) -> None:
        self._c.llama_free(context)

    def decode(self, context: int, batch: Batch) -> int:
        """0, or llama.cpp's number for what went wrong."""
        return int(self._c.llama_decode(context, batch.rows()))

    def logits(self, context: int, row: int, size: int) -> NDArray[np.float32]:
        """Of a row of the last decode that asked for them; overwritten by the next."""
        address: int = self._c.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))

    def copy(self, context: int, source: int, target: int) -> None:
        """Let the second sequence hold what the first holds, and nothing else."""
        memory = self._c.llama_get_memory(context)
        self._c.llama_memory_seq_rm(memory, target, -1, -1)
        self._c.llama_memory_seq_cp(memory, source, target, -1, -1)

    def truncate(self, context: int, sequence: int, tokens: int) -> bool:
        """Free what the context holds of a sequence behind its first `tokens`. Whether just these are there now."""
        memory = self._c.llama_get_memory(context)
        if not self._c.llama_memory_seq_rm(memory, sequence, tokens, -1):
            return False
        ends = (self._c.llama_memory_seq_pos_min(memory, sequence), self._c.llama_memory_seq_pos_max(memory, sequence))
        return ends == ((0, tokens - 1) if tokens else (-1, -1))

    def can_resume(self, model: int) -> bool:
        """Whether a sequence's memory can be cut at any token: not where it is a state that every token changes."""
        return not (self._c.llama_model_is_recurrent(model) or self._c.llama_model_is_hybrid(model))

    def forget(self, context: int, sequence: int) -> None:
        """Free what the context holds of a sequence."""
        self._c.llama_memory_seq_rm(self._c.llama_get_memory(context), sequence, -1, -1)

    def chain(self, *, top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> int:
        """A sampler of these, in this order, then a draw; at temperature 0 of nothing but the likeliest. `seed` is below
        2**32 - 1, which would mean "any"."""
        c = self._c
        if temperature == 0:
            return self._chain([c.llama_sampler_init_greedy()])
        links = [c.llama_sampler_init_top_k(top_k)] if top_k else []
        links += [c.llama_sampler_init_top_p(top_p, MIN_KEEP)] if top_p < 1 else []
        links += [c.llama_sampler_init_min_p(min_p, MIN_KEEP)] if min_p > 0 else []
        return self._chain([*links, c.llama_sampler_init_temp(temperature), c.llama_sampler_init_dist(seed)])

    def grammar(self, vocabulary: int, kind: str, source: bytes) -> int:
        """A sampler that bans what the grammar forbids, or nothing at all if llguidance will not have it."""
        with self._llguidance:
            return int(getattr(self._c, abi.LLGUIDANCE)(vocabulary, kind.encode(), source))

    def apply(self, sampler: int, candidates: NDArray[np.void]) -> int:
        """Let it work on `candidates` (of CANDIDATE), in place. The place of the one it has chosen, if it chooses."""
        array = abi.Candidates(candidates.ctypes.data, len(candidates), -1, False)
        self._c.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.selected)

    def accept(self, sampler: int, token_id: int) -> None:
        self._c.llama_sampler_accept(sampler, token_id)

    def free_sampler(self, sampler: int) -> None:
        self._c.llama_sampler_free(sampler)

    def set_verbosity(self, level: int) -> None:
        """Of what llguidance writes to standard error."""
        getattr(self._c, abi.SET_VERBOSITY)(level)

    def flush_log(self) -> None:
        """Wait until all that llguidance has said is written."""
        getattr(self._c, abi.FLUSH_LOG)(getattr(self._c, abi.MAIN_LOG)())

    def _chain(self, links: Sequence[int]) -> int:
        params = self._c.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = int(self._c.llama_sampler_chain_init(params))
        for link in links:
            self._c.llama_sampler_chain_add(chain, link)
        return chain

    @property
    def _says(self) -> str:
        """The first error since `_errors` was cleared: those that follow only say that what it is part of has failed too."""
        first = self._errors[0] if self._errors else "nothing"
        return f"llama.cpp says: {_WHERE.sub('', first)}"

    def _listen(self, level: int, text: bytes | None, _: int | None) -> None:
        if level == abi.LOG_ERROR and text:
            self._errors.append(text.decode(errors="replace").strip())


@cache
def library() -> Library:
    """The process's. Raises EngineUnusable."""
    return Library(abi.locate())
