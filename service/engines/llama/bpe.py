"""tokenizer.json out of a GGUF's metadata, for the vocabularies whose way of cutting text into words is known here."""

from __future__ import annotations

from collections.abc import Mapping

from service.engines import huggingface
from service.engines.llama import gguf

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (_LLAMA3 % 3,),
    "qwen2": (_LLAMA3 % 1,),
}
"""By tokenizer.ggml.pre."""
_IGNORES_MERGES = {"llama-bpe"}
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_json(metadata: Mapping[str, bytes], begin: int | None) -> bytes:
    """The same token ids as llama.cpp's. `begin`: the token put before every text. Raises ValueError for a vocabulary that is
    not known here, saying which."""
    kind, pre = (_text(metadata, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(f"vocabulary {kind!r} with pre-tokenizer {pre!r} is not one of gpt2 with {', '.join(SPLITS)}")
    kinds = gguf.numbers(metadata["tokenizer.ggml.token_type"])
    return huggingface.byte_level_bpe(
        gguf.strings(metadata["tokenizer.ggml.tokens"]),
        gguf.strings(metadata["tokenizer.ggml.merges"]),
        controls={token_id: of == _CONTROL for token_id, of in enumerate(kinds) if of in (_CONTROL, _USER_DEFINED)},
        splits=SPLITS[pre],
        begin=begin,
        ignore_merges=pre in _IGNORES_MERGES,
    )


def _text(metadata: Mapping[str, bytes], key: str) -> str:
    return gguf.text(metadata[key]) if key in metadata else ""
