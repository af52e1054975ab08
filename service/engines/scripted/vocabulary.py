"""One token for each byte, an end token and a few control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ostinato.v1 import types_pb2

from service.engines import huggingface

END = 256
BEGIN = 257
CONTROLS = {
    "<|end|>": END,
    "<|begin|>": BEGIN,
    "<|system|>": 258,
    "<|user|>": 259,
    "<|assistant|>": 260,
    "<|tool|>": 261,
}
_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' and not loop.first -%}{{ raise_exception('a system message must come first') }}{%- endif -%}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
    "{%- endfor -%}{{ '<|assistant|>' }}"
)
"""`render` in the words of a gateway."""
_CONTROL = re.compile("|".join(map(re.escape, CONTROLS)))


class ByteVocabulary:
    """Token ids 0 to 255 are the bytes; control tokens have no text, and are written `<|name|>` where they are recognised."""

    size = 256 + len(CONTROLS)
    end_ids = frozenset({END})
    _pieces = tuple(bytes([value]) for value in range(256)) + (b"",) * len(CONTROLS)

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids, done = [BEGIN], 0
        if not special:
            return ids + list(text.encode())
        for found in _CONTROL.finditer(text):
            ids += text[done : found.start()].encode()
            ids.append(CONTROLS[found.group()])
            done = found.end()
        return ids + list(text[done:].encode())

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def render(self, messages: Sequence[types_pb2.Message]) -> str:
        """Each turn between its role and an end. As real templates do, it wants the system's turn first."""
        if any(message.role == "system" for message in messages[1:]):
            raise ValueError("a system message must come first")
        return "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages) + "<|assistant|>"

    def files(self) -> Mapping[str, bytes]:
        tokens = huggingface.letters() + list(CONTROLS)
        return {
            huggingface.TOKENIZER: huggingface.byte_level_bpe(
                tokens, (), controls=dict.fromkeys(CONTROLS.values(), True), splits=(), begin=BEGIN
            ),
            huggingface.CONFIG: huggingface.config(template=_TEMPLATE, begin=tokens[BEGIN], end=tokens[END]),
        }
