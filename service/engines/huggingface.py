"""Hugging Face's tokenizer.json and tokenizer_config.json, which gateways read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def letters() -> list[str]:
    """GPT-2's alphabet, by byte: printable bytes are themselves, the others are characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = {byte: 256 + index for index, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    return [chr(others.get(byte, byte)) for byte in range(256)]


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Iterable[str],
    *,
    controls: Mapping[int, bool],
    splits: Sequence[str],
    begin: int | None,
    ignore_merges: bool = False,
) -> bytes:
    """tokenizer.json of a byte-level BPE.

    `tokens`: by id, in GPT-2's alphabet. `merges`: as "left right". `controls`: ids of tokens recognised in a text, and
    whether decoding omits them. `splits`: regular expressions that cut a text into words, applied in order. `begin`: the token
    before every text.
    """
    described: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": tokens[token_id], "special": special}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token_id, special in sorted(controls.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_split, splits), BYTE_LEVEL]},
        "post_processor": None if begin is None else _begins_with(tokens[begin], begin),
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": list(merges),
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def config(*, template: str | None, begin: str | None, end: str | None) -> bytes:
    """tokenizer_config.json: the control tokens as text, and the chat template."""
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        "eos_token": end,
        "chat_template": template,
    }
    return json.dumps({name: value for name, value in described.items() if value is not None}, ensure_ascii=False).encode()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip archive, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _begins_with(text: str, token_id: int) -> dict[str, object]:
    begin, one, other = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    special = {text: {"id": text, "ids": [token_id], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": [begin, one], "pair": [begin, one, other], "special_tokens": special}
